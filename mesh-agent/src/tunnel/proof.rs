//! Whether peers are still trusted: what one showed in a handshake is judged again whenever the
//! trusted roots change, and not only when the next handshake comes.
//!
//! # Guarantees
//!
//! - *At once.* [`Proof::refused`] answers by the roots in force when it is asked, [`Proof::withdrawn`]
//!   completes when [`Proofs::judge_all`] finds that they no longer vouch for the peer.
//! - *Cheap.* Carriers on which a peer showed the same chain share one proof: a change costs one
//!   verification for each chain, and a flow that begins costs a comparison of two numbers.
//!
//! # Not here
//!
//! The end of a certificate: carriers know it, take no flow after it, and let those that run go on.

use std::collections::HashMap;
use std::fmt;
use std::pin::pin;
use std::sync::{Arc, Mutex, Weak};

use aws_lc_rs::digest::{Context, SHA256};
use mesh_core::spiffe::SpiffeId;
use rustls::pki_types::{CertificateDer, UnixTime};
use tokio::sync::Notify;
use tracing::warn;

use super::credentials::Credentials;
use super::stats::{Side, TunnelStats};
use super::tunnels::lock;
use crate::gate::Gate;
use crate::identity::verify::{PeerRefused, PeerRole};

/// What peers of one worker have shown.
#[derive(Debug)]
pub(super) struct Proofs {
    judge: Arc<Judge>,
    /// By a hash of role and chain.
    shown: Mutex<HashMap<[u8; 32], Weak<Proof>>>,
}

/// Who decides, and who is told.
struct Judge {
    credentials: Arc<Credentials>,
    stats: Arc<TunnelStats>,
    withdrawals: Gate,
}

impl fmt::Debug for Judge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Judge").finish_non_exhaustive()
    }
}

/// A chain that proved an identity, and what is thought of it now.
#[derive(Debug)]
pub(crate) struct Proof {
    judge: Arc<Judge>,
    id: SpiffeId,
    /// Empty for a peer that proved nothing.
    chain: Vec<CertificateDer<'static>>,
    role: PeerRole,
    /// When it was shown: the roots are asked whether they vouch for what was proven then.
    at: UnixTime,
    verdict: Mutex<Verdict>,
    changed: Notify,
}

#[derive(Clone, Copy, Debug)]
struct Verdict {
    /// Of the roots that it was made by.
    generation: u64,
    refused: Option<PeerRefused>,
}

impl Proofs {
    pub(super) fn new(credentials: &Arc<Credentials>, stats: &Arc<TunnelStats>) -> Self {
        let judge = Judge {
            credentials: Arc::clone(credentials),
            stats: Arc::clone(stats),
            withdrawals: Gate::default(),
        };
        Self { judge: Arc::new(judge), shown: Mutex::default() }
    }

    /// Judges what the peer of a handshake showed, whether or not the handshake did: a resumed one
    /// does not.
    ///
    /// # Errors
    ///
    /// Why it proves nothing.
    pub(super) fn take(
        &self,
        chain: Option<&[CertificateDer<'_>]>,
        role: PeerRole,
    ) -> Result<(SpiffeId, Arc<Proof>), PeerRefused> {
        let chain = chain.filter(|chain| !chain.is_empty()).ok_or(PeerRefused::Missing)?;
        // Before the verdict: roots that change meanwhile must make it an old one.
        let generation = self.judge.credentials.generation();
        let now = UnixTime::now();
        let id = (self.judge.credentials.verify)(chain, role, now)?;
        let key = key(chain, role);
        let proof = {
            let mut shown = lock(&self.shown);
            let known = shown.get(&key).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let proof = Arc::new(Proof {
                    judge: Arc::clone(&self.judge),
                    id: id.clone(),
                    chain: chain.iter().map(|one| one.clone().into_owned()).collect(),
                    role,
                    at: now,
                    verdict: Mutex::new(Verdict { generation, refused: None }),
                    changed: Notify::new(),
                });
                shown.insert(key, Arc::downgrade(&proof));
                proof
            })
        };
        // Now that `judge_all` can find it: a change before that would be missed.
        match proof.refused() {
            None => Ok((id, proof)),
            Some(refused) => Err(refused),
        }
    }

    /// For a peer that proved nothing, for this reason, and is to be told so: never trusted, `id` or
    /// not.
    pub(super) fn none(&self, id: SpiffeId, refused: PeerRefused) -> Arc<Proof> {
        Arc::new(Proof {
            judge: Arc::clone(&self.judge),
            id,
            chain: Vec::new(),
            role: PeerRole::Client,
            at: UnixTime::now(),
            verdict: Mutex::new(Verdict { generation: 0, refused: Some(refused) }),
            changed: Notify::new(),
        })
    }

    /// Judges everyone by the roots in force, and forgets whose carriers are gone.
    pub(super) async fn judge_all(&self) {
        let known: Vec<_> = {
            let mut shown = lock(&self.shown);
            shown.retain(|_, proof| proof.strong_count() > 0);
            shown.values().cloned().collect()
        };
        for proof in known.iter().filter_map(Weak::upgrade) {
            proof.refused();
            // A verification takes a tenth of a millisecond: flows go on in between.
            tokio::task::yield_now().await;
        }
    }

    /// Forgets whose carriers are gone.
    pub(super) fn forget(&self) {
        lock(&self.shown).retain(|_, proof| proof.strong_count() > 0);
    }
}

impl Proof {
    /// Why the peer is not trusted any more, by the roots in force.
    pub(super) fn refused(&self) -> Option<PeerRefused> {
        let credentials = &self.judge.credentials;
        let mut verdict = lock(&self.verdict);
        let generation = credentials.generation();
        if verdict.generation == generation || self.chain.is_empty() {
            return verdict.refused;
        }
        let before = verdict.refused;
        let refused = (credentials.verify)(&self.chain, self.role, self.at).err();
        *verdict = Verdict { generation, refused };
        drop(verdict);
        if let (None, Some(refused)) = (before, refused) {
            self.judge.withdrawn(&self.id, self.role, refused);
            self.changed.notify_waiters();
        }
        refused
    }

    /// Completes when the peer is not trusted any more. Cancel-safe.
    pub(crate) async fn withdrawn(&self) -> PeerRefused {
        loop {
            let mut changed = pin!(self.changed.notified());
            // Before the look, so that a change after it is not missed.
            changed.as_mut().enable();
            let verdict = *lock(&self.verdict);
            if let Some(refused) = verdict.refused {
                return refused;
            }
            changed.await;
        }
    }
}

impl Judge {
    fn withdrawn(&self, id: &SpiffeId, role: PeerRole, refused: PeerRefused) {
        let side = match role {
            PeerRole::Client => Side::Server,
            PeerRole::Server => Side::Client,
        };
        self.stats.refused(side, refused.reason());
        if let Some(unlogged) = self.withdrawals.pass(refused.reason()) {
            warn!(
                identity = %id, side = side.as_str(), reason = refused.reason(), unlogged,
                stage = "tunnel", "peer is not trusted any more, its tunnels end",
            );
        }
    }
}

fn key(chain: &[CertificateDer<'_>], role: PeerRole) -> [u8; 32] {
    let mut hash = Context::new(&SHA256);
    hash.update(&[u8::from(role == PeerRole::Server)]);
    for certificate in chain {
        hash.update(&certificate.len().to_be_bytes());
        hash.update(certificate);
    }
    let mut key = [0; 32];
    key.copy_from_slice(hash.finish().as_ref());
    key
}
