//! What the API tells of the cluster, as the fuzzer writes it: any user may have written what is in it.

use std::collections::HashSet;
use std::sync::Arc;

use kube::core::WatchEvent;
use mesh_core::spiffe::TrustDomain;
use time::OffsetDateTime;
use tokio::time::Instant;

use super::KINDS;
use super::feed::{Followed, List, News, What, happened, taken};
use super::state::State;
use crate::discovery::kube::{EndpointSlice, Namespace, Node, ObjectMeta, Pod, Service};
use crate::discovery::objects::{Kind, Object};
use crate::discovery::translate::{Context, NetnsFrom};
use crate::discovery::{Outcome, Outcomes};

/// Where the agent is.
const HOME: &str = "malla-system";
/// Of lines: what is found in many is found in few.
const LINES: usize = 64;

/// Any lines, each an event or a list behind a letter for its kind, are news or nothing. Whatever they tell: a snapshot
/// has of this node's pods only those that are known, what is written goes to an object's own place, one thing
/// at a time; and what was written is taken back at the end.
pub fn feed(input: &[u8]) {
    let Ok(trust_domain) = TrustDomain::new("cluster.local") else { return };
    let (node, netns) = (Arc::from("a"), NetnsFrom::Processes);
    let mut state = State::new(Context {
        node,
        trust_domain,
        tunnel_port: 15019,
        netns,
        pod_cidrs: Vec::new(),
    });
    state.home = Some(HOME.into());
    let now = Instant::now();
    for kind in KINDS {
        // An agent's own namespace is there when it starts.
        let all = if kind == Kind::Namespace { vec![home()] } else { Vec::new() };
        state.take(News { kind, what: What::All(all) }, now);
    }
    let mut under_way = HashSet::new();
    for line in input.split(|byte| *byte == b'\n').take(LINES) {
        let Some((kind, json)) = line.split_first() else { continue };
        let news = match kind {
            b'n' => news::<Namespace>(json),
            b'o' => news::<Node>(json),
            b'p' => news::<Pod>(json),
            b's' => news::<Service>(json),
            b'e' => news::<EndpointSlice>(json),
            // What was written has arrived.
            b'w' => {
                under_way.drain().for_each(|key| state.written(key, Ok(()), now));
                continue;
            }
            _ => continue,
        };
        news.into_iter().for_each(|news| state.take(news, now));
        follow(&mut state, &mut under_way, now);
    }
    state.is_gone = true;
    // What comes of it may be to be written again, once.
    for _ in 0..3 {
        follow(&mut state, &mut under_way, now);
        under_way.drain().for_each(|key| state.written(key, Ok(()), now));
    }
    follow(&mut state, &mut under_way, now);
    assert!(under_way.is_empty() && state.is_taken_back(), "not taken back");
}

fn home() -> Object {
    let metadata = ObjectMeta { name: Some(HOME.into()), ..ObjectMeta::default() };
    Object::Namespace(Arc::new(Namespace { metadata }))
}

fn follow(state: &mut State, under_way: &mut HashSet<String>, now: Instant) {
    state.snapshot_if_changed();
    state.problems_if_changed();
    let local = state.snapshot.workloads().filter(|pod| pod.node == state.snapshot.node);
    let outcomes: Outcomes = local
        .enumerate()
        .map(|(nth, pod)| {
            let failing = || Outcome::Failing("no room".into());
            let outcome = if nth % 2 == 0 { Outcome::Enrolled } else { failing() };
            (Arc::clone(&pod.uid), outcome)
        })
        .collect();
    state.is_reportable = true;
    for write in state.reports(&outcomes, now, OffsetDateTime::UNIX_EPOCH) {
        let parts: Vec<_> = write.path.split('/').collect();
        let is_plain = |part: &&str| {
            part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.~%".contains(&byte))
        };
        assert!(parts.iter().all(is_plain), "{}", write.path);
        assert!(
            matches!(&parts[..], ["", "api", "v1", "namespaces", _, "pods", _])
                || matches!(&parts[..], ["", "api", "v1", "namespaces", _, "events"]),
            "{}",
            write.path
        );
        let key = write.key.clone();
        assert!(under_way.insert(write.key), "two at a time: {key}");
    }
}

fn news<T: Followed>(json: &[u8]) -> Vec<News> {
    let what = match serde_json::from_slice::<WatchEvent<T>>(json) {
        Ok(event) => happened(event).ok().map(|(_version, what)| what),
        Err(_no_event) => serde_json::from_slice::<List<T>>(json)
            .ok()
            .map(|list| What::All(list.items.into_iter().map(|item| taken(item).0).collect())),
    };
    what.map(|what| News { kind: T::KIND, what }).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_the_fuzzer_hold() {
        crate::fuzzing::replay("feed", feed);
    }

    #[test]
    fn what_the_fuzzer_begins_with_is_news() {
        let seed = include_bytes!("../../../fuzz/seeds/feed/enrolled");
        let lines: Vec<_> =
            seed.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
        let kinds = lines.iter().map(|line| match line[0] {
            b'n' => news::<Namespace>(&line[1..]).len(),
            b'p' => news::<Pod>(&line[1..]).len(),
            _ => 1,
        });
        assert!(lines.len() > 2 && kinds.sum::<usize>() == lines.len());
    }
}
