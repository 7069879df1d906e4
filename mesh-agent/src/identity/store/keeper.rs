//! What is held and when something is due: the store's decisions, without IO.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime};

use aws_lc_rs::rand;
use mesh_core::spiffe::SpiffeId;
use rustls::pki_types::UnixTime;
use tracing::{debug, info, warn};

use super::{CaError, Held, HeldCert, Issued, Lifetimes, Slot, TrustBundles};
use crate::identity::sni_name;
use crate::identity::verify::{PeerRefused, PeerRole, verify_peer};
use crate::telemetry;

/// The wall clock is read at least this often: the timer's own clock stops while a machine sleeps, and
/// does not jump when the wall clock is set.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// A clock that is set back by more was wrong before: what was issued then may not be valid yet, and
/// what failed then may have failed for that. Half of what certificates are backdated by.
const SET_BACK: Duration = Duration::from_secs(60);

/// Back-off of a failed issue starts here and doubles up to [`SLOWEST_RETRY`].
const FIRST_RETRY: Duration = Duration::from_secs(1);
const SLOWEST_RETRY: Duration = Duration::from_secs(60);

/// An issuer that has denied so often in a row means it, and is asked after so long, or when something changes
/// that it may have gone by: the API keeps each request for an hour.
const DENIALS: u32 = 5;
const DENIED_RETRY: Duration = Duration::from_secs(300);

/// What became of an attempt.
pub(super) type Answered = Result<(SpiffeId, Result<Issued, CaError>), tokio::task::JoinError>;

/// What is held and when something is due. No IO: `maintain` acts on what it says.
#[derive(Debug)]
pub(super) struct Keeper {
    lifetimes: Lifetimes,
    entries: HashMap<SpiffeId, Entry>,
    /// What was wanted last.
    wanted: HashSet<SpiffeId>,
    /// Something was answered that is not published yet.
    pub(super) is_stale: bool,
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
    /// Denials since the last other answer.
    denials: u32,
    /// When to drop it: no pod has it any more.
    leaves: Option<SystemTime>,
}

impl Keeper {
    pub(super) fn new(lifetimes: Lifetimes) -> Self {
        Self { lifetimes, entries: HashMap::new(), wanted: HashSet::new(), is_stale: false }
    }

    /// Takes in what is wanted, and drops what has lingered. Says whether lookups change.
    pub(super) fn follow(&mut self, wanted: &HashSet<SpiffeId>, now: SystemTime) -> bool {
        if self.wanted != *wanted {
            self.wanted.clone_from(wanted);
            self.ask_again(now);
        }
        for id in wanted {
            let new = || Entry {
                slot: Slot::default(),
                due: now,
                is_asked: false,
                tried: None,
                failures: 0,
                denials: 0,
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

    /// Makes due what was denied for good, but nothing that was denied just now: what changes may change often.
    fn ask_again(&mut self, now: SystemTime) {
        for entry in self.entries.values_mut().filter(|entry| entry.denials >= DENIALS) {
            entry.denials = 0;
            let again = entry.tried.map_or(now, |tried| tried + SLOWEST_RETRY);
            entry.due = entry.due.min(again.max(now));
        }
    }

    /// Makes due what `trust` does not cover, and what was denied under another one.
    pub(super) fn renew_untrusted(&mut self, trust: &TrustBundles, now: SystemTime) {
        for entry in self.entries.values_mut() {
            let chain = entry.slot.cert.as_ref().map(|cert| &cert.certified.cert);
            if chain.is_some_and(|chain| untrusted(trust, chain, now).is_some()) {
                entry.due = now;
            }
        }
        self.ask_again(now);
    }

    pub(super) fn due(&self, now: SystemTime) -> Vec<SpiffeId> {
        let due = self.entries.iter().filter(|(_, entry)| entry.is_due(now));
        due.map(|(id, _)| id.clone()).collect()
    }

    /// The issuer is asked now.
    pub(super) fn asked(&mut self, id: &SpiffeId) {
        if let Some(entry) = self.entries.get_mut(id) {
            entry.is_asked = true;
        }
    }

    /// Takes what became of an attempt.
    pub(super) fn answered(&mut self, answered: Answered, trust: &TrustBundles, now: SystemTime) {
        match answered {
            Ok((id, answer)) => self.issued(&id, answer, trust, now, draw()),
            // As if it had happened here.
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_cancelled) => {}
        }
    }

    /// Takes the answer to an attempt.
    pub(super) fn issued(
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
        let is_denied = matches!(answer, Err(CaError::Denied { .. }));
        let answer = answer.and_then(|issued| Ok((issued.certified()?, issued)));
        let mut begins = None;
        let failure = match answer {
            Ok((certified, issued)) => match untrusted(trust, &certified.cert, now) {
                None => {
                    info!(identity = %id, serial = issued.serial, "certificate issued");
                    (entry.failures, entry.denials) = (0, 0);
                    entry.due = renew_at(now, issued.not_after, draw);
                    let cert = Some(HeldCert::new(certified, &issued));
                    entry.slot = Slot { cert, error: None, is_denied: false };
                    return;
                }
                Some(PeerRefused::NotYetValid) => {
                    begins = Some(issued.not_before);
                    "the new certificate is not valid yet: this node's clock is behind the signer's; set it right"
                        .to_owned()
                }
                Some(refused) => format!(
                    "peers would refuse the new certificate ({}): add the root that signs to the trust bundle",
                    refused.reason()
                ),
            },
            Err(error) => telemetry::chain(&error),
        };
        entry.denials = if is_denied { entry.denials.saturating_add(1) } else { 0 };
        let lifetime = self.lifetimes.lifetime;
        let wait = match entry.denials >= DENIALS {
            true => jittered(DENIED_RETRY, lifetime, draw),
            false => retry_after(entry.failures, lifetime, draw),
        };
        // Another one that begins no sooner helps nobody. A clock that is set right is noticed by the next one's turn.
        let begins = begins.map_or(now, |begins| begins.min(now + DENIED_RETRY));
        entry.due = (now + wait).max(begins);
        entry.failures = entry.failures.saturating_add(1);
        if entry.slot.error.as_deref() == Some(failure.as_str()) {
            debug!(identity = %id, error = failure, "certificate not issued");
        } else {
            warn!(identity = %id, error = failure, "certificate not issued");
        }
        (entry.slot.error, entry.slot.is_denied) = (Some(failure), is_denied);
    }

    /// Until something is due or leaves.
    pub(super) fn next(&self, now: SystemTime) -> Duration {
        let waits = self.entries.values().filter(|entry| entry.leaves.is_some() || !entry.is_asked);
        let times = waits.map(|entry| entry.leaves.unwrap_or(entry.due));
        let wait = |at: SystemTime| at.duration_since(now).unwrap_or_default();
        times.min().map_or(LONGEST_WAIT, wait)
    }

    pub(super) fn publish(&self) -> Held {
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
    jittered(doubled.min(SLOWEST_RETRY), lifetime, draw)
}

/// `wait`, but no more than an eighth of a life, or up to half of that less.
fn jittered(wait: Duration, lifetime: Duration, draw: f64) -> Duration {
    wait.min(lifetime / 8).mul_f64(0.5 + 0.5 * draw.clamp(0.0, 1.0))
}

/// Why peers that trust what we trust would refuse `chain`.
pub(super) fn untrusted(
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
