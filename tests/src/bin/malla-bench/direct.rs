//! Whether connections went from pod to pod, by the counters of the kernel's programs.

use std::io::Read as _;
use std::net::{Shutdown, SocketAddr};

use anyhow::{Result, ensure};
use harness::{Agent, Pod, wait};

/// What the programs at `connect` have counted so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Ways {
    /// Connections sent straight to an endpoint of the same node.
    direct: f64,
    /// Connections sent to the agent.
    captured: f64,
    /// Packets handed from pod to pod, past the node.
    redirected: f64,
}

impl Ways {
    /// Reads the counters.
    ///
    /// # Errors
    ///
    /// Fails when the agent does not answer.
    pub(crate) fn so_far(agent: &Agent) -> Result<Self> {
        let metrics = agent.metrics()?;
        let events = |event| metrics.sum("mesh_capture_total", &[("event", event)]);
        Ok(Self {
            direct: events("direct_taken"),
            captured: events("captured"),
            redirected: events("redirected"),
        })
    }

    /// Checks that all of the `opened` connections since `before` went direct, and either
    /// `past_the_node` or all through it: what went another way is not what is measured.
    ///
    /// # Errors
    ///
    /// Fails when they did not.
    pub(crate) fn all_direct_since(
        self,
        before: Self,
        opened: u64,
        past_the_node: bool,
    ) -> Result<()> {
        let direct = self.direct - before.direct;
        let captured = self.captured - before.captured;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53 connections")]
        let opened = opened as f64;
        // The counters are statistics: a program that preempts another on its CPU may cost a count.
        ensure!(
            captured == 0.0 && direct >= opened * 0.99,
            "of {opened} connections or more {direct} went direct and {captured} to the agent",
        );
        let redirected = self.redirected - before.redirected;
        // Of every connection its SYN, the answer, an exchange and two ends.
        let is_as_named =
            if past_the_node { redirected >= 4.0 * direct } else { redirected == 0.0 };
        ensure!(is_as_named, "{redirected} packets of {direct} connections went past the node");
        Ok(())
    }
}

/// Connects `client` to each of `destinations` until the kernel does it by itself, so that a verdict
/// is there for every connection that follows.
///
/// # Errors
///
/// Fails when that takes too long, and with the last reason why a connection failed, if one did.
pub(crate) fn warm_up(agent: &Agent, client: &Pod, destinations: &[SocketAddr]) -> Result<()> {
    // One to each first: the agent decides about all of them meanwhile. What fails is tried again below.
    for destination in destinations {
        connect(client, *destination).ok();
    }
    for destination in destinations {
        let mut last = Ok(());
        let found = wait::until(wait::SOON, &format!("a direct way to {destination}"), || {
            let direct = goes_direct(agent, client, *destination);
            let is_direct = matches!(direct, Ok(true));
            last = direct.map(drop);
            is_direct
        });
        // The reason for the last failure says more than that it took too long.
        if found.is_err() {
            last?;
        }
        found?;
    }
    Ok(())
}

fn goes_direct(agent: &Agent, client: &Pod, destination: SocketAddr) -> Result<bool> {
    let before = Ways::so_far(agent)?;
    connect(client, destination)?;
    Ok(Ways::so_far(agent)?.direct > before.direct)
}

/// A connection that the server has accepted and ended: only those get a verdict.
fn connect(client: &Pod, destination: SocketAddr) -> Result<()> {
    let mut stream = client.connect(destination)?;
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: Ways = Ways { direct: 10.0, captured: 3.0, redirected: 5.0 };

    #[test]
    fn connections_that_all_went_direct_are_what_is_measured() {
        Ways { direct: 1010.0, ..BEFORE }.all_direct_since(BEFORE, 1000, false).unwrap();
        // A count in a hundred may be lost.
        Ways { direct: 1001.0, ..BEFORE }.all_direct_since(BEFORE, 1000, false).unwrap();
    }

    #[test]
    fn a_connection_through_the_agent_fails_the_run() {
        let now = Ways { direct: 1010.0, captured: 4.0, ..BEFORE };
        let error = now.all_direct_since(BEFORE, 1000, false);
        assert!(error.unwrap_err().to_string().contains("1 to the agent"));
    }

    #[test]
    fn connections_that_no_program_saw_fail_the_run() {
        assert!(Ways { direct: 900.0, ..BEFORE }.all_direct_since(BEFORE, 1000, false).is_err());
        assert!(BEFORE.all_direct_since(BEFORE, 1, false).is_err());
    }

    #[test]
    fn packets_past_the_node_are_all_or_none() {
        let through = Ways { direct: 1010.0, ..BEFORE };
        assert!(through.all_direct_since(BEFORE, 1000, true).is_err());
        let past = Ways { redirected: 10_005.0, ..through };
        past.all_direct_since(BEFORE, 1000, true).unwrap();
        assert!(past.all_direct_since(BEFORE, 1000, false).is_err());
    }
}
