//! Drain: how an agent ends.
//!
//! ```text
//! a successor waits   ─► it takes over ─┐
//! nobody is to come   ─► pods let go   ─┼─► peers go elsewhere ─► what is opening opens ─► what is open ends
//! neither             ──────────────────┘
//! ```
//!
//! # Guarantees
//!
//! - *Nothing accepted is refused* for the drain, until it is established or [`OPENING`] is over.
//! - *No gap.* The programs stay: what they capture is a successor's, and refused until there is one. Only where
//!   none is to come they go too.
//! - *Bounded* by `--drain`.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::snapshot::Snapshot;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{info, warn};

use super::turn::Turn;
use super::{Agent, uninstall};
use crate::discovery::enrol::REDIRECTION;
use crate::node::{Node, Worker};

/// How long an agent that ends waits for what its pods are connecting: longer than a reachable node takes, also one
/// that has to be asked about.
const OPENING: Duration = Duration::from_secs(3);

/// How long the last words of QUIC connections may take to leave. The kernel tells the peers of lanes.
const TOLD: Duration = Duration::from_millis(50);

/// How long the last agent of a node waits, from when it is told to end, for its pods to say nothing of the mesh any
/// more.
const TAKE_BACK: Duration = Duration::from_secs(5);

impl Agent {
    /// Takes no new connection, lets those that are open end, and leaves the programs in the kernel, unless
    /// there is to be no agent any more.
    pub(super) async fn end(mut self) {
        let told = Instant::now();
        let is_last = match &self.owner {
            Some(owner) => owner.is_gone().await,
            None => false,
        };
        // A successor holds pods back by itself.
        drop(self.unknown.take());
        if is_last {
            self.let_all_go().await;
        } else if let Some(turn) = self.turn.take() {
            self.hand_over(turn).await;
        }
        // Peers whose flows it would deliver by what it knew have somebody else to go to.
        self.doors.shut();
        self.dismiss.send_replace(true);
        let limit = self.options.max_connections.get();
        let open = || limit.saturating_sub(self.node.connections.available_permits());
        let within = self.options.drain;
        info!(open = open(), within_s = within.as_secs(), is_last, "draining");
        // Whoever has been accepted has seen its connection succeed: nothing is refused for the drain until it is
        // established.
        // Not where a successor tells them by now.
        if self.heart.is_some() {
            self.node.capture.carries(Duration::ZERO);
        }
        let mut pods = Box::pin(self.pods.close());
        let have_ended = tokio::select! {
            () = &mut pods => true,
            _ = timeout(OPENING, self.node.opening.none()) => false,
            () = keep_knowing(&self.node, &mut self.snapshots) => false,
        };
        self.drain.send_replace(true);
        let tunnels = ended(self.contexts.clone(), self.tunnels);
        let all = async move {
            if have_ended {
                tunnels.await;
            } else {
                tokio::join!(pods, tunnels);
            }
        };
        if timeout(within, all).await.is_err() {
            warn!(cut = open(), "the time to drain is over");
            let cut: usize = self.contexts.iter().map(|context| context.tunnels.cut()).sum();
            if cut > 0 {
                sleep(TOLD).await;
            }
        }
        if let Some(taken_back) = self.taken_back.as_mut().filter(|_| is_last)
            && timeout_at(told + TAKE_BACK, taken_back.wait_for(|is_done| *is_done)).await.is_err()
        {
            warn!("annotations {REDIRECTION} stay on pods: the API did not take them back in time");
        }
        self.control.shutdown().await;
        self.shared.shutdown().await;
        if let Some(connections) = &self.connections {
            connections.let_go();
        }
        drop(self.workers);
        drop(self.heart);
        if is_last {
            uninstall::remove(&self.options.bpffs, &self.options.admin.socket);
        }
        // Only now, if nobody has waited for it: until the last of this is done somebody else would be too early.
        drop(self.turn);
        self.node.telemetry.flush();
        info!("ended");
    }

    /// What pods open from here on is theirs again; what they have open goes on meanwhile.
    async fn let_all_go(&mut self) {
        self.node.capture.let_all_go();
        let (node, domain) = (self.options.node.as_str(), self.options.trust_domain.clone());
        self.pods.follow(&Snapshot::empty(node.into(), domain), || false).await;
    }

    /// Lets a successor, if one waits, have what only one of them can.
    async fn hand_over(&mut self, turn: Turn) {
        // Two would tell the programs what only one of them means.
        drop(self.heart.take());
        self.shared.shutdown().await;
        if let Some(connections) = self.connections.take() {
            connections.let_go();
        }
        if let Err(error) = self.doors.steering.make_room() {
            warn!(%error, stage = "tunnel", "QUIC connections may be reset by the next agent");
        }
        tokio::select! {
            () = turn.hand_over(&self.options.admin.socket) => {}
            () = keep_knowing(&self.node, &mut self.snapshots) => {}
        }
    }
}

/// Returns when every tunnel has ended.
async fn ended(contexts: Vec<Arc<Worker>>, mut listeners: JoinSet<()>) {
    // Together: what one connection still needs must not keep the idle tunnels of others.
    let drained = contexts.iter().map(|context| {
        let tunnels = Arc::clone(&context.tunnels);
        async move { tunnels.drain().await }
    });
    let mut drains: JoinSet<()> = drained.collect();
    while drains.join_next().await.is_some() {}
    while listeners.join_next().await.is_some() {}
}

/// Brings connections that wait for it what is read of pods of other nodes, and nothing to the programs: for an agent
/// that takes in no state any more. For ever.
async fn keep_knowing(node: &Node, snapshots: &mut watch::Receiver<Arc<Snapshot>>) {
    while snapshots.changed().await.is_ok() {
        node.known.store(Arc::clone(&snapshots.borrow_and_update()));
    }
    std::future::pending().await
}
