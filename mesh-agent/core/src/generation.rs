//! Generations: what a decision was made from, as one number.
//!
//! A verdict of the direct way names the generations of the source pod, of the destination and of the
//! endpoint's pod. Each is a keyed hash of everything about it that a decision looks at, so the same
//! manifests have the same generations also after a restart, a change and its reversal is no change,
//! and nobody needs to know which verdicts something touches.
//!
//! The hash is SipHash-2-4 (Aumasson and Bernstein, *SipHash: a fast short-input PRF*, INDOCRYPT 2012)
//! under a key that no manifest's author knows: a collision cannot be aimed for. It need not be stable
//! across releases: another one ends verdicts, and the agent decides again.

use std::hash::{Hash as _, Hasher};
use std::net::IpAddr;

use crate::balance::Policy;
use crate::snapshot::{Endpoint, Service, Snapshot, Workload};

/// A generation; never zero, which means "none" in the kernel's maps.
pub type Generation = u64;

/// What generations are computed with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct GenerationKey(pub [u64; 2]);

impl std::fmt::Debug for GenerationKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GenerationKey")
    }
}

impl GenerationKey {
    /// Of an enrolled pod of this node, in the namespace with this cookie: a pod that is made anew, or
    /// gets another's address, is another generation.
    pub fn of_pod(self, workload: &Workload, netns: u64) -> Generation {
        self.hash(|hasher| {
            netns.hash(hasher);
            pod(workload, hasher);
        })
    }

    /// Of a destination: all that a connection to this address can come to, balanced in this way. `None` if it is
    /// neither a service's nor a pod's.
    pub fn of_destination(
        self,
        snapshot: &Snapshot,
        ip: IpAddr,
        policy: Policy,
    ) -> Option<Generation> {
        // As `route` looks: a service's address before a pod's.
        if let Some(found) = snapshot.service_at(ip) {
            return Some(self.hash(|hasher| {
                // Of one that is read in part there is no verdict, and none outlives that.
                snapshot.is_unread(ip).hash(hasher);
                // Who is to get turns is not drawn; between the others a verdict makes no difference.
                (policy == Policy::RoundRobin).hash(hasher);
                service(snapshot, found, hasher);
            }));
        }
        let workload = snapshot.workload_at(ip)?;
        Some(self.hash(|hasher| {
            snapshot.node.hash(hasher);
            pod(workload, hasher);
        }))
    }

    fn hash(self, what: impl FnOnce(&mut SipHasher)) -> Generation {
        let mut hasher = SipHasher::new(self.0);
        what(&mut hasher);
        hasher.finish().max(1)
    }
}

fn pod(workload: &Workload, hasher: &mut SipHasher) {
    workload.uid.hash(hasher);
    workload.identity.hash(hasher);
    workload.node.hash(hasher);
    workload.ips.hash(hasher);
    workload.is_enrolled().hash(hasher);
    workload.settings.hash(hasher);
}

fn service(snapshot: &Snapshot, service: &Service, hasher: &mut SipHasher) {
    snapshot.node.hash(hasher);
    (&service.namespace, &service.name, service.affinity).hash(hasher);
    for port in &service.ports {
        (port.port, port.in_reach.len()).hash(hasher);
        for Endpoint { addr, workload } in port.in_reach.iter() {
            addr.hash(hasher);
            workload.is_some().hash(hasher);
            if let Some(workload) = workload {
                pod(workload, hasher);
            }
        }
    }
}

/// SipHash-2-4 over a stream of bytes.
#[derive(Clone, Debug)]
struct SipHasher {
    v: [u64; 4],
    /// Bytes that do not fill a word yet, the first in the lowest place.
    tail: u64,
    len: u64,
}

impl SipHasher {
    fn new([k0, k1]: [u64; 2]) -> Self {
        let v = [
            k0 ^ 0x736f_6d65_7073_6575,
            k1 ^ 0x646f_7261_6e64_6f6d,
            k0 ^ 0x6c79_6765_6e65_7261,
            k1 ^ 0x7465_6462_7974_6573,
        ];
        Self { v, tail: 0, len: 0 }
    }

    fn word(&mut self, word: u64) {
        self.v[3] ^= word;
        self.rounds(2);
        self.v[0] ^= word;
    }

    fn rounds(&mut self, count: usize) {
        let [mut v0, mut v1, mut v2, mut v3] = self.v;
        for _ in 0..count {
            v0 = v0.wrapping_add(v1);
            v2 = v2.wrapping_add(v3);
            v1 = v1.rotate_left(13) ^ v0;
            v3 = v3.rotate_left(16) ^ v2;
            v0 = v0.rotate_left(32);
            v2 = v2.wrapping_add(v1);
            v0 = v0.wrapping_add(v3);
            v1 = v1.rotate_left(17) ^ v2;
            v3 = v3.rotate_left(21) ^ v0;
            v2 = v2.rotate_left(32);
        }
        self.v = [v0, v1, v2, v3];
    }
}

impl Hasher for SipHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let place = self.len % 8;
            self.tail |= u64::from(*byte) << (8 * place);
            self.len = self.len.wrapping_add(1);
            if place == 7 {
                let word = std::mem::take(&mut self.tail);
                self.word(word);
            }
        }
    }

    fn finish(&self) -> u64 {
        let mut this = self.clone();
        this.word(self.tail | self.len << 56);
        this.v[2] ^= 0xff;
        this.rounds(4);
        this.v.into_iter().fold(0, |hash, v| hash ^ v)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::addr::EndpointAddr;
    use crate::fixtures;
    use crate::settings::Mode;
    use crate::snapshot::{Enrolment, Parts};
    use crate::spiffe::SpiffeId;

    const KEY: GenerationKey = GenerationKey([1, 2]);

    /// Vectors of the reference implementation: key 00 01 .. 0f, message 00 01 .. of growing length.
    #[test]
    fn hash_is_siphash_2_4() {
        let key = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        let of = |len: u8| {
            let mut hasher = SipHasher::new(key);
            hasher.write(&(0..len).collect::<Vec<_>>());
            hasher.finish()
        };
        assert_eq!(of(0), 0x726f_db47_dd0e_0e31);
        assert_eq!(of(1), 0x74f8_39c5_93dc_67fd);
        assert_eq!(of(8), 0x93f5_f579_9a93_2462);
        assert_eq!(of(15), 0xa129_ca61_49be_45e5);
    }

    fn service_of(pods: &[&Arc<Workload>]) -> Arc<Service> {
        let endpoint = |pod: &&Arc<Workload>| Endpoint {
            addr: EndpointAddr((pod.ips[0], 80).into()),
            workload: Some(Arc::clone(pod)),
        };
        fixtures::service("web", &["10.96.0.1"], 80, pods.iter().map(endpoint).collect())
    }

    fn of_service(pods: &[&Arc<Workload>]) -> Generation {
        let workloads = pods.iter().map(|pod| Arc::clone(pod)).collect();
        let snapshot = fixtures::snapshot(workloads, vec![service_of(pods)], vec![]);
        KEY.of_destination(&snapshot, "10.96.0.1".parse().unwrap(), Policy::LeastLoaded).unwrap()
    }

    #[test]
    fn everything_that_a_decision_looks_at_makes_another_generation() {
        let pod = fixtures::workload("a", "node-1", &["10.0.1.1"]);
        let other = fixtures::workload("b", "node-1", &["10.0.1.2"]);
        let of = |change: &dyn Fn(&mut Service)| {
            let mut service = Service::clone(&service_of(&[&pod, &other]));
            change(&mut service);
            let snapshot = fixtures::snapshot(vec![], vec![Arc::new(service)], vec![]);
            KEY.of_destination(&snapshot, "10.96.0.1".parse().unwrap(), Policy::LeastLoaded)
                .unwrap()
        };
        let unchanged = of(&|_| {});
        assert_ne!(of(&|web| web.affinity = Some(crate::affinity::DEFAULT_TIMEOUT)), unchanged);
        let fewer = of(&|web| web.ports[0].in_reach = web.ports[0].in_reach[1..].into());
        assert_ne!(fewer, unchanged, "another endpoint in reach");
        let changes: [fn(&mut Workload); 7] = [
            |pod| pod.uid = "another".into(),
            |pod| pod.identity = SpiffeId::new(fixtures::domain(), "default", "other").unwrap(),
            |pod| pod.node = "node-2".into(),
            |pod| pod.enrolment = Enrolment::LeftAlone("left"),
            |pod| pod.settings.mode = Mode::Strict,
            |pod| pod.settings.direct = false,
            |pod| pod.settings.preserve_client_address = false,
        ];
        for change in changes {
            let mut changed = Workload::clone(&pod);
            change(&mut changed);
            let changed = Arc::new(changed);
            assert_ne!(KEY.of_pod(&pod, 7), KEY.of_pod(&changed, 7));
            assert_ne!(of_service(&[&pod, &other]), of_service(&[&changed, &other]));
        }
        assert_ne!(KEY.of_pod(&pod, 7), KEY.of_pod(&pod, 8), "another namespace");
        assert_ne!(of_service(&[&pod]), of_service(&[&pod, &other]), "another endpoint");
        let by = |policy| {
            let snapshot = fixtures::snapshot(vec![], vec![service_of(&[&pod])], vec![]);
            KEY.of_destination(&snapshot, "10.96.0.1".parse().unwrap(), policy).unwrap()
        };
        let [turns, random, least] =
            [Policy::RoundRobin, Policy::Random, Policy::LeastLoaded].map(by);
        assert_ne!(turns, least, "turns cannot be drawn");
        assert_eq!(random, least, "no verdict is another one");
        assert_ne!(KEY.of_pod(&pod, 7), GenerationKey([1, 3]).of_pod(&pod, 7), "another key");
    }

    #[test]
    fn service_that_is_read_in_part_is_another_generation() {
        let pod = fixtures::workload("a", "node-1", &["10.0.1.1"]);
        let vip: IpAddr = "10.96.0.1".parse().unwrap();
        let of = |unread: &[IpAddr]| {
            let parts = Parts {
                services: vec![service_of(&[&pod])],
                unread: unread.iter().copied().collect(),
                ..Parts::default()
            };
            let domain = pod.identity.trust_domain().clone();
            let snapshot = Snapshot::new(1, "node-1".into(), domain, parts);
            KEY.of_destination(&snapshot, vip, Policy::LeastLoaded).unwrap()
        };
        assert_ne!(of(&[vip]), of(&[]));
    }

    #[test]
    fn the_same_manifests_are_the_same_generation() {
        let pods = || fixtures::workload("a", "node-1", &["10.0.1.1"]);
        assert_eq!(KEY.of_pod(&pods(), 7), KEY.of_pod(&pods(), 7));
        assert_eq!(of_service(&[&pods()]), of_service(&[&pods()]));
    }

    #[test]
    fn stranger_has_no_generation() {
        let snapshot = fixtures::snapshot(vec![], vec![], vec![]);
        assert_eq!(
            KEY.of_destination(&snapshot, "10.0.0.9".parse().unwrap(), Policy::LeastLoaded),
            None
        );
    }
}
