//! Which of several signers works: one Lease (`coordination.k8s.io/v1`), as Kubernetes' own
//! controllers use it.
//!
//! Nobody's clock is compared with anybody else's: a Lease counts as given up when it has not changed
//! for its whole duration *as this process has seen it*.

use std::time::Duration;

use kube::Client;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::macros::format_description;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::LEASE;
use super::api::{Api, ApiError, Lease};
use crate::telemetry;

/// How long a Lease that nobody renews is respected. The values are those of Kubernetes' controllers.
const DURATION: Duration = Duration::from_secs(15);
/// Who could not renew for so long does not work any more: well before another one may take over.
const DEADLINE: Duration = Duration::from_secs(10);
/// Between attempts.
const RETRY: Duration = Duration::from_secs(2);
/// For an attempt. With [`DEADLINE`] less than [`DURATION`]: an API server that hangs must not make
/// this one believe for longer.
const ATTEMPT: Duration = Duration::from_secs(4);

/// What to do about the Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// There is none.
    Create,
    /// It is mine: say that I am still there.
    Renew { version: String },
    /// Nobody holds it any more.
    Take { version: String, transitions: u32 },
    /// Somebody else works.
    Wait,
}

/// What is known of the Lease. No IO.
#[derive(Debug)]
struct Watched {
    me: String,
    /// The version that was seen last, and when it was new.
    seen: Option<(String, Instant)>,
    renewed: Option<Instant>,
}

impl Watched {
    fn step(&mut self, lease: Option<&Lease>, now: Instant) -> Step {
        let Some(lease) = lease else { return Step::Create };
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => now,
        };
        self.seen = Some((version.clone(), since));
        let holder = lease.spec.holder_identity.as_deref().unwrap_or_default();
        if holder == self.me {
            Step::Renew { version }
        } else if holder.is_empty() || now.duration_since(since) >= DURATION {
            let transitions = lease.spec.lease_transitions.unwrap_or_default().saturating_add(1);
            Step::Take { version, transitions }
        } else {
            Step::Wait
        }
    }

    fn leads(&self, now: Instant) -> bool {
        self.renewed.is_some_and(|renewed| now.duration_since(renewed) < DEADLINE)
    }
}

/// One of those who want to work.
#[derive(Debug)]
pub struct Candidate {
    api: Api,
    /// Where the Lease is to be.
    path: String,
    namespace: String,
    watched: Watched,
    leads: watch::Sender<bool>,
}

impl Candidate {
    /// One that is called `me`, among those of `namespace`.
    pub fn new(client: Client, namespace: &str, me: String) -> Self {
        Self {
            api: Api::new(client),
            path: format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"),
            namespace: namespace.to_owned(),
            watched: Watched { me, seen: None, renewed: None },
            leads: watch::Sender::new(false),
        }
    }

    /// Whether it is this one's turn.
    pub fn leads(&self) -> watch::Receiver<bool> {
        self.leads.subscribe()
    }

    /// Competes until `end` comes true, and then gives up what it holds, so that nobody has to wait
    /// for it.
    pub async fn compete(mut self, mut end: watch::Receiver<bool>) {
        loop {
            // An answer that comes late does not prolong what was asked for before.
            let asked = Instant::now();
            let attempt = timeout(ATTEMPT, self.attempt(asked)).await;
            let silent = |_elapsed| ApiError::Silent { verb: "renew", path: LEASE.to_owned() };
            match attempt.map_err(silent).and_then(|attempt| attempt) {
                Ok(true) => self.watched.renewed = Some(asked),
                Ok(false) => self.watched.renewed = None,
                Err(error) if error.is_conflict() => debug!("another signer was first"),
                Err(error) => {
                    warn!(error = telemetry::chain(&error), "the lease cannot be kept up");
                }
            }
            self.tell();
            let wait = RETRY.mul_f32(0.75 + fastrand::f32() / 2.0);
            tokio::select! {
                biased; // A signer that ends does not ask once more.
                _ = end.wait_for(|end| *end) => break,
                () = sleep(wait) => self.tell(),
            }
        }
        if self.watched.leads(Instant::now()) {
            self.leads.send_replace(false);
            if let Err(error) = self.give_up().await {
                warn!(error = telemetry::chain(&error), "others wait until the lease runs out");
            }
        }
    }

    fn tell(&self) {
        let leads = self.watched.leads(Instant::now());
        if self.leads.send_replace(leads) != leads {
            info!(leads, me = self.watched.me, "signer");
        }
    }

    /// Whether the Lease is this one's.
    async fn attempt(&mut self, now: Instant) -> Result<bool, ApiError> {
        let path = format!("{}/{LEASE}", self.path);
        let lease = self.api.get::<Lease>(&path).await?;
        let me = self.watched.me.clone();
        let time = micro_time();
        let mut spec = json!({"renewTime": time, "leaseDurationSeconds": DURATION.as_secs()});
        let lease: Lease = match self.watched.step(lease.as_ref(), now) {
            Step::Wait => return Ok(false),
            Step::Create => {
                spec["holderIdentity"] = json!(me);
                spec["acquireTime"] = json!(time);
                let metadata = json!({"name": LEASE, "namespace": self.namespace});
                let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec});
                self.api.create(&self.path, &lease).await?
            }
            Step::Renew { version } => self.api.patch(&path, &change(&version, spec)).await?,
            Step::Take { version, transitions } => {
                spec["holderIdentity"] = json!(me);
                spec["acquireTime"] = json!(time);
                spec["leaseTransitions"] = json!(transitions);
                self.api.patch(&path, &change(&version, spec)).await?
            }
        };
        self.watched.step(Some(&lease), now);
        Ok(true)
    }

    async fn give_up(&self) -> Result<(), ApiError> {
        let Some((version, _)) = &self.watched.seen else { return Ok(()) };
        let patch = change(version, json!({"holderIdentity": "", "leaseDurationSeconds": 1}));
        self.api.patch::<Lease>(&format!("{}/{LEASE}", self.path), &patch).await.map(drop)
    }
}

fn change(version: &str, spec: Value) -> Value {
    json!({"metadata": {"resourceVersion": version}, "spec": spec})
}

/// `metav1.MicroTime`, which wants exactly six digits.
fn micro_time() -> String {
    let format =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");
    OffsetDateTime::now_utc().format(format).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(holder: &str, version: &str) -> Lease {
        let text = json!({
            "metadata": {"resourceVersion": version},
            "spec": {"holderIdentity": holder, "leaseTransitions": 3},
        });
        serde_json::from_value(text).unwrap()
    }

    fn watched() -> Watched {
        Watched { me: "me".into(), seen: None, renewed: None }
    }

    #[test]
    fn lease_that_is_absent_mine_or_free_is_taken() {
        let now = Instant::now();
        assert_eq!(watched().step(None, now), Step::Create);
        let renew = Step::Renew { version: "7".into() };
        assert_eq!(watched().step(Some(&lease("me", "7")), now), renew);
        let take = Step::Take { version: "7".into(), transitions: 4 };
        assert_eq!(watched().step(Some(&lease("", "7")), now), take);
    }

    #[test]
    fn lease_of_another_is_taken_when_it_has_not_changed_for_its_duration() {
        let (mut watched, now) = (watched(), Instant::now());
        let step = |watched: &mut Watched, version: &str, after: Duration| {
            watched.step(Some(&lease("other", version)), now + after)
        };
        assert_eq!(step(&mut watched, "7", Duration::ZERO), Step::Wait);
        assert_eq!(step(&mut watched, "8", DURATION - RETRY), Step::Wait, "renewed");
        assert_eq!(step(&mut watched, "8", DURATION), Step::Wait);
        let end = DURATION - RETRY + DURATION;
        assert_eq!(step(&mut watched, "8", end - Duration::from_millis(1)), Step::Wait);
        let take = Step::Take { version: "8".into(), transitions: 4 };
        assert_eq!(step(&mut watched, "8", end), take);
    }

    #[test]
    fn who_cannot_renew_stops_before_another_may_begin() {
        let now = Instant::now();
        let watched = Watched { renewed: Some(now), ..watched() };
        assert!(watched.leads(now + DEADLINE - Duration::from_millis(1)));
        assert!(!watched.leads(now + DEADLINE));
        assert!(DEADLINE + ATTEMPT < DURATION);
    }

    #[test]
    fn time_is_what_the_api_reads() {
        let text = micro_time();
        assert_eq!(text.len(), "2026-01-31T12:00:00.000000Z".len(), "{text}");
    }
}
