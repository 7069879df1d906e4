//! Whether the agent of a destination lets a connection in, and how it is delivered.
//!
//! The caller is who its certificate says and nobody else. The address that the far agent reports
//! for the client decides nothing: it is shown to the application only if it is known to belong to
//! that very identity, so an agent cannot make its pods look like somebody else's.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::addr::EndpointAddr;
use crate::settings::Mode;
use crate::snapshot::{Snapshot, Workload};
use crate::spiffe::SpiffeId;

/// What is asked of the agent of a destination.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Where the connection is to be delivered.
    pub to: EndpointAddr,
    /// The client's address as the far agent, or the kernel, reports it.
    pub client: SocketAddr,
    /// How the request came here.
    pub via: Via<'a>,
}

/// How a request reached the destination's agent.
#[derive(Clone, Copy, Debug)]
pub enum Via<'a> {
    /// Over mutual TLS.
    Tunnel {
        /// From the client's verified certificate.
        caller: &'a SpiffeId,
        /// The workload whose certificate this side presented.
        served_as: &'a SpiffeId,
    },
    /// From an enrolled pod of this node, known by its network namespace.
    Local {
        /// That pod's identity.
        caller: &'a SpiffeId,
    },
    /// In plain text, caught in front of the pod.
    Plain,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Connect to the application.
    Deliver {
        /// The pod to deliver to.
        workload: Arc<Workload>,
        /// Client address that the application shall see; `None` is the pod's own.
        client: Option<SocketAddr>,
    },
    /// Refuse.
    Refuse(AuthorizeRefusal),
}

/// Why a connection is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AuthorizeRefusal {
    /// No pod of this node has the address.
    UnknownWorkload,
    /// The pod at the address is not the workload whose certificate the client accepted.
    WrongWorkload,
    /// Plain text, and the pod's mode is strict.
    PlaintextInStrict,
}

impl AuthorizeRefusal {
    /// The `reason` label.
    pub fn reason(self) -> &'static str {
        match self {
            Self::UnknownWorkload => "unknown_workload",
            Self::WrongWorkload => "wrong_workload",
            Self::PlaintextInStrict => "plaintext_in_strict",
        }
    }
}

/// Decides `request` from what this node knows.
///
/// A pod that is not enrolled any more is still delivered to: agents learn of a change at different
/// moments, and a caller that has not yet heard of it must not fail.
pub fn authorize(snapshot: &Snapshot, request: &Request<'_>) -> Verdict {
    let to = crate::addr::canonical(request.to.0);
    let local = snapshot.workload_at(to.ip()).filter(|workload| workload.node == snapshot.node);
    let Some(workload) = local else {
        return Verdict::Refuse(AuthorizeRefusal::UnknownWorkload);
    };
    let caller = match request.via {
        Via::Tunnel { caller, served_as } => {
            if workload.identity != *served_as {
                return Verdict::Refuse(AuthorizeRefusal::WrongWorkload);
            }
            Some(caller)
        }
        Via::Local { caller } => Some(caller),
        Via::Plain => {
            if workload.settings.mode == Mode::Strict {
                return Verdict::Refuse(AuthorizeRefusal::PlaintextInStrict);
            }
            None
        }
    };
    let client = shown_client(snapshot, workload, to, caller, request.client);
    Verdict::Deliver { workload: Arc::clone(workload), client }
}

/// The client address that the application is shown, if it may be and can be.
fn shown_client(
    snapshot: &Snapshot,
    workload: &Workload,
    to: SocketAddr,
    caller: Option<&SpiffeId>,
    client: SocketAddr,
) -> Option<SocketAddr> {
    let client = crate::addr::canonical(client);
    // A socket has one family, and from a pod to itself the pod's own address is already the truth.
    let possible = client.is_ipv4() == to.is_ipv4() && !workload.ips.contains(&client.ip());
    if !workload.settings.preserve_client_address || !possible {
        return None;
    }
    let proven = match (caller, snapshot.workload_at(client.ip())) {
        (Some(caller), Some(known)) => known.identity == *caller,
        (Some(_caller), None) => false,
        // In plain text the kernel saw the address itself.
        (None, _) => true,
    };
    proven.then_some(client)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{snapshot, workload};

    const TO: &str = "10.0.1.1:80";
    const CLIENT: &str = "10.0.2.1:40000";

    /// `server` on this node, `client` and `other` on another.
    fn world(change: impl FnOnce(&mut Workload)) -> (Snapshot, SpiffeId, SpiffeId, SpiffeId) {
        let mut server = Workload::clone(&workload("server", "node-1", &["10.0.1.1"]));
        change(&mut server);
        let client = workload("client", "node-2", &["10.0.2.1"]);
        let other = workload("other", "node-2", &["10.0.2.2"]);
        let ids = (server.identity.clone(), client.identity.clone(), other.identity.clone());
        (snapshot(vec![Arc::new(server), client, other], vec![], vec![]), ids.0, ids.1, ids.2)
    }

    fn ask(snapshot: &Snapshot, to: &str, via: Via<'_>) -> Verdict {
        let to = EndpointAddr(to.parse().unwrap());
        authorize(snapshot, &Request { to, client: CLIENT.parse().unwrap(), via })
    }

    fn client_of(verdict: Verdict) -> Option<SocketAddr> {
        match verdict {
            Verdict::Deliver { client, .. } => client,
            Verdict::Refuse(why) => panic!("{why:?}"),
        }
    }

    #[test]
    fn caller_with_its_own_address_is_delivered_with_it() {
        let (snapshot, server, client, _) = world(|_| {});
        let via = Via::Tunnel { caller: &client, served_as: &server };
        assert_eq!(client_of(ask(&snapshot, TO, via)), Some(CLIENT.parse().unwrap()));
        assert_eq!(
            client_of(ask(&snapshot, "[::ffff:10.0.1.1]:80", via)),
            Some(CLIENT.parse().unwrap())
        );
    }

    #[test]
    fn address_of_another_identity_is_never_shown() {
        let (snapshot, server, _, other) = world(|_| {});
        let via = Via::Tunnel { caller: &other, served_as: &server };
        assert_eq!(client_of(ask(&snapshot, TO, via)), None);
    }

    #[test]
    fn preserving_can_be_turned_off() {
        let (snapshot, _, client, _) = world(|w| w.settings.preserve_client_address = false);
        assert_eq!(client_of(ask(&snapshot, TO, Via::Local { caller: &client })), None);
        assert_eq!(client_of(ask(&snapshot, TO, Via::Plain)), None);
    }

    #[test]
    fn certificate_of_another_workload_does_not_open_this_one() {
        let (snapshot, _, client, other) = world(|_| {});
        let via = Via::Tunnel { caller: &client, served_as: &other };
        assert_eq!(ask(&snapshot, TO, via), Verdict::Refuse(AuthorizeRefusal::WrongWorkload));
    }

    #[test]
    fn pod_of_another_node_is_unknown_here() {
        let (snapshot, server, client, _) = world(|_| {});
        let via = Via::Tunnel { caller: &client, served_as: &server };
        for to in ["10.0.2.2:80", "203.0.113.1:80"] {
            assert_eq!(ask(&snapshot, to, via), Verdict::Refuse(AuthorizeRefusal::UnknownWorkload));
        }
    }

    #[test]
    fn plain_text_is_accepted_until_the_mode_is_strict() {
        let (snapshot, ..) = world(|_| {});
        assert_eq!(client_of(ask(&snapshot, TO, Via::Plain)), Some(CLIENT.parse().unwrap()));
        let (snapshot, server, client, _) = world(|w| w.settings.mode = Mode::Strict);
        assert_eq!(
            ask(&snapshot, TO, Via::Plain),
            Verdict::Refuse(AuthorizeRefusal::PlaintextInStrict)
        );
        let via = Via::Tunnel { caller: &client, served_as: &server };
        assert!(client_of(ask(&snapshot, TO, via)).is_some());
    }
}
