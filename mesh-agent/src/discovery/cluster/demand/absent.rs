//! What was looked for in vain: it may come, or its address be another pod's, so it is looked for again, but not at
//! each demand.
//!
//! An address that something names, an endpoint outside of the cluster for one, is *outside* as long as no pod has it:
//! that is kept, and looked at again, and not forgotten.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;

use super::counted::Counted;
use super::{REFRESH, Wanted};
use crate::discovery::objects::Objects;
use crate::discovery::services::{absent_at, absent_pod};

/// Nothing else is looked for again before. Of what is outside: at first, and then after twice as long each time, up
/// to [`REFRESH`].
pub(super) const ABSENT: Duration = Duration::from_secs(60);
/// The same of an address from which somebody has called, who is there and whom the API is about to tell of:
/// for so long at first, and twice as long each time, since a peer may make addresses up.
pub(super) const CALLER_ABSENT: Duration = Duration::from_secs(2);
/// So many that do not exist are remembered; past it nothing more is looked for by address, since who
/// sends many addresses is up to no good.
pub(super) const MOST_ABSENT: usize = 4096;
/// The same of addresses from which somebody says to have called through the tunnel: a peer that makes them up
/// must not use up what this node's own pods may ask for.
pub(super) const MOST_CALLERS: usize = 512;

/// What is not there, as far as was looked.
#[derive(Debug, Default)]
pub(super) struct Absences(Counted<Absent>);

/// One of them.
#[derive(Clone, Copy, Debug)]
struct Absent {
    since: Instant,
    /// How long it is not looked for again.
    lasts: Duration,
}

impl Absent {
    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.since) >= self.lasts
    }
}

impl Wanted {
    /// What [`Objects::absent`] has of it if it was looked for in vain.
    fn absent_as(&self) -> Option<String> {
        match self {
            Self::Pod { namespace, name, uid, at } => {
                let pod = absent_pod(uid.as_deref(), namespace, name);
                Some(at.map_or_else(|| pod.to_string(), |ip| absent_at(&pod, ip)))
            }
            // Who has called from there has proven to be somebody.
            Self::Address { account: Some(_), .. } => None,
            Self::Address { ip, account: None, .. } => Some(ip.to_string()),
        }
    }
}

impl Absences {
    /// Whether it is not to be looked for yet.
    pub(super) fn has(&self, wanted: &Wanted, now: Instant) -> bool {
        self.0.get(wanted).is_some_and(|absent| !absent.is_over(now))
    }

    /// How many are addresses that callers say they have,
    pub(super) fn callers(&self) -> usize {
        self.0.callers()
    }

    /// and how many that pods dial.
    pub(super) fn dialled(&self) -> usize {
        self.0.dialled()
    }

    /// It was looked for in vain. Says whether that is news.
    pub(super) fn missed(&mut self, objects: &mut Objects, wanted: Wanted, now: Instant) -> bool {
        let lasts = match self.0.get(&wanted) {
            Some(before) if is_outside(objects, &wanted) => (before.lasts * 2).min(REFRESH),
            _ if !wanted.is_callers() => ABSENT,
            Some(before) => (before.lasts * 2).min(ABSENT),
            None => CALLER_ABSENT,
        };
        let told = objects.absent_mut().zip(wanted.absent_as());
        self.0.insert(wanted, Absent { since: now, lasts });
        told.is_some_and(|(told, absent)| told.insert(absent))
    }

    /// It was looked for again, and nobody could say. Where many cannot be read they must not all be asked for at each
    /// look.
    pub(super) fn unanswered(&mut self, objects: &Objects, wanted: &Wanted, now: Instant) {
        if is_outside(objects, wanted)
            && let Some(absent) = self.0.get_mut(wanted)
        {
            *absent = Absent { since: now, lasts: absent.lasts.min(ABSENT) };
        }
    }

    /// It is there. Says whether that is news.
    pub(super) fn found(&mut self, objects: &mut Objects, wanted: &Wanted) -> bool {
        let was_absent = self.0.remove(wanted).is_some();
        if was_absent {
            self.tell(objects);
        }
        was_absent
    }

    /// What is outside, and to be looked for again.
    pub(super) fn due(&self, objects: &Objects, now: Instant) -> impl Iterator<Item = &Wanted> {
        let is_due = move |(wanted, absent): &(&Wanted, &Absent)| {
            absent.is_over(now) && is_outside(objects, wanted)
        };
        self.0.iter().filter(is_due).map(|(wanted, _)| wanted)
    }

    /// Forgets what may be there by now, and says whether that changes anything. Not what is outside, up to half of
    /// the places: what pods dial must find some.
    pub(super) fn expire(&mut self, objects: &mut Objects, now: Instant) -> bool {
        let mut outside = 0;
        let is_kept = |wanted: &Wanted, absent: &Absent| {
            outside += usize::from(is_outside(objects, wanted));
            let is_outside = is_outside(objects, wanted) && outside <= MOST_ABSENT / 2;
            is_outside || now.duration_since(absent.since) < ABSENT
        };
        self.0.retain(is_kept) && self.tell(objects)
    }

    /// Something is not absent any more: what is told of it may hold of something else too. Says whether that
    /// changes anything.
    fn tell(&self, objects: &mut Objects) -> bool {
        let absent: HashSet<String> = self.0.keys().filter_map(Wanted::absent_as).collect();
        let Some(before) = objects.absent_mut() else { return false };
        let changed = *before != absent;
        *before = absent;
        changed
    }
}

/// Whether it is the address of something that is named and is no pod, as far as was looked.
fn is_outside(objects: &Objects, wanted: &Wanted) -> bool {
    matches!(wanted, Wanted::Address { ip, account: None, .. } if objects.names(*ip))
}
