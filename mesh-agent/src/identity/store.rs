//! The certificates of this node's workloads: issued, renewed, looked up, dropped.
//!
//! ```text
//! wanted ──► maintain ──► Held (one immutable value) ──► certified, served: any thread, no lock
//!            one task      swapped whole
//! ```
//!
//! # Guarantees
//!
//! - Only what was [`wanted`](Identities::wanted) is issued.
//! - A certificate is replaced at about half its life, so an issuer may be away for the other half
//!   without anybody noticing; a failed renewal keeps the old certificate.
//! - An issuer that is slow for one identity delays no other.
//! - A certificate that our own bundle does not trust is not taken from an issuer: whoever replaced the root
//!   before the bundle is told, instead of every peer refusing us.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use mesh_core::spiffe::SpiffeId;
use rustls::sign::CertifiedKey;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::bundle::{BundleError, Root, TrustBundles};
use super::ca::{CaError, DirectoryCa, Issued};
use super::kubernetes::requests::SigningRequests;

mod keeper;
#[cfg(test)]
mod tests;

use keeper::{Keeper, LONGEST_WAIT};
pub use keeper::{renew_at, retry_after};

/// Who signs. An enum: the set is closed.
#[derive(Debug)]
#[non_exhaustive]
pub enum Issuer {
    /// A root in a directory of this machine.
    Directory(DirectoryCa),
    /// A signer, asked over the Kubernetes API.
    Kubernetes(Box<SigningRequests>),
}

impl Issuer {
    async fn issue(
        &self,
        id: &SpiffeId,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        match self {
            Self::Directory(ca) => ca.issue(id, lifetime, now),
            Self::Kubernetes(requests) => requests.issue(id, lifetime).await,
        }
    }
}

/// How long certificates live here.
#[derive(Clone, Copy, Debug)]
pub struct Lifetimes {
    /// Of a certificate. Default 24 h: what a stolen key is worth.
    pub lifetime: Duration,
    /// How long an identity is held after its last pod has left, so that the pod's last connections
    /// can still be made and renewed. Default 60 s, twice Kubernetes' grace period.
    pub linger: Duration,
}

impl Default for Lifetimes {
    fn default() -> Self {
        Self { lifetime: Duration::from_secs(86_400), linger: Duration::from_secs(60) }
    }
}

/// A certificate of this node, as people see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertView {
    /// Whose.
    pub identity: SpiffeId,
    /// In hex; `None` before the first one.
    pub serial: Option<String>,
    /// Valid from.
    pub not_before: Option<SystemTime>,
    /// Valid until, exclusive: the value of the expiry gauge.
    pub not_after: Option<SystemTime>,
    /// Whether it can be presented.
    pub state: CertState,
    /// Why the last attempt to issue or renew failed. A certificate may still be available.
    pub error: Option<String>,
}

/// Whether a workload can prove who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CertState {
    /// Yes.
    Available,
    /// Not yet: asked for, not answered.
    Initializing,
    /// No: issuing failed, or the certificate has expired. Its connections are refused.
    Unavailable,
}

impl CertState {
    /// The word in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Available => "Available",
            Self::Initializing => "Initializing",
            Self::Unavailable => "Unavailable",
        }
    }
}

/// The identities of this node, and whom it trusts.
#[derive(Debug)]
pub struct Identities {
    held: ArcSwap<Held>,
    wanted: watch::Sender<HashSet<SpiffeId>>,
    trust: ArcSwap<TrustBundles>,
    trust_problem: ArcSwapOption<BundleError>,
    /// Counts the roots that were in force.
    trust_changes: watch::Sender<u64>,
    changes: watch::Sender<()>,
    was_ready: AtomicBool,
}

/// What lookups read.
#[derive(Debug, Default)]
struct Held {
    by_id: HashMap<SpiffeId, Slot>,
    by_sni: HashMap<String, SpiffeId>,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    cert: Option<HeldCert>,
    error: Option<String>,
    /// The error is the issuer's last word: it will not vouch for this one.
    is_denied: bool,
}

#[derive(Clone, Debug)]
struct HeldCert {
    certified: Arc<CertifiedKey>,
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl Identities {
    /// Holds nothing yet; [`maintain`](Self::maintain) makes it work.
    pub fn new(trust: TrustBundles) -> Self {
        Self {
            held: ArcSwap::default(),
            wanted: watch::Sender::default(),
            trust: ArcSwap::from_pointee(trust),
            trust_problem: ArcSwapOption::empty(),
            trust_changes: watch::Sender::default(),
            changes: watch::Sender::default(),
            was_ready: AtomicBool::new(false),
        }
    }

    /// Sets which identities this node needs: those of its own enrolled pods.
    pub fn wanted(&self, identities: HashSet<SpiffeId>) {
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != identities;
            *wanted = identities;
            changed
        });
    }

    /// The certificate to present as `id`.
    pub fn certified(&self, id: &SpiffeId) -> Option<Arc<CertifiedKey>> {
        let held = self.held.load();
        Some(Arc::clone(&held.by_id.get(id)?.cert.as_ref()?.certified))
    }

    /// Whether the issuer has said no, and nothing else since.
    pub fn is_denied(&self, id: &SpiffeId) -> bool {
        self.held.load().by_id.get(id).is_some_and(|slot| slot.is_denied)
    }

    /// The workload that a peer means by this server name, and its certificate.
    pub fn served(&self, sni: &str) -> Option<(SpiffeId, Arc<CertifiedKey>)> {
        let held = self.held.load();
        let id = held.by_sni.get(sni)?;
        let cert = held.by_id.get(id)?.cert.as_ref()?;
        Some((id.clone(), Arc::clone(&cert.certified)))
    }

    /// The roots in force.
    pub fn trust(&self) -> Arc<TrustBundles> {
        self.trust.load_full()
    }

    /// Replaces the roots. A certificate of ours that they no longer cover is issued again at once.
    pub fn set_trust(&self, trust: TrustBundles) {
        self.trust.store(Arc::new(trust));
        // After the roots: who sees the number sees them too.
        self.trust_changes.send_modify(|number| *number += 1);
        self.changes.send_replace(());
    }

    /// The number of the roots in force: another one after every change of them.
    pub fn trusted(&self) -> watch::Receiver<u64> {
        self.trust_changes.subscribe()
    }

    /// What is wrong with the bundle's file; the roots in force are then those it had before.
    pub fn trust_problem(&self) -> Option<Arc<BundleError>> {
        self.trust_problem.load_full()
    }

    pub(super) fn set_trust_problem(&self, problem: Option<BundleError>) {
        self.trust_problem.store(problem.map(Arc::new));
    }

    /// Every identity held or wanted, in order.
    pub fn view(&self, now: SystemTime) -> Vec<CertView> {
        let held = self.held.load();
        let mut views: Vec<_> =
            held.by_id.iter().map(|(id, slot)| slot.view(id.clone(), now)).collect();
        let wanted = self.wanted.borrow();
        let missing = wanted.iter().filter(|id| !held.by_id.contains_key(*id));
        views.extend(missing.map(|id| Slot::default().view(id.clone(), now)));
        views.sort_unstable_by(|a, b| a.identity.cmp(&b.identity));
        views
    }

    /// Every trusted root.
    pub fn roots(&self) -> Vec<Root> {
        self.trust.load().roots().cloned().collect()
    }

    /// Whether every wanted identity can be presented, but for those that the issuer has denied or failed to
    /// sign while it signs others: that is a problem of their pods, and not of this node. An issuer that signs
    /// nothing is one of the node, unless it has denied the only one that was asked for. What is first wanted later, for a pod that has just come,
    /// changes nothing while it is asked for.
    pub fn ready(&self, now: SystemTime) -> bool {
        let (held, wanted) = (self.held.load(), self.wanted.borrow());
        let is_available = |slot: &Slot| slot.state(now) == CertState::Available;
        let signs = wanted.iter().filter_map(|id| held.by_id.get(id)).any(is_available);
        let is_alone = wanted.len() == 1;
        let is_settled = |slot: &Slot| {
            let is_of_its_pods = (signs && slot.error.is_some()) || (is_alone && slot.is_denied);
            is_available(slot) || is_of_its_pods
        };
        let was_ready = self.was_ready.load(Ordering::Relaxed);
        let is_asked_for = |slot: Option<&Slot>| {
            slot.is_none_or(|slot| slot.state(now) == CertState::Initializing)
        };
        let ready = wanted.iter().all(|id| {
            let slot = held.by_id.get(id);
            slot.is_some_and(is_settled) || (was_ready && signs && is_asked_for(slot))
        });
        self.was_ready.fetch_or(ready, Ordering::Relaxed);
        ready
    }

    /// Changes when certificates or roots do: what a waiter or a gauge follows.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Issues, renews and drops, for ever. `now` is the wall clock.
    ///
    /// Cancel-safe: certificates already held stay.
    pub async fn maintain(
        self: Arc<Self>,
        issuer: Issuer,
        lifetimes: Lifetimes,
        now: impl Fn() -> SystemTime + Send,
    ) {
        let mut wanted = self.wanted.subscribe();
        let mut trust = self.trust_changes.subscribe();
        let mut keeper = Keeper::new(lifetimes);
        let issuer = Arc::new(issuer);
        // An issuer that is slow for one must not keep the others waiting.
        let mut asked = JoinSet::new();
        loop {
            let want = wanted.borrow_and_update().clone();
            let mut changed = keeper.follow(&want, now()) | std::mem::take(&mut keeper.is_stale);
            if trust.has_changed().unwrap_or(false) {
                trust.mark_unchanged();
                keeper.renew_untrusted(&self.trust.load(), now());
            }
            for id in keeper.due(now()) {
                let (issuer, lifetime, now) = (Arc::clone(&issuer), lifetimes.lifetime, now());
                keeper.asked(&id);
                asked.spawn(async move {
                    let answer = issuer.issue(&id, lifetime, now).await;
                    (id, answer)
                });
            }
            while let Some(answered) = asked.try_join_next() {
                keeper.answered(answered, &self.trust.load(), now());
                changed = true;
            }
            if changed {
                self.held.store(Arc::new(keeper.publish()));
                self.changes.send_replace(());
            }
            let wait = keeper.next(now()).min(LONGEST_WAIT);
            tokio::select! {
                _ = wanted.changed() => {}
                _ = trust.changed() => trust.mark_changed(),
                Some(answered) = asked.join_next() => {
                    keeper.answered(answered, &self.trust.load(), now());
                    keeper.is_stale = true;
                }
                () = sleep(wait) => {}
            }
        }
    }
}

impl Slot {
    fn state(&self, now: SystemTime) -> CertState {
        match (&self.cert, &self.error) {
            (Some(cert), _) if cert.not_before <= now && now < cert.not_after => {
                CertState::Available
            }
            (None, None) => CertState::Initializing,
            _ => CertState::Unavailable,
        }
    }

    fn view(&self, identity: SpiffeId, now: SystemTime) -> CertView {
        let cert = self.cert.as_ref();
        CertView {
            identity,
            serial: cert.map(|cert| cert.serial.clone()),
            not_before: cert.map(|cert| cert.not_before),
            not_after: cert.map(|cert| cert.not_after),
            state: self.state(now),
            error: self.error.clone(),
        }
    }
}

impl HeldCert {
    fn new(certified: Arc<CertifiedKey>, issued: &Issued) -> Self {
        Self {
            certified,
            serial: issued.serial.clone(),
            not_before: issued.not_before,
            not_after: issued.not_after,
        }
    }
}
