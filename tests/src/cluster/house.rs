//! Who has the agents. All tests share one deployment, since a node has room for one agent, and what has
//! been deployed stays for the next test.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};

use anyhow::Result;

use super::Agents;
use crate::sys;

/// A test has the agents together with others, or alone if it does something to them.
static HOUSE: House = House {
    rooms: Mutex::new(Rooms { guests: 0, keepers: 0, is_taken: false, agents: None }),
    left: Condvar::new(),
};

struct House {
    rooms: Mutex<Rooms>,
    /// A test has done with the agents.
    left: Condvar,
}

struct Rooms {
    /// Tests that have the agents together.
    guests: usize,
    /// Tests that wait to have them alone, and leave them to the next one.
    keepers: usize,
    /// Whether a test has them alone.
    is_taken: bool,
    /// As the manifest says, ready for the next test.
    agents: Option<Arc<Agents>>,
}

impl Rooms {
    fn is_free(&self) -> bool {
        self.guests == 0 && !self.is_taken
    }

    fn is_free_of_keepers(&self) -> bool {
        self.is_free() && self.keepers == 0
    }
}

impl House {
    fn lock(&self) -> MutexGuard<'_, Rooms> {
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `may` says yes. Guests go before those who want to be alone: the fewer changes, the
    /// less waits.
    fn wait(&self, may: impl Fn(&Rooms) -> bool) -> MutexGuard<'_, Rooms> {
        let waited = self.left.wait_while(self.lock(), |rooms| !may(rooms));
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, change: impl FnOnce(&mut Rooms)) {
        change(&mut self.lock());
        self.left.notify_all();
    }

    /// Removes what no test needs any more; unless an interrupted one is about to deploy.
    extern "C" fn close() {
        if let Ok(mut rooms) = HOUSE.rooms.try_lock() {
            drop(rooms.agents.take());
        }
    }
}

/// New agents, that are removed at the end of this program at the latest.
fn deploy(settings: &[(&str, &str)], roots: Option<&str>) -> Result<Agents> {
    static CLOSES: Once = Once::new();
    CLOSES.call_once(|| sys::at_exit(House::close));
    Agents::deploy(settings, roots)
}

/// Agents that other tests use too.
#[derive(Debug)]
pub struct SharedAgents {
    agents: Arc<Agents>,
    _guest: Guest,
}

#[derive(Debug)]
struct Guest;

impl Drop for Guest {
    fn drop(&mut self) {
        HOUSE.leave(|rooms| rooms.guests -= 1);
    }
}

impl Deref for SharedAgents {
    type Target = Agents;

    fn deref(&self) -> &Agents {
        &self.agents
    }
}

/// Agents that are this test's alone.
#[derive(Debug)]
pub struct OwnAgents {
    /// There until this is dropped.
    agents: Option<Agents>,
    /// Whether the next test may have them.
    is_kept: bool,
}

impl Deref for OwnAgents {
    type Target = Agents;

    #[expect(clippy::expect_used, reason = "they are taken out by `drop` alone")]
    fn deref(&self) -> &Agents {
        self.agents.as_ref().expect("agents until they are dropped")
    }
}

impl DerefMut for OwnAgents {
    #[expect(clippy::expect_used, reason = "as above")]
    fn deref_mut(&mut self) -> &mut Agents {
        self.agents.as_mut().expect("agents until they are dropped")
    }
}

impl Drop for OwnAgents {
    fn drop(&mut self) {
        // What a test that failed has left may be none: the next one gets agents on all nodes, or new ones.
        let kept = self.agents.take().and_then(|mut agents| {
            let is_whole = self.is_kept && agents.find().is_ok();
            is_whole.then(|| Arc::new(agents))
        });
        HOUSE.leave(|rooms| {
            rooms.agents = kept;
            rooms.is_taken = false;
        });
    }
}

impl Agents {
    /// Those that another test has deployed, or new ones, all of them ready.
    ///
    /// # Errors
    ///
    /// Fails, with their logs, if they do not become ready.
    pub fn deployed() -> Result<SharedAgents> {
        let mut rooms = HOUSE.wait(|rooms| !rooms.is_taken);
        let agents = match rooms.agents.take() {
            Some(agents) => agents,
            None => Arc::new(deploy(&[], None)?),
        };
        rooms.agents = Some(Arc::clone(&agents));
        rooms.guests += 1;
        Ok(SharedAgents { agents, _guest: Guest })
    }

    /// The same when no other test has them.
    ///
    /// # Errors
    ///
    /// Fails, with their logs, if they do not become ready.
    pub fn alone() -> Result<OwnAgents> {
        HOUSE.lock().keepers += 1;
        let mut rooms = HOUSE.wait(Rooms::is_free);
        rooms.keepers -= 1;
        let mut own = OwnAgents::of(rooms)?;
        own.is_kept = true;
        Ok(own)
    }

    /// The same for a test that leaves nothing of them. It waits for those that do not need new ones.
    ///
    /// # Errors
    ///
    /// Fails, with their logs, if they do not become ready.
    pub fn last() -> Result<OwnAgents> {
        OwnAgents::of(HOUSE.wait(Rooms::is_free_of_keepers))
    }

    /// New ones with these settings and, if there are `roots`, without a CA of ours: what the agents trust
    /// is theirs. When no other test has any, nor waits for those that are there.
    ///
    /// # Errors
    ///
    /// Fails, with their logs, if they do not become ready.
    pub fn alone_with(settings: &[(&str, &str)], roots: Option<&str>) -> Result<OwnAgents> {
        let (mut own, kept) = OwnAgents::take(HOUSE.wait(Rooms::is_free_of_keepers));
        drop(kept);
        own.agents = Some(deploy(settings, roots)?);
        Ok(own)
    }
}

impl Agents {
    /// New ones, of `deploy/` as it is. When no other test has any, nor waits for those that are there.
    ///
    /// # Errors
    ///
    /// Fails, with their logs, if they do not become ready.
    pub fn shipped() -> Result<OwnAgents> {
        let (mut own, kept) = OwnAgents::take(HOUSE.wait(Rooms::is_free_of_keepers));
        drop(kept);
        own.agents = Some(Self::ship()?);
        Ok(own)
    }
}

impl OwnAgents {
    fn take(mut rooms: MutexGuard<'_, Rooms>) -> (Self, Option<Agents>) {
        rooms.is_taken = true;
        let kept = rooms.agents.take().and_then(Arc::into_inner);
        (Self { agents: None, is_kept: false }, kept)
    }

    /// Those that are there, or new ones.
    fn of(rooms: MutexGuard<'_, Rooms>) -> Result<Self> {
        let (mut own, kept) = Self::take(rooms);
        own.agents = Some(kept.map_or_else(|| deploy(&[], None), Ok)?);
        Ok(own)
    }
}
