//! Ends direct connections that are no longer allowed, and tries again where that fails.
//!
//! Guarantees: a connection counts as ended when one of its ends is gone or was destroyed, and every end that
//! can be reached was. Who forgets it when it is over is the kernel's word (`connections`), and not this.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::addr::canonical;
use mesh_core::authorize::AuthorizeRefusal;
use mesh_core::backoff::Backoff;
use mesh_core::stage::Stage;
use tracing::{info, warn};

use crate::capture::{DirectFacts, PodTag};
use crate::net::{Ends, SockDiag};
use crate::node::{LocalPod, Node};

/// Pauses between attempts: descriptors may be short for a moment, and some kernels never can.
const RETRY: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// How it stands with a connection.
#[derive(Debug)]
pub(super) enum Fate {
    /// It may go on.
    Allowed,
    /// It may not, and has not been ended yet.
    Condemned(Condemned),
    /// This agent has ended it.
    Ended(AuthorizeRefusal),
}

/// A connection that is still to be ended.
#[derive(Debug)]
pub(super) struct Condemned {
    refusal: AuthorizeRefusal,
    /// The client's and the server's, as far as an attempt has found them: at the next one the node may know
    /// them no more, or only then.
    pods: [Option<Arc<LocalPod>>; 2],
    backoff: Backoff,
}

impl Fate {
    /// Why it has been, or is to be, ended.
    pub(super) fn refusal(&self) -> Option<AuthorizeRefusal> {
        match self {
            Self::Allowed => None,
            Self::Condemned(condemned) => Some(condemned.refusal),
            Self::Ended(refusal) => Some(*refusal),
        }
    }

    /// Condemns the connection, and ends it.
    pub(super) fn refuse(&mut self, node: &Node, facts: &DirectFacts, refusal: AuthorizeRefusal) {
        info!(
            client = %facts.src,
            to = %facts.to,
            reason = refusal.reason(),
            stage = Stage::Authorize.as_str(),
            "a direct connection is no longer allowed"
        );
        *self = Self::Condemned(Condemned::new(refusal));
        self.end(node, facts);
    }

    /// Ends the connection if it is still to be ended, and an attempt is due.
    pub(super) fn end(&mut self, node: &Node, facts: &DirectFacts) {
        self.attempt(Instant::now(), |condemned| {
            condemned.find_pods(node, facts);
            let destroyed = condemned.destroy(facts);
            if let Err(error) = &destroyed
                && condemned.backoff.failures() == 0
            {
                let (client, to) = (facts.src, facts.to);
                warn!(%error, %client, %to, stage = "authorize", "a direct connection is not ended yet");
            }
            destroyed
        });
    }

    fn attempt(&mut self, now: Instant, destroy: impl FnOnce(&mut Condemned) -> io::Result<()>) {
        let Self::Condemned(condemned) = self else { return };
        if condemned.backoff.wait(now).is_some() {
            return;
        }
        match destroy(condemned) {
            Ok(()) => *self = Self::Ended(condemned.refusal),
            Err(_told) => condemned.backoff.failed(now, |n| fastrand::u32(..n)),
        }
    }
}

impl Condemned {
    fn new(refusal: AuthorizeRefusal) -> Self {
        Self { refusal, pods: [None, None], backoff: Backoff::new(RETRY, RETRY_MAX) }
    }

    /// Looks for the pods that no attempt has found yet.
    fn find_pods(&mut self, node: &Node, facts: &DirectFacts) {
        let pods = node.pods.load();
        let [client, server] = &mut self.pods;
        if client.is_none() {
            *client = pods.values().find(|pod| pod.netns.cookie() == facts.netns).cloned();
        }
        if server.is_none() {
            *server = pods.values().find(|pod| PodTag::of(&pod.uid) == facts.server).cloned();
        }
    }

    /// Ends both ends. Each tells the other with a reset, so one would do, were it not that somebody
    /// between them may drop it.
    fn destroy(&self, facts: &DirectFacts) -> io::Result<()> {
        let (src, to) = (canonical(facts.src), canonical(facts.to.0));
        let [client, server] = &self.pods;
        // The server first: its end has to be found by its addresses, while it is there.
        let ends = [
            (server, Ends { local: to, remote: src }, None),
            (client, Ends { local: src, remote: to }, Some(facts.cookie)),
        ];
        let tried = ends.into_iter().filter_map(|(pod, ends, cookie)| {
            let destroyed = pod.as_ref()?.netns.run(|| {
                let diag = SockDiag::open()?;
                match diag.look(ends, cookie)? {
                    Some(found) => diag.destroy(ends, found.cookie).map(|_was_there| true),
                    // A cookie is that socket's for ever. Addresses are not: the node may have given the
                    // connection another source port, under which its server's end lives on.
                    None => Ok(cookie.is_some()),
                }
            });
            Some(destroyed.and_then(|done| done))
        });
        came_of(tried)
    }
}

/// What an attempt comes to: of each end that could be reached, whether the connection is over, as far as that
/// one shows.
fn came_of(ends: impl IntoIterator<Item = io::Result<bool>>) -> io::Result<()> {
    // An iterator that is reduced is read to its end: the other end is destroyed also when one cannot be.
    match ends.into_iter().reduce(|one, other| Ok(one? | other?)) {
        Some(Ok(true)) => Ok(()),
        Some(Err(error)) => Err(error),
        Some(Ok(false)) | None => Err(io::Error::other("none of its ends is found")),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use mesh_core::addr::{EndpointAddr, OrigDst};

    use super::*;

    #[test]
    fn connection_that_could_not_be_ended_is_ended_by_a_later_attempt() {
        let refusal = AuthorizeRefusal::UnknownWorkload;
        let mut fate = Fate::Condemned(Condemned::new(refusal));
        let mut attempts = 0;
        let mut attempt = |fate: &mut Fate, now, result: io::Result<()>| {
            fate.attempt(now, |_condemned| {
                attempts += 1;
                result
            });
            attempts
        };
        let no_descriptor = || Err(io::Error::from_raw_os_error(libc::EMFILE));
        let now = Instant::now();
        assert_eq!(attempt(&mut fate, now, no_descriptor()), 1);
        assert_eq!(attempt(&mut fate, now, no_descriptor()), 1, "not at once");
        assert_eq!(fate.refusal(), Some(refusal));
        assert_eq!(attempt(&mut fate, now + RETRY, no_descriptor()), 2);
        assert_eq!(attempt(&mut fate, now + RETRY_MAX, Ok(())), 3);
        assert!(matches!(fate, Fate::Ended(ended) if ended == refusal));
        assert_eq!(attempt(&mut fate, now + 3 * RETRY_MAX, Ok(())), 3, "it has ended");
    }

    #[test]
    fn connection_whose_pods_nobody_knows_is_not_taken_for_ended() {
        let pod = PodTag::of("gone");
        let [src, dst, to] = ["10.0.1.5:40000", "10.96.0.10:80", "10.0.1.6:8080"]
            .map(|addr| addr.parse::<SocketAddr>().unwrap());
        let facts = DirectFacts {
            cookie: 1,
            netns: 1,
            client: pod,
            server: pod,
            src,
            orig_dst: OrigDst(dst),
            to: EndpointAddr(to),
            age: Duration::ZERO,
        };
        let refusal = AuthorizeRefusal::UnknownWorkload;
        let mut fate = Fate::Condemned(Condemned::new(refusal));
        let now = Instant::now();
        fate.attempt(now, |condemned| condemned.destroy(&facts));
        assert_eq!(fate.refusal(), Some(refusal), "what it is recorded with when it ends");
        let Fate::Condemned(condemned) = &fate else { panic!("{fate:?}") };
        assert!(condemned.backoff.wait(now).is_some(), "it is tried again");
    }

    #[test]
    fn connection_is_ended_when_one_end_shows_it_and_the_other_could_be_reached() {
        let failed = || Err(io::Error::from_raw_os_error(libc::EMFILE));
        assert!(came_of([Ok(false), Ok(true)]).is_ok(), "the node has changed its source port");
        assert!(came_of([Ok(true)]).is_ok(), "the other pod is not known");
        assert!(came_of([Ok(false)]).is_err(), "looked for by addresses alone");
        for ends in [[failed(), Ok(true)], [Ok(true), failed()]] {
            assert_eq!(came_of(ends).unwrap_err().raw_os_error(), Some(libc::EMFILE));
        }
    }
}
