//! The direct way: what the kernel may decide by itself the next time, and whether what it let through
//! is still allowed.
//!
//! A verdict says what [`crate::route`], [`crate::balance`] and [`crate::authorize`] would say of the next
//! connection of one pod to one destination, as long as nothing that they look at changes. Where that
//! cannot be said in the verdict's few words there is none, and the agent goes on carrying.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::addr::{EndpointAddr, OrigDst};
use crate::authorize::{AuthorizeRefusal, Request, Verdict, Via, authorize};
use crate::balance::Policy;
use crate::route::{Route, Way, route, way};
use crate::snapshot::{Endpoint, Snapshot, Workload};

/// Endpoints of one verdict: `mesh_common::direct::MAX_ENDPOINTS`, checked where both are known.
pub const MAX_ENDPOINTS: usize = 32;

/// One endpoint that the kernel may draw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The kernel sends the connection straight there.
    Direct {
        /// Where it accepts connections.
        addr: EndpointAddr,
        /// Its pod.
        workload: Arc<Workload>,
    },
    /// The agent carries it there.
    Agent(EndpointAddr),
}

/// What the kernel may do with connections of `source` to `dst`: draw uniformly from these. `None` if
/// it has to ask every time. `is_avoided` is asked of every endpoint whether it is tried last now;
/// `bound`, if clients keep to an endpoint for so long, which one the source keeps to.
pub fn verdict(
    snapshot: &Snapshot,
    source: &Arc<Workload>,
    dst: OrigDst,
    policy: Policy,
    mut is_avoided: impl FnMut(EndpointAddr) -> bool,
    bound: impl FnOnce(Duration) -> Option<EndpointAddr>,
) -> Option<Vec<Choice>> {
    if !source.is_enrolled() || !source.settings.direct {
        return None;
    }
    let dst = OrigDst::canonical(dst.0);
    // Whoever is not read yet takes no part meanwhile, and is read because the agent is asked.
    if snapshot.is_unread(dst.0.ip()) {
        return None;
    }
    let one;
    let (service, pod);
    let endpoints: &[Endpoint] = match route(snapshot, dst) {
        Route::Service { service: found, candidates } => {
            service = candidates;
            match found.affinity {
                None => service.as_slice(),
                // That one and no other, or the kernel would send the client elsewhere.
                Some(timeout) => {
                    let to = bound(timeout)?;
                    let kept = service.as_slice().iter().find(|endpoint| endpoint.addr == to)?;
                    std::slice::from_ref(kept)
                }
            }
        }
        Route::Workload { workload, addr } => {
            pod = Endpoint { addr, workload: Some(workload) };
            one = [pod];
            &one
        }
        Route::Passthrough | Route::Refuse(_) => return None,
    };
    // Who asks for turns can count them, and a draw is none.
    let is_drawn = policy != Policy::RoundRobin || endpoints.len() == 1;
    if endpoints.len() > MAX_ENDPOINTS || !is_drawn {
        return None;
    }
    let choice = |endpoint: &Endpoint| match direct_to(snapshot, source, dst, endpoint) {
        Some(workload) => Choice::Direct { addr: endpoint.addr, workload },
        None => Choice::Agent(endpoint.addr),
    };
    // As `balance` does: who has just failed is left out, unless nobody else is there.
    let good = endpoints.iter().filter(|endpoint| !is_avoided(endpoint.addr));
    let choices: Vec<Choice> = good.map(choice).collect();
    let has_direct = choices.iter().any(|choice| matches!(choice, Choice::Direct { .. }));
    has_direct.then_some(choices)
}

/// The endpoint's pod, if connections of `source` may go there without the agent.
fn direct_to(
    snapshot: &Snapshot,
    source: &Workload,
    dst: OrigDst,
    endpoint: &Endpoint,
) -> Option<Arc<Workload>> {
    let Way::Local { workload } = way(snapshot, endpoint.workload.as_ref()) else {
        return None;
    };
    let to = endpoint.addr.0;
    // Without the client's address the application has to see its own pod's, which is the agent's work.
    let wanted = workload.settings.direct && workload.settings.preserve_client_address;
    // A socket has one family, and what a pod says to itself the kernel does not let pass the agent.
    let possible = to.is_ipv4() == dst.0.is_ipv4() && workload.uid != source.uid;
    let client = source.ips.iter().find(|ip| ip.is_ipv4() == to.is_ipv4())?;
    let request = Request {
        to: endpoint.addr,
        client: SocketAddr::new(*client, 0),
        via: Via::Local { caller: &source.identity },
    };
    let allowed = matches!(authorize(snapshot, &request), Verdict::Deliver { .. });
    (wanted && possible && allowed).then_some(workload)
}

/// Whether no further direct connection is to begin while `open` are. `limit` are followed; where that was
/// reached (`was_full`), a sixteenth of them has to end first.
pub fn is_full(was_full: bool, open: usize, limit: usize) -> bool {
    open >= if was_full { limit - limit / 16 } else { limit }
}

/// A direct connection that is open: what it was let through as.
#[derive(Clone, Copy, Debug)]
pub struct Open<'a> {
    /// UID of the client's pod.
    pub client_uid: &'a str,
    /// The client's address.
    pub client: SocketAddr,
    /// UID of the server's pod.
    pub server_uid: &'a str,
    /// The endpoint.
    pub to: EndpointAddr,
}

/// Whether an open direct connection would be let in now.
///
/// Leaving or entering the mesh and a change of mode touch new connections only; that either pod is gone
/// or another has its address ends this one.
///
/// # Errors
///
/// It would be refused, for this reason.
pub fn still_allowed(snapshot: &Snapshot, open: &Open<'_>) -> Result<(), AuthorizeRefusal> {
    let client = snapshot.workload(open.client_uid).ok_or(AuthorizeRefusal::UnknownWorkload)?;
    let via = Via::Local { caller: &client.identity };
    let request = Request { to: open.to, client: open.client, via };
    match authorize(snapshot, &request) {
        Verdict::Refuse(refusal) => Err(refusal),
        Verdict::Deliver { workload, .. } if *workload.uid == *open.server_uid => Ok(()),
        Verdict::Deliver { .. } => Err(AuthorizeRefusal::WrongWorkload),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{node, service, snapshot, workload};
    use crate::settings::Mode;
    use crate::snapshot::{Enrolment, Parts, Service};

    fn changed(pod: &Arc<Workload>, change: impl FnOnce(&mut Workload)) -> Arc<Workload> {
        let mut pod = Workload::clone(pod);
        change(&mut pod);
        Arc::new(pod)
    }

    fn at(pod: &Arc<Workload>) -> Endpoint {
        let addr = EndpointAddr((pod.ips[0], 8080).into());
        Endpoint { addr, workload: Some(Arc::clone(pod)) }
    }

    /// What a pod `client` of node-1 may do with a service that has these pods.
    fn ask(client: &Arc<Workload>, pods: &[&Arc<Workload>]) -> Option<Vec<Choice>> {
        ask_with(client, pods, Policy::LeastLoaded, |_| false)
    }

    fn ask_with(
        client: &Arc<Workload>,
        pods: &[&Arc<Workload>],
        policy: Policy,
        is_avoided: impl Fn(EndpointAddr) -> bool,
    ) -> Option<Vec<Choice>> {
        let endpoints = pods.iter().map(|pod| at(pod)).collect();
        let all = pods.iter().copied().chain([client]).map(Arc::clone).collect();
        let services = vec![service("web", &["10.96.0.1"], 80, endpoints)];
        let nodes = vec![node("node-2", "192.0.2.2:15019")];
        let snapshot = snapshot(all, services, nodes);
        let dst = OrigDst("10.96.0.1:80".parse().unwrap());
        verdict(&snapshot, client, dst, policy, is_avoided, nobody_asks)
    }

    fn nobody_asks(_: Duration) -> Option<EndpointAddr> {
        panic!("the service says nothing of affinity")
    }

    fn direct(pod: &Arc<Workload>) -> Choice {
        Choice::Direct { addr: at(pod).addr, workload: Arc::clone(pod) }
    }

    fn agent(pod: &Arc<Workload>) -> Choice {
        Choice::Agent(at(pod).addr)
    }

    #[test]
    fn all_endpoints_are_drawn_from_and_only_those_here_are_direct() {
        let client = workload("client", "node-1", &["10.0.1.9"]);
        let here = workload("here", "node-1", &["10.0.1.1"]);
        let there = workload("there", "node-2", &["10.0.2.1"]);
        assert_eq!(ask(&client, &[&here, &there]), Some(vec![direct(&here), agent(&there)]));
        assert_eq!(ask(&client, &[&there]), None, "nothing to gain");
    }

    #[test]
    fn service_that_is_read_in_part_is_the_agents() {
        let client = workload("client", "node-1", &["10.0.1.9"]);
        let here = workload("here", "node-1", &["10.0.1.1"]);
        let asked = |unread: &[&str]| {
            let parts = Parts {
                workloads: vec![Arc::clone(&client), Arc::clone(&here)],
                services: vec![service("web", &["10.96.0.1"], 80, vec![at(&here)])],
                unread: unread.iter().map(|ip| ip.parse().unwrap()).collect(),
                ..Parts::default()
            };
            let trust_domain = client.identity.trust_domain().clone();
            let snapshot = Snapshot::new(1, "node-1".into(), trust_domain, parts);
            let dst = OrigDst("10.96.0.1:80".parse().unwrap());
            verdict(&snapshot, &client, dst, Policy::LeastLoaded, |_| false, nobody_asks)
        };
        assert_eq!(asked(&[]), Some(vec![direct(&here)]));
        assert_eq!(asked(&["10.96.0.1"]), None);
    }

    #[test]
    fn whoever_is_not_for_it_is_carried() {
        let client = workload("client", "node-1", &["10.0.1.9"]);
        let here = workload("here", "node-1", &["10.0.1.1"]);
        let other = workload("other", "node-1", &["10.0.1.2"]);
        let changes: [fn(&mut Workload); 3] = [
            |pod| pod.settings.direct = false,
            |pod| pod.settings.preserve_client_address = false,
            |pod| pod.enrolment = Enrolment::LeftAlone("left"),
        ];
        for change in changes {
            let not = changed(&other, change);
            assert_eq!(ask(&client, &[&here, &not]), Some(vec![direct(&here), agent(&not)]));
        }
        let strict = changed(&other, |pod| pod.settings.mode = Mode::Strict);
        assert_eq!(ask(&client, &[&strict]), Some(vec![direct(&strict)]));
        let itself = Some(vec![direct(&here), agent(&client)]);
        assert_eq!(ask(&client, &[&here, &client]), itself);
        for not in [
            changed(&client, |pod| pod.settings.direct = false),
            changed(&client, |pod| pod.enrolment = Enrolment::LeftAlone("left")),
            changed(&client, |pod| pod.ips = vec!["fd00::9".parse().unwrap()]),
        ] {
            assert_eq!(ask(&not, &[&here]), None);
        }
    }

    #[test]
    fn endpoint_that_failed_is_left_out() {
        let client = workload("client", "node-1", &["10.0.1.9"]);
        let here = workload("here", "node-1", &["10.0.1.1"]);
        let other = workload("other", "node-1", &["10.0.1.2"]);
        let avoid = at(&other).addr;
        let asked = ask_with(&client, &[&here, &other], Policy::Random, |addr| addr == avoid);
        assert_eq!(asked, Some(vec![direct(&here)]));
        assert_eq!(ask_with(&client, &[&here, &other], Policy::Random, |_| true), None);
    }

    #[test]
    fn turns_are_the_agents_to_take() {
        let client = workload("client", "node-1", &["10.0.1.9"]);
        let here = workload("here", "node-1", &["10.0.1.1"]);
        let other = workload("other", "node-1", &["10.0.1.2"]);
        let turns = |pods: &[_]| ask_with(&client, pods, Policy::RoundRobin, |_| false);
        assert_eq!(turns(&[&here, &other]), None);
        assert_eq!(turns(&[&here]), Some(vec![direct(&here)]), "one takes every turn");
    }

    #[test]
    fn client_that_keeps_to_an_endpoint_is_let_through_to_that_one_alone() {
        let client = workload("client", "node-1", &["10.0.1.9"]);
        let here: Vec<_> = (1..=40)
            .map(|n| workload(&format!("p{n}"), "node-1", &[&format!("10.0.1.{}", 100 + n)]))
            .collect();
        let there = workload("there", "node-2", &["10.0.2.1"]);
        let endpoints = here.iter().chain([&there]).map(at).collect();
        let mut web = Service::clone(&service("web", &["10.96.0.1"], 80, endpoints));
        web.affinity = Some(Duration::from_secs(7));
        let nodes = vec![node("node-2", "192.0.2.2:15019")];
        let all = here.iter().chain([&there, &client]).map(Arc::clone).collect();
        let known = snapshot(all, vec![Arc::new(web)], nodes);
        let dst = OrigDst("10.96.0.1:80".parse().unwrap());
        let ask = |to: Option<EndpointAddr>, policy| {
            verdict(
                &known,
                &client,
                dst,
                policy,
                |_| false,
                |timeout| {
                    assert_eq!(timeout, Duration::from_secs(7));
                    to
                },
            )
        };
        for policy in [Policy::LeastLoaded, Policy::RoundRobin] {
            let to = at(&here[3]).addr;
            assert_eq!(ask(Some(to), policy), Some(vec![direct(&here[3])]), "and of 41");
            assert_eq!(ask(Some(at(&there).addr), policy), None, "carried there");
            assert_eq!(ask(None, policy), None, "nobody has chosen yet");
            let gone = EndpointAddr("10.0.1.7:8080".parse().unwrap());
            assert_eq!(ask(Some(gone), policy), None, "not an endpoint any more");
        }
        let failed =
            verdict(&known, &client, dst, Policy::Random, |_| true, |_| Some(at(&here[3]).addr));
        assert_eq!(failed, None, "it has just failed");
    }

    #[test]
    fn more_endpoints_than_fit_are_the_agents() {
        let client = workload("client", "node-1", &["10.0.1.9"]);
        let pods: Vec<_> = (1..=33)
            .map(|n| workload(&format!("p{n}"), "node-1", &[&format!("10.0.2.{n}")]))
            .collect();
        let all: Vec<_> = pods.iter().collect();
        assert_eq!(ask(&client, &all[..32]).map(|choices| choices.len()), Some(32));
        assert_eq!(ask(&client, &all), None);
    }

    #[test]
    fn destination_of_another_family_or_outside_is_the_agents() {
        let client = workload("client", "node-1", &["10.0.1.9", "fd00::9"]);
        let here = workload("here", "node-1", &["10.0.1.1"]);
        let services = vec![service("web", &["fd96::1"], 80, vec![at(&here)])];
        let known = snapshot(vec![Arc::clone(&client), Arc::clone(&here)], services, vec![]);
        let ask = |dst: &str| {
            let dst = OrigDst(dst.parse().unwrap());
            verdict(&known, &client, dst, Policy::Random, |_| false, nobody_asks)
        };
        assert_eq!(ask("[fd96::1]:80"), None, "a v6 service with v4 endpoints");
        assert_eq!(ask("[fd96::1]:81"), None, "no such port");
        assert_eq!(ask("203.0.113.1:80"), None, "outside");
        let to = Choice::Direct {
            addr: EndpointAddr("10.0.1.1:9".parse().unwrap()),
            workload: Arc::clone(&here),
        };
        assert_eq!(ask("10.0.1.1:9"), Some(vec![to.clone()]), "the pod itself");
        assert_eq!(ask("[::ffff:10.0.1.1]:9"), Some(vec![to]));
    }

    #[test]
    fn no_further_one_begins_where_as_many_as_may_are_followed() {
        let full = |was, open| is_full(was, open, 160);
        assert_eq!([full(false, 159), full(false, 160), full(true, 159)], [false, true, true]);
        assert_eq!([full(true, 150), full(true, 149)], [true, false]);
        assert_eq!([is_full(false, 0, 1), is_full(true, 0, 1)], [false, false], "one");
    }

    #[test]
    fn open_connection_ends_when_either_pod_is_another() {
        let client = workload("client", "node-1", &["10.0.1.9"]);
        let server = workload("server", "node-1", &["10.0.1.1"]);
        let judge = |pods: Vec<Arc<Workload>>| {
            let open = Open {
                client_uid: "client",
                client: "10.0.1.9:4000".parse().unwrap(),
                server_uid: "server",
                to: EndpointAddr("10.0.1.1:80".parse().unwrap()),
            };
            still_allowed(&snapshot(pods, vec![], vec![]), &open)
        };
        assert_eq!(judge(vec![Arc::clone(&client), Arc::clone(&server)]), Ok(()));
        let untouched: [fn(&mut Workload); 3] = [
            |pod| pod.enrolment = Enrolment::LeftAlone("left"),
            |pod| pod.settings.mode = Mode::Strict,
            |pod| pod.settings.direct = false,
        ];
        for change in untouched {
            let pods = [&client, &server].map(|pod| changed(pod, change));
            assert_eq!(judge(pods.to_vec()), Ok(()));
        }
        let gone = Err(AuthorizeRefusal::UnknownWorkload);
        assert_eq!(judge(vec![Arc::clone(&client)]), gone);
        assert_eq!(judge(vec![Arc::clone(&server)]), gone);
        let successor = changed(&server, |pod| pod.uid = "successor".into());
        assert_eq!(judge(vec![client, successor]), Err(AuthorizeRefusal::WrongWorkload));
    }
}
