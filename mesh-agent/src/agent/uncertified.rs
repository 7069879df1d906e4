//! Pods that wait for their certificates before they are enrolled.
//!
//! Without one a pod would be refused everywhere. After [`LIMIT`] they are enrolled all the same, which
//! fails closed; while an agent before this one goes on carrying, not before that ends. A newer snapshot
//! ends the wait for this time, since there may be pods in it that must not wait; each pod's own time goes
//! on.

use std::collections::HashMap;
use std::time::Duration;

use mesh_core::snapshot::WorkloadUid;
use tokio::time::{Instant, sleep};

/// How long a pod waits.
const LIMIT: Duration = Duration::from_secs(2);
/// Between looks.
const LOOK: Duration = Duration::from_millis(5);

/// Who waits, and since when.
#[derive(Debug, Default)]
pub(super) struct Uncertified {
    waiting: HashMap<WorkloadUid, Instant>,
    covered: Option<Instant>,
}

/// Why a pod waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lacks {
    /// It has a certificate.
    Nothing,
    /// None has come yet.
    Certificate,
    /// The signer has said no: there may be one in a moment, and there may never be.
    Approval,
}

impl Uncertified {
    /// Of an agent whose predecessor carries until `covered`, if there is one.
    pub(super) fn new(covered: Option<Instant>) -> Self {
        Self { waiting: HashMap::new(), covered }
    }

    /// Waits until none of the pods in `new` lacks a certificate, or has waited long enough, or
    /// something newer is there.
    pub(super) async fn wait(
        &mut self,
        new: impl Iterator<Item = WorkloadUid>,
        lacks: impl Fn(&WorkloadUid) -> Lacks,
        is_superseded: impl Fn() -> bool,
    ) {
        let begun = std::mem::take(&mut self.waiting);
        let now = Instant::now();
        self.waiting = new
            .map(|uid| {
                let since = begun.get(&uid).copied().unwrap_or(now);
                (uid, since)
            })
            .collect();
        loop {
            let now = Instant::now();
            let is_covered = self.covered.is_some_and(|until| now < until);
            self.waiting.retain(|uid, since| match lacks(uid) {
                Lacks::Nothing => false,
                Lacks::Certificate => is_covered || now < *since + LIMIT,
                Lacks::Approval => now < *since + LIMIT,
            });
            if self.waiting.is_empty() || is_superseded() {
                return;
            }
            sleep(LOOK).await;
        }
    }

    /// Nobody else carries any more.
    pub(super) fn lead(&mut self) {
        self.covered = None;
    }

    /// Whether nothing may be taken over yet from an agent that carries.
    pub(super) fn keeps_waiting(&self) -> bool {
        !self.waiting.is_empty() && self.covered.is_some_and(|until| Instant::now() < until)
    }

    /// Whether the pod still waits.
    pub(super) fn has(&self, uid: &WorkloadUid) -> bool {
        self.waiting.contains_key(uid)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn uid() -> WorkloadUid {
        "web".into()
    }

    #[tokio::test(start_paused = true)]
    async fn pod_waits_for_its_certificate_and_not_for_ever() {
        let mut waiting = Uncertified::default();
        let began = Instant::now();
        let lacks = |_: &WorkloadUid| match began.elapsed() < Duration::from_millis(300) {
            true => Lacks::Certificate,
            false => Lacks::Nothing,
        };
        waiting.wait([uid()].into_iter(), lacks, || false).await;
        assert!(!waiting.has(&uid()) && began.elapsed() < Duration::from_millis(310));
        let began = Instant::now();
        waiting.wait([uid()].into_iter(), |_| Lacks::Certificate, || false).await;
        assert!(!waiting.has(&uid()), "enrolled without one");
        assert!((LIMIT..LIMIT + LOOK).contains(&began.elapsed()));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_taken_over_without_one_while_an_agent_before_carries() {
        let began = Instant::now();
        let covered = began + LIMIT * 4;
        let mut waiting = Uncertified::new(Some(covered));
        waiting.wait([uid()].into_iter(), |_| Lacks::Certificate, || false).await;
        assert!((LIMIT * 4..LIMIT * 4 + LOOK).contains(&began.elapsed()));
        assert!(!waiting.keeps_waiting());
        // Later ones wait as ever.
        let began = Instant::now();
        waiting.wait([uid()].into_iter(), |_| Lacks::Certificate, || false).await;
        assert!((LIMIT..LIMIT + LOOK).contains(&began.elapsed()));
    }

    #[tokio::test(start_paused = true)]
    async fn whom_the_signer_denies_holds_no_hand_over_up() {
        let began = Instant::now();
        let mut waiting = Uncertified::new(Some(began + LIMIT * 4));
        waiting.wait([uid()].into_iter(), |_| Lacks::Approval, || true).await;
        assert!(waiting.keeps_waiting(), "a newer snapshot is there, and nothing is taken over");
        waiting.wait([uid()].into_iter(), |_| Lacks::Approval, || false).await;
        assert!((LIMIT..LIMIT + LOOK).contains(&began.elapsed()));
        assert!(!waiting.keeps_waiting());
    }

    #[tokio::test(start_paused = true)]
    async fn newer_snapshot_is_not_kept_waiting_and_takes_nobodys_time() {
        let mut waiting = Uncertified::default();
        let began = Instant::now();
        let looks = Cell::new(0);
        let superseded = || looks.replace(looks.get() + 1) >= 100;
        waiting.wait([uid()].into_iter(), |_| Lacks::Certificate, superseded).await;
        assert!(waiting.has(&uid()) && began.elapsed() < LIMIT / 2, "left to the next one");
        waiting.wait([uid()].into_iter(), |_| Lacks::Certificate, || false).await;
        assert!(!waiting.has(&uid()));
        assert!((LIMIT..LIMIT + 2 * LOOK).contains(&began.elapsed()), "its time went on");
    }
}
