//! Ends direct connections that are no longer allowed, and tries again where that fails.

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
    /// The client's and the server's, as far as they were known then: when it comes to another attempt,
    /// the node may know them no more.
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
        let pods = node.pods.load();
        let client = pods.values().find(|pod| pod.netns.cookie() == facts.netns);
        let server = pods.values().find(|pod| PodTag::of(&pod.uid) == facts.server);
        let pods = [client.cloned(), server.cloned()];
        let backoff = Backoff::new(RETRY, RETRY_MAX);
        *self = Self::Condemned(Condemned { refusal, pods, backoff });
        self.end(facts);
    }

    /// Ends the connection if it is still to be ended, and an attempt is due.
    pub(super) fn end(&mut self, facts: &DirectFacts) {
        self.attempt(Instant::now(), |condemned| {
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

    fn attempt(&mut self, now: Instant, destroy: impl FnOnce(&Condemned) -> io::Result<()>) {
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
        let mut failed = Ok(());
        for (pod, ends, cookie) in ends {
            let Some(pod) = pod else { continue };
            let destroyed = pod.netns.run(|| {
                let diag = SockDiag::open()?;
                match diag.look(ends, cookie)? {
                    Some(found) => diag.destroy(ends, found.cookie).map(drop),
                    None => Ok(()),
                }
            });
            failed = destroyed.and_then(|done| done).and(failed);
        }
        failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_that_could_not_be_ended_is_ended_by_a_later_attempt() {
        let refusal = AuthorizeRefusal::UnknownWorkload;
        let backoff = Backoff::new(RETRY, RETRY_MAX);
        let mut fate = Fate::Condemned(Condemned { refusal, pods: [None, None], backoff });
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
}
