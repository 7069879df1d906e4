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
//! - A certificate that our own bundle does not trust is never presented: whoever replaced the root
//!   before the bundle is told, instead of every peer refusing us.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use aws_lc_rs::rand;
use mesh_core::spiffe::SpiffeId;
use rustls::pki_types::UnixTime;
use rustls::sign::CertifiedKey;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::bundle::{BundleError, Root, TrustBundles};
use super::ca::{CaError, DirectoryCa, Issued};
use super::kubernetes::requests::SigningRequests;
use super::sni_name;
use super::verify::{PeerRefused, PeerRole, verify_peer};
use crate::telemetry;

#[cfg(test)]
mod tests;

/// The wall clock is read at least this often: the timer's own clock stops while a machine sleeps, and
/// does not jump when the wall clock is set.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// A clock that is set back by more was wrong before: what was issued then may not be valid yet, and
/// what failed then may have failed for that. Half of what certificates are backdated by.
const SET_BACK: Duration = Duration::from_secs(60);

/// Back-off of a failed issue starts here and doubles up to [`SLOWEST_RETRY`].
const FIRST_RETRY: Duration = Duration::from_secs(1);
const SLOWEST_RETRY: Duration = Duration::from_secs(60);

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

    /// Whether every wanted identity can be presented.
    pub fn ready(&self, now: SystemTime) -> bool {
        let held = self.held.load();
        let available =
            |id| held.by_id.get(id).is_some_and(|slot| slot.state(now) == CertState::Available);
        self.wanted.borrow().iter().all(available)
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
        let mut keeper = Keeper { lifetimes, entries: HashMap::new(), is_stale: false };
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

/// What became of an attempt.
type Answered = Result<(SpiffeId, Result<Issued, CaError>), tokio::task::JoinError>;

/// What is held and when something is due. No IO: `maintain` acts on what it says.
#[derive(Debug)]
struct Keeper {
    lifetimes: Lifetimes,
    entries: HashMap<SpiffeId, Entry>,
    /// Something was answered that is not published yet.
    is_stale: bool,
}

#[derive(Debug)]
struct Entry {
    slot: Slot,
    /// When to issue or renew.
    due: SystemTime,
    /// Whether the issuer has been asked, and has not answered.
    is_asked: bool,
    /// When that was last tried.
    tried: Option<SystemTime>,
    /// Attempts that failed since the last that did not.
    failures: u32,
    /// When to drop it: no pod has it any more.
    leaves: Option<SystemTime>,
}

impl Keeper {
    /// Takes in what is wanted, and drops what has lingered. Says whether lookups change.
    fn follow(&mut self, wanted: &HashSet<SpiffeId>, now: SystemTime) -> bool {
        for id in wanted {
            let new = || Entry {
                slot: Slot::default(),
                due: now,
                is_asked: false,
                tried: None,
                failures: 0,
                leaves: None,
            };
            self.entries.entry(id.clone()).or_insert_with(new).leaves = None;
        }
        let leaves = now + self.lifetimes.linger;
        let before = self.entries.len();
        self.entries
            .retain(|id, entry| wanted.contains(id) || *entry.leaves.get_or_insert(leaves) > now);
        before != self.entries.len()
    }

    /// Makes due what `trust` does not cover.
    fn renew_untrusted(&mut self, trust: &TrustBundles, now: SystemTime) {
        for entry in self.entries.values_mut() {
            let chain = entry.slot.cert.as_ref().map(|cert| &cert.certified.cert);
            if chain.is_some_and(|chain| untrusted(trust, chain, now).is_some()) {
                entry.due = now;
            }
        }
    }

    fn due(&self, now: SystemTime) -> Vec<SpiffeId> {
        let due = self.entries.iter().filter(|(_, entry)| entry.is_due(now));
        due.map(|(id, _)| id.clone()).collect()
    }

    /// The issuer is asked now.
    fn asked(&mut self, id: &SpiffeId) {
        if let Some(entry) = self.entries.get_mut(id) {
            entry.is_asked = true;
        }
    }

    /// Takes what became of an attempt.
    fn answered(&mut self, answered: Answered, trust: &TrustBundles, now: SystemTime) {
        match answered {
            Ok((id, answer)) => self.issued(&id, answer, trust, now, draw()),
            // As if it had happened here.
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_cancelled) => {}
        }
    }

    /// Takes the answer to an attempt.
    fn issued(
        &mut self,
        id: &SpiffeId,
        answer: Result<Issued, CaError>,
        trust: &TrustBundles,
        now: SystemTime,
        draw: f64,
    ) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        entry.tried = Some(now);
        entry.is_asked = false;
        let answer = answer.and_then(|issued| Ok((issued.certified()?, issued)));
        let failure = match answer {
            Ok((certified, issued)) => match untrusted(trust, &certified.cert, now) {
                None => {
                    info!(identity = %id, serial = issued.serial, "certificate issued");
                    entry.failures = 0;
                    entry.due = renew_at(now, issued.not_after, draw);
                    entry.slot =
                        Slot { cert: Some(HeldCert::new(certified, &issued)), error: None };
                    return;
                }
                Some(refused) => format!(
                    "peers would refuse the new certificate ({}): add the root that signs to the trust bundle",
                    refused.reason()
                ),
            },
            Err(error) => telemetry::chain(&error),
        };
        entry.due = now + retry_after(entry.failures, self.lifetimes.lifetime, draw);
        entry.failures = entry.failures.saturating_add(1);
        if entry.slot.error.as_deref() == Some(failure.as_str()) {
            debug!(identity = %id, error = failure, "certificate not issued");
        } else {
            warn!(identity = %id, error = failure, "certificate not issued");
        }
        entry.slot.error = Some(failure);
    }

    /// Until something is due or leaves.
    fn next(&self, now: SystemTime) -> Duration {
        let waits = self.entries.values().filter(|entry| entry.leaves.is_some() || !entry.is_asked);
        let times = waits.map(|entry| entry.leaves.unwrap_or(entry.due));
        let wait = |at: SystemTime| at.duration_since(now).unwrap_or_default();
        times.min().map_or(LONGEST_WAIT, wait)
    }

    fn publish(&self) -> Held {
        Held {
            by_id: self
                .entries
                .iter()
                .map(|(id, entry)| (id.clone(), entry.slot.clone()))
                .collect(),
            by_sni: self.entries.keys().map(|id| (sni_name(id), id.clone())).collect(),
        }
    }
}

impl Entry {
    /// What is leaving is not renewed.
    fn is_due(&self, now: SystemTime) -> bool {
        let was_set_back = self.tried.is_some_and(|tried| now + SET_BACK < tried);
        !self.is_asked && self.leaves.is_none() && (self.due <= now || was_set_back)
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

/// When to replace a certificate: at half its life, up to a tenth earlier or later as `draw` (0 to 1)
/// says, so that what was issued together is not renewed together.
pub fn renew_at(issued: SystemTime, expires: SystemTime, draw: f64) -> SystemTime {
    let life = expires.duration_since(issued).unwrap_or_default();
    issued + life.mul_f64(0.45 + 0.1 * draw.clamp(0.0, 1.0))
}

/// How long to wait after `failures` failed attempts before this one: doubling, never more than an
/// eighth of a life, so that half a life holds several attempts; jittered downwards by up to half.
pub fn retry_after(failures: u32, lifetime: Duration, draw: f64) -> Duration {
    let doubled = FIRST_RETRY.saturating_mul(2u32.saturating_pow(failures));
    doubled.min(SLOWEST_RETRY).min(lifetime / 8).mul_f64(0.5 + 0.5 * draw.clamp(0.0, 1.0))
}

/// Why peers that trust what we trust would refuse `chain`.
fn untrusted(
    trust: &TrustBundles,
    chain: &[rustls::pki_types::CertificateDer<'_>],
    now: SystemTime,
) -> Option<PeerRefused> {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = UnixTime::since_unix_epoch(since);
    verify_peer(trust, chain, PeerRole::Server, now).err()
}

/// Uniform, 0 to 1. Without randomness from the system it is the middle: jitter is a courtesy.
fn draw() -> f64 {
    let mut bytes = [0; 4];
    match rand::fill(&mut bytes) {
        Ok(()) => f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX),
        Err(_unspecified) => 0.5,
    }
}
