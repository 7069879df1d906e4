//! `sessionAffinity: ClientIP`: which endpoint of a service a client pod keeps to.
//!
//! A client is a pod and what it dials, and it is bound to an endpoint by being sent there. It stays so
//! until it has not connected for the service's `timeoutSeconds`, as with kube-proxy, or until a
//! connection of its own could not be made there: then it moves, and stays where it moved to. What
//! other clients meet at an endpoint moves nobody, and neither does that nobody can say at the moment
//! whether the endpoint is in the mesh: meanwhile another one stands in for it, the same for every
//! connection. The client goes back to its own, or stays with the other one if its own is gone.
//!
//! Only a memory: without an entry a client is sent where balance sends it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::addr::{EndpointAddr, OrigDst};
use crate::snapshot::{Endpoint, WorkloadUid};

/// `sessionAffinityConfig.clientIP.timeoutSeconds` where a service does not say.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10_800);
/// The longest that the API lets a service ask for.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(86_400);
/// Clients that are remembered. Past it those that have not connected for longest are forgotten, an
/// eighth at once, so that a crowd of clients does not pay for a search each.
pub const MAX_CLIENTS: usize = 65_536;

/// Who keeps to an endpoint: a pod, and the service's address and port as it dials them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    /// UID of the pod.
    pub pod: WorkloadUid,
    /// What it dials, canonical.
    pub dst: OrigDst,
}

/// Which endpoint each client keeps to. One per agent.
#[derive(Debug, Default)]
pub struct Affinities {
    by_client: HashMap<Client, Bound>,
}

#[derive(Clone, Copy, Debug)]
struct Bound {
    to: EndpointAddr,
    last: Instant,
    /// What has served the client last since `to` cannot be a candidate.
    stand_in: Option<EndpointAddr>,
}

impl Affinities {
    /// Where `client` keeps to, and for how much longer if it does not connect again.
    pub fn bound(
        &self,
        client: &Client,
        timeout: Duration,
        now: Instant,
    ) -> Option<(EndpointAddr, Duration)> {
        let bound = self.by_client.get(client)?;
        let left = timeout.saturating_sub(now.saturating_duration_since(bound.last));
        (!left.is_zero()).then_some((bound.to, left))
    }

    /// The index of the endpoint that `client` keeps to, if it is one of `candidates` and was not tried
    /// in vain. Counts as a connection there.
    pub fn keep(
        &mut self,
        client: &Client,
        timeout: Duration,
        candidates: &[Endpoint],
        tried: &[EndpointAddr],
        now: Instant,
    ) -> Option<usize> {
        let (to, _) = self.bound(client, timeout, now)?;
        if tried.contains(&to) {
            return None;
        }
        let index = candidates.iter().position(|endpoint| endpoint.addr == to)?;
        self.bind(client, to, now);
        Some(index)
    }

    /// Whether `client` keeps to an endpoint that cannot be a candidate now, was not tried in vain, and
    /// `may_return`: it is to be sent to its [stand-in](Self::stand_in) without being bound there. Counts
    /// as a connection.
    pub fn waits(
        &mut self,
        client: &Client,
        timeout: Duration,
        tried: &[EndpointAddr],
        now: Instant,
        may_return: impl FnOnce(EndpointAddr) -> bool,
    ) -> bool {
        let Some((to, _)) = self.bound(client, timeout, now) else { return false };
        let waits = !tried.contains(&to) && may_return(to);
        if waits && let Some(bound) = self.by_client.get_mut(client) {
            bound.last = now;
        }
        waits
    }

    /// The index of the endpoint that has served `client` while its own could not be a candidate, if it is
    /// one of `candidates` and was not tried in vain.
    pub fn stand_in(
        &self,
        client: &Client,
        timeout: Duration,
        candidates: &[Endpoint],
        tried: &[EndpointAddr],
        now: Instant,
    ) -> Option<usize> {
        self.bound(client, timeout, now)?;
        let to = self.by_client.get(client)?.stand_in.filter(|to| !tried.contains(to))?;
        candidates.iter().position(|endpoint| endpoint.addr == to)
    }

    /// `client`, which [waits](Self::waits), is sent to `to` meanwhile.
    pub fn stands_in(&mut self, client: &Client, to: EndpointAddr) {
        if let Some(bound) = self.by_client.get_mut(client) {
            bound.stand_in = Some(to);
        }
    }

    /// `client` is sent to `to`. Returns where it was sent before, if that was somewhere else.
    pub fn bind(
        &mut self,
        client: &Client,
        to: EndpointAddr,
        now: Instant,
    ) -> Option<EndpointAddr> {
        let bound = Bound { to, last: now, stand_in: None };
        if let Some(known) = self.by_client.get_mut(client) {
            let before = std::mem::replace(known, bound).to;
            return (before != to).then_some(before);
        }
        if self.by_client.len() >= MAX_CLIENTS {
            self.forget_an_eighth();
        }
        self.by_client.insert(client.clone(), bound);
        None
    }

    /// `client` has connected to `to` without having been sent there by us: the kernel remembers what
    /// we have told it. What we know better stays.
    pub fn seen(&mut self, client: &Client, to: EndpointAddr, now: Instant) {
        if self.by_client.get(client).is_none_or(|bound| bound.to == to) {
            self.bind(client, to, now);
        }
    }

    /// `client` could not connect to `to`: if it keeps to that it is to be sent somewhere else.
    pub fn forsake(&mut self, client: &Client, to: EndpointAddr) {
        if self.by_client.get(client).is_some_and(|bound| bound.to == to) {
            self.by_client.remove(client);
        }
    }

    /// Forgets clients that are gone, and those that no service remembers for so long.
    pub fn retain(&mut self, now: Instant, lives: impl Fn(&Client) -> bool) {
        self.by_client.retain(|client, bound| {
            now.saturating_duration_since(bound.last) < MAX_TIMEOUT && lives(client)
        });
    }

    fn forget_an_eighth(&mut self) {
        let mut times: Vec<Instant> = self.by_client.values().map(|bound| bound.last).collect();
        let eighth = times.len() / 8;
        if eighth < times.len() {
            let (_, oldest_kept, _) = times.select_nth_unstable(eighth);
            let oldest_kept = *oldest_kept;
            self.by_client.retain(|_, bound| bound.last > oldest_kept);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::fixtures::endpoint;

    const TIMEOUT: Duration = Duration::from_secs(60);

    #[expect(clippy::disallowed_methods, reason = "any start will do; time then moves by hand")]
    fn epoch() -> Instant {
        Instant::now()
    }

    fn client(pod: &str) -> Client {
        Client { pod: pod.into(), dst: OrigDst("10.96.0.1:80".parse().unwrap()) }
    }

    fn endpoints() -> Vec<Endpoint> {
        ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"].map(endpoint).into()
    }

    #[test]
    fn client_keeps_to_its_endpoint_while_it_goes_on_connecting() {
        let (mut affinities, all, mut now) = (Affinities::default(), endpoints(), epoch());
        let one = client("one");
        assert_eq!(affinities.keep(&one, TIMEOUT, &all, &[], now), None, "nobody chose yet");
        affinities.bind(&one, all[1].addr, now);
        for _ in 0..10 {
            now += TIMEOUT - Duration::from_millis(1);
            assert_eq!(affinities.keep(&one, TIMEOUT, &all, &[], now), Some(1));
        }
        now += TIMEOUT;
        assert_eq!(affinities.keep(&one, TIMEOUT, &all, &[], now), None, "it was away for so long");
        let longer = 2 * TIMEOUT;
        assert_eq!(
            affinities.keep(&one, longer, &all, &[], now),
            Some(1),
            "the service says how long"
        );
    }

    #[test]
    fn clients_are_apart_by_pod_and_by_what_they_dial() {
        let (mut affinities, all, now) = (Affinities::default(), endpoints(), epoch());
        let (one, two) = (client("one"), client("two"));
        let other = Client { dst: OrigDst("10.96.0.1:81".parse().unwrap()), ..one.clone() };
        affinities.bind(&one, all[0].addr, now);
        affinities.bind(&two, all[1].addr, now);
        assert_eq!(affinities.keep(&one, TIMEOUT, &all, &[], now), Some(0));
        assert_eq!(affinities.keep(&two, TIMEOUT, &all, &[], now), Some(1));
        assert_eq!(affinities.keep(&other, TIMEOUT, &all, &[], now), None);
    }

    #[test]
    fn client_moves_when_its_endpoint_fails_it_or_is_gone() {
        let (mut affinities, all, now) = (Affinities::default(), endpoints(), epoch());
        let one = client("one");
        affinities.bind(&one, all[0].addr, now);
        assert_eq!(
            affinities.keep(&one, TIMEOUT, &all, &[all[0].addr], now),
            None,
            "tried in vain"
        );
        assert_eq!(affinities.bind(&one, all[2].addr, now), Some(all[0].addr));
        assert_eq!(affinities.keep(&one, TIMEOUT, &all, &[], now), Some(2), "and it stays there");
        assert_eq!(affinities.keep(&one, TIMEOUT, &all[..2], &[], now), None, "not ready any more");
        assert_eq!(affinities.bind(&one, all[2].addr, now), None, "the same again");
    }

    #[test]
    fn what_the_kernel_did_prolongs_and_never_moves() {
        let (mut affinities, all, start) = (Affinities::default(), endpoints(), epoch());
        let one = client("one");
        affinities.seen(&one, all[0].addr, start);
        let now = start + TIMEOUT / 2;
        assert_eq!(affinities.bound(&one, TIMEOUT, now), Some((all[0].addr, TIMEOUT / 2)));
        affinities.seen(&one, all[1].addr, now);
        assert_eq!(affinities.bound(&one, TIMEOUT, now), Some((all[0].addr, TIMEOUT / 2)));
        affinities.seen(&one, all[0].addr, now);
        assert_eq!(affinities.bound(&one, TIMEOUT, now), Some((all[0].addr, TIMEOUT)));
    }

    #[test]
    fn memory_is_bounded_and_the_ones_away_for_longest_go_first() {
        let (mut affinities, all, mut now) = (Affinities::default(), endpoints(), epoch());
        let nth = |n: usize| {
            let ip = Ipv4Addr::from_bits(u32::try_from(n).unwrap());
            Client { pod: "one".into(), dst: OrigDst((ip, 80).into()) }
        };
        for n in 0..2 * MAX_CLIENTS {
            now += Duration::from_micros(1);
            affinities.bind(&nth(n), all[0].addr, now);
            assert!(affinities.by_client.len() <= MAX_CLIENTS);
        }
        assert!(affinities.bound(&nth(0), TIMEOUT, now).is_none());
        let kept = 2 * MAX_CLIENTS - MAX_CLIENTS / 2;
        for n in kept..2 * MAX_CLIENTS {
            assert!(affinities.bound(&nth(n), TIMEOUT, now).is_some(), "{n}");
        }
    }

    /// All at one instant: nothing tells who was away for longest, and the bound holds all the same.
    #[test]
    fn crowd_of_one_instant_is_bounded_too() {
        let (mut affinities, all, now) = (Affinities::default(), endpoints(), epoch());
        for n in 0..=u32::try_from(MAX_CLIENTS).unwrap() {
            let dst = OrigDst((Ipv4Addr::from_bits(n), 80).into());
            affinities.bind(&Client { pod: "one".into(), dst }, all[0].addr, now);
        }
        assert!(affinities.by_client.len() <= MAX_CLIENTS);
    }

    #[test]
    fn client_keeps_to_an_endpoint_that_only_has_to_be_read_first() {
        let (mut affinities, all, mut now) = (Affinities::default(), endpoints(), epoch());
        let one = client("one");
        let is_unread = |to: EndpointAddr| to == all[0].addr;
        assert!(!affinities.waits(&one, TIMEOUT, &[], now, is_unread), "it keeps to none");
        affinities.bind(&one, all[0].addr, now);
        for _ in 0..3 {
            now += TIMEOUT - Duration::from_millis(1);
            assert_eq!(affinities.keep(&one, TIMEOUT, &all[1..], &[], now), None);
            assert!(affinities.waits(&one, TIMEOUT, &[], now, is_unread));
        }
        assert_eq!(affinities.keep(&one, TIMEOUT, &all, &[], now), Some(0), "it is read");
        let tried = [all[0].addr];
        assert!(!affinities.waits(&one, TIMEOUT, &tried, now, is_unread), "tried in vain");
        assert!(!affinities.waits(&one, TIMEOUT, &[], now, |_gone| false));
        now += TIMEOUT;
        assert!(!affinities.waits(&one, TIMEOUT, &[], now, is_unread), "it was away for so long");
    }

    #[test]
    fn client_that_waits_keeps_to_one_stand_in_and_goes_back_to_its_own() {
        let (mut affinities, all, mut now) = (Affinities::default(), endpoints(), epoch());
        let one = client("one");
        let [own, second, third] = [0, 1, 2].map(|n: usize| all[n].addr);
        let read = &all[1..];
        affinities.bind(&one, own, now);
        assert_eq!(affinities.stand_in(&one, TIMEOUT, read, &[], now), None, "nobody chose yet");
        affinities.stands_in(&one, third);
        for _ in 0..3 {
            now += TIMEOUT - Duration::from_millis(1);
            assert!(affinities.waits(&one, TIMEOUT, &[], now, |to| to == own));
            assert_eq!(affinities.stand_in(&one, TIMEOUT, read, &[], now), Some(1));
        }
        assert_eq!(affinities.stand_in(&one, TIMEOUT, read, &[third], now), None, "tried in vain");
        assert_eq!(affinities.stand_in(&one, TIMEOUT, &all[..2], &[], now), None, "not ready");
        affinities.stands_in(&one, second);
        assert_eq!(affinities.stand_in(&one, TIMEOUT, read, &[], now), Some(0), "the next one");
        assert_eq!(affinities.keep(&one, TIMEOUT, &all, &[], now), Some(0), "its own is read");
        assert_eq!(affinities.stand_in(&one, TIMEOUT, read, &[], now), None);
        assert_eq!(affinities.bound(&one, TIMEOUT, now), Some((own, TIMEOUT)));
    }

    #[test]
    fn client_whose_endpoint_is_gone_while_it_waits_stays_with_its_stand_in() {
        let (mut affinities, all, now) = (Affinities::default(), endpoints(), epoch());
        let one = client("one");
        affinities.bind(&one, all[0].addr, now);
        affinities.stands_in(&one, all[2].addr);
        assert!(!affinities.waits(&one, TIMEOUT, &[], now, |_gone| false));
        assert_eq!(affinities.stand_in(&one, TIMEOUT, &all[1..], &[], now), Some(1));
        assert_eq!(affinities.bind(&one, all[2].addr, now), Some(all[0].addr));
        assert_eq!(affinities.keep(&one, TIMEOUT, &all[1..], &[], now), Some(1));
        let later = now + TIMEOUT;
        affinities.stands_in(&one, all[1].addr);
        assert_eq!(affinities.stand_in(&one, TIMEOUT, &all, &[], later), None, "away for so long");
    }

    #[test]
    fn nobody_stands_in_for_a_client_that_keeps_to_none() {
        let (mut affinities, all, now) = (Affinities::default(), endpoints(), epoch());
        let one = client("one");
        affinities.stands_in(&one, all[1].addr);
        assert_eq!(affinities.stand_in(&one, TIMEOUT, &all, &[], now), None);
        assert!(affinities.by_client.is_empty(), "a memory that nothing bounds");
    }

    #[test]
    fn pod_that_is_gone_is_forgotten() {
        let (mut affinities, all, now) = (Affinities::default(), endpoints(), epoch());
        affinities.bind(&client("one"), all[0].addr, now);
        affinities.bind(&client("two"), all[0].addr, now);
        affinities.retain(now, |client| &*client.pod == "two");
        assert_eq!(affinities.by_client.len(), 1);
        affinities.retain(now + MAX_TIMEOUT, |_| true);
        assert!(affinities.by_client.is_empty());
    }
}
