//! Which endpoints of a service the clients of one node may use, as kube-proxy would tell.
//!
//! The rules are those of `CategorizeEndpoints` and `topologyModeFromHints` in Kubernetes 1.36
//! (`pkg/proxy/topology.go`), for each address family by itself, as there is a kube-proxy for each:
//!
//! - Ready endpoints; where there is none, those that still serve while their pods terminate (KEP-1669).
//! - `internalTrafficPolicy: Local`: those of the client's node and no others (KEP-2086). Hints do not
//!   count then.
//! - Otherwise the hints of the endpoints: all ready ones have a hint for nodes, and one for this node,
//!   so those; else the same for zones; else all. Who wrote the hints, and whether the service says
//!   `trafficDistribution`, is not asked (KEP-4444, KEP-3015).
//!
//! A hint is a preference and `Local` is a promise: the first falls back to all, the second to nobody.

use std::fmt;

/// `spec.internalTrafficPolicy` of a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum InternalTraffic {
    /// Endpoints of every node.
    #[default]
    Cluster,
    /// Those of the client's node.
    Local,
}

/// Which endpoints of a port are meant, from where this node is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// All of them.
    #[default]
    All,
    /// Those that are hinted for this node's zone.
    SameZone,
    /// Those that are hinted for this node.
    SameNode,
    /// Those of this node, and no others.
    Local,
}

impl Scope {
    /// The word that `services` shows.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::SameZone => "same-zone",
            Self::SameNode => "same-node",
            Self::Local => "local",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether an endpoint takes connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It does.
    Ready,
    /// It does while its pod terminates.
    Leaving,
    /// It does not.
    Unready,
}

/// What is asked of an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Whether it takes connections.
    pub state: State,
    /// The node it is on.
    pub node: Option<&'a str>,
    /// `hints.forNodes`.
    pub for_nodes: &'a [String],
    /// `hints.forZones`.
    pub for_zones: &'a [String],
}

/// Where the clients are.
#[derive(Clone, Copy, Debug)]
pub struct Here<'a> {
    /// Their node.
    pub node: &'a str,
    /// Its label `topology.kubernetes.io/zone`.
    pub zone: Option<&'a str>,
}

/// Those that take connections, wherever clients are: ready ones, or else those that are leaving.
pub fn in_service(endpoints: &[Facts<'_>]) -> Vec<usize> {
    ready_or_leaving(endpoints, |_| true)
}

/// Those that clients at `here` may use, of one family's, and by which rule.
pub fn in_reach(
    endpoints: &[Facts<'_>],
    here: Here<'_>,
    traffic: InternalTraffic,
) -> (Scope, Vec<usize>) {
    if traffic == InternalTraffic::Local {
        return (Scope::Local, ready_or_leaving(endpoints, |one| one.node == Some(here.node)));
    }
    let ready = || endpoints.iter().filter(|one| one.state == State::Ready);
    let is_hinted = |hints: for<'a> fn(&Facts<'a>) -> &'a [String], name: &str| {
        ready().all(|one| !hints(one).is_empty())
            && ready().any(|one| hints(one).iter().any(|hint| hint == name))
    };
    let hinted = |hints: for<'a> fn(&Facts<'a>) -> &'a [String], name: &str| {
        positions(endpoints, |one| {
            one.state == State::Ready && hints(one).iter().any(|hint| hint == name)
        })
    };
    if is_hinted(|one| one.for_nodes, here.node) {
        return (Scope::SameNode, hinted(|one| one.for_nodes, here.node));
    }
    match here.zone {
        Some(zone) if is_hinted(|one| one.for_zones, zone) => {
            (Scope::SameZone, hinted(|one| one.for_zones, zone))
        }
        _ => (Scope::All, in_service(endpoints)),
    }
}

fn ready_or_leaving(endpoints: &[Facts<'_>], is_meant: impl Fn(&Facts<'_>) -> bool) -> Vec<usize> {
    let of = |state| positions(endpoints, |one| one.state == state && is_meant(one));
    let ready = of(State::Ready);
    if ready.is_empty() { of(State::Leaving) } else { ready }
}

fn positions(endpoints: &[Facts<'_>], keep: impl Fn(&Facts<'_>) -> bool) -> Vec<usize> {
    endpoints.iter().enumerate().filter(|(_, one)| keep(one)).map(|(index, _)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Here<'_> = Here { node: "a", zone: Some("z1") };

    /// The endpoints of a test: state, node, hints for nodes, hints for zones.
    type Row = (State, &'static str, &'static [&'static str], &'static [&'static str]);

    fn ask(rows: &[Row], here: Here<'_>, traffic: InternalTraffic) -> (Scope, Vec<usize>) {
        let owned = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let hints: Vec<_> =
            rows.iter().map(|(_, _, nodes, zones)| (owned(nodes), owned(zones))).collect();
        let facts: Vec<_> = rows
            .iter()
            .zip(&hints)
            .map(|((state, node, ..), (for_nodes, for_zones))| Facts {
                state: *state,
                node: Some(*node),
                for_nodes,
                for_zones,
            })
            .collect();
        in_reach(&facts, here, traffic)
    }

    fn cluster(rows: &[Row]) -> (Scope, Vec<usize>) {
        ask(rows, HERE, InternalTraffic::Cluster)
    }

    use State::{Leaving, Ready, Unready};

    #[test]
    fn without_a_word_all_ready_ones_are_meant_or_else_those_that_leave() {
        let rows =
            [(Ready, "a", &[][..], &[][..]), (Leaving, "a", &[], &[]), (Ready, "b", &[], &[])];
        assert_eq!(cluster(&rows), (Scope::All, vec![0, 2]));
        let rows = [(Unready, "a", &[][..], &[][..]), (Leaving, "b", &[], &[])];
        assert_eq!(cluster(&rows), (Scope::All, vec![1]));
        assert_eq!(cluster(&[]), (Scope::All, vec![]));
    }

    #[test]
    fn local_means_this_node_or_nobody() {
        let local = |rows: &[Row]| ask(rows, HERE, InternalTraffic::Local);
        let rows =
            [(Ready, "a", &[][..], &[][..]), (Ready, "b", &[], &[]), (Leaving, "a", &[], &[])];
        assert_eq!(local(&rows), (Scope::Local, vec![0]));
        assert_eq!(local(&rows[1..]), (Scope::Local, vec![1]), "the one here that is leaving");
        assert_eq!(local(&rows[1..2]), (Scope::Local, vec![]));
        let hinted = [(Ready, "b", &["a"][..], &["z1"][..]), (Ready, "a", &["b"], &["z2"])];
        assert_eq!(local(&hinted), (Scope::Local, vec![1]), "hints do not count");
    }

    #[test]
    fn endpoint_of_no_node_is_not_here() {
        let nowhere = Facts { state: Ready, node: None, for_nodes: &[], for_zones: &[] };
        let found = in_reach(&[nowhere], HERE, InternalTraffic::Local);
        assert_eq!(found, (Scope::Local, vec![]));
    }

    #[test]
    fn hints_are_followed_where_all_have_one_and_one_is_for_here() {
        let zones = [(Ready, "a", &[][..], &["z1"][..]), (Ready, "b", &[], &["z2"])];
        assert_eq!(cluster(&zones), (Scope::SameZone, vec![0]));
        let both = [(Ready, "c", &["a", "c"][..], &["z2"][..]), (Ready, "b", &["b"], &["z1"])];
        assert_eq!(cluster(&both), (Scope::SameNode, vec![0]), "the node goes before the zone");
        let one_node_hint_missing = [both[0], (Ready, "b", &[], &["z1"])];
        assert_eq!(cluster(&one_node_hint_missing), (Scope::SameZone, vec![1]));
        let none_for_this_node =
            [(Ready, "c", &["c"][..], &["z1"][..]), (Ready, "b", &["b"], &["z2"])];
        assert_eq!(cluster(&none_for_this_node), (Scope::SameZone, vec![0]));
        let leaving_without = [zones[0], (Leaving, "b", &[], &[])];
        assert_eq!(cluster(&leaving_without), (Scope::SameZone, vec![0]), "only ready ones count");
    }

    #[test]
    fn where_hints_help_nobody_all_are_meant() {
        let hinted = [(Ready, "a", &[][..], &["z2"][..]), (Ready, "b", &[], &["z3"])];
        assert_eq!(cluster(&hinted), (Scope::All, vec![0, 1]), "none for this zone");
        let one_missing = [(Ready, "a", &[][..], &["z1"][..]), (Ready, "b", &[], &[])];
        assert_eq!(cluster(&one_missing), (Scope::All, vec![0, 1]), "not all have one");
        let here = Here { zone: None, ..HERE };
        let no_zone = ask(&hinted, here, InternalTraffic::Cluster);
        assert_eq!(no_zone, (Scope::All, vec![0, 1]), "this node has no zone");
        let unready = [(Unready, "a", &[][..], &["z1"][..]), (Leaving, "b", &[], &["z2"])];
        assert_eq!(cluster(&unready), (Scope::All, vec![1]), "none is ready");
    }

    /// Every set of three endpoints: what must hold whatever the rules in detail.
    #[test]
    fn whoever_takes_connections_is_never_out_of_reach_but_for_local() {
        let states = [Ready, Leaving, Unready];
        let hints: [&[&str]; 3] = [&[], &["a", "z1"], &["b", "z2"]];
        let mut kinds = Vec::new();
        for state in states {
            for node in ["a", "b"] {
                for nodes in hints {
                    for zones in hints {
                        kinds.push((state, node, nodes, zones));
                    }
                }
            }
        }
        let one = |row: &Row| (row.0 == Ready, row.0 == Leaving, row.1 == "a");
        for first in &kinds {
            for second in &kinds {
                for third in &kinds {
                    let rows = [*first, *second, *third];
                    let any_ready = rows.iter().any(|row| one(row).0);
                    let any = any_ready || rows.iter().any(|row| one(row).1);
                    let (scope, found) = cluster(&rows);
                    assert_eq!(found.is_empty(), !any, "{rows:?}");
                    assert!(found.iter().all(|i| one(&rows[*i]).0 || !any_ready), "{rows:?}");
                    assert_ne!(scope, Scope::Local);
                    let (scope, local) = ask(&rows, HERE, InternalTraffic::Local);
                    assert_eq!(scope, Scope::Local);
                    assert!(local.iter().all(|i| one(&rows[*i]).2), "{rows:?}");
                    let any_here = rows.iter().any(|row| one(row).2 && row.0 != Unready);
                    assert_eq!(local.is_empty(), !any_here, "{rows:?}");
                }
            }
        }
    }
}
