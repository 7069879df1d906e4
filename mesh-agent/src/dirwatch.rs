//! Notices that something in a directory changed.
//!
//! It says *that*, not *what*: whoever watches reads the directory again and compares, which is right
//! whatever the order, merging or loss of events (inotify(7), "Limitations and caveats").
//!
//! - A file counts when its writer closes it, or when it is renamed into place; never half-written
//!   because of its own events.
//! - A burst is one change.
//! - What inotify cannot see (another directory renamed or linked into this one's place, a network
//!   file system) is noticed by looking again every ten seconds.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use inotify::{Inotify, WatchMask};
use tokio::io::unix::AsyncFd;
use tokio::time::{sleep, timeout};

/// After an event: `cp -r` and editors touch several files at once, and one pass is cheaper.
const QUIET: Duration = Duration::from_millis(50);
/// A directory that never falls quiet is read anyway.
const LONGEST_BURST: usize = 10;
/// Without any event.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// While there is no directory to have events from.
const LOOK_FOR_IT: Duration = Duration::from_secs(1);

/// A watched directory.
#[derive(Debug)]
pub struct DirWatch {
    path: PathBuf,
    events: AsyncFd<Inotify>,
    /// How long to wait for an event.
    patience: Duration,
}

impl DirWatch {
    /// Starts watching `path`. Needs a tokio runtime with IO and time.
    ///
    /// # Errors
    ///
    /// If it is no directory, is not readable, or the user's inotify limits are reached.
    pub fn open(path: &Path) -> io::Result<Self> {
        let events = Inotify::init()?;
        add(&events, path)?;
        #[expect(
            deprecated,
            reason = "`Inotify` keeps its descriptor open as long as it lives, which is all that the \
                      replacement asks for; that one is `unsafe`, which has its place elsewhere"
        )]
        let events = AsyncFd::new(events)?;
        Ok(Self { path: path.into(), events, patience: LOOK_AGAIN })
    }

    /// Waits until something may have changed since the last call, or since `open`.
    ///
    /// Cancel-safe, except that a change seen and not yet returned is noticed at the next look.
    pub async fn changed(&mut self) {
        if timeout(self.patience, self.drain()).await.is_ok() {
            for _ in 0..LONGEST_BURST {
                if timeout(QUIET, self.drain()).await.is_err() {
                    break;
                }
                sleep(QUIET).await;
            }
        }
        // Idempotent on the same directory. One that was replaced has another inode, and one that
        // is gone is tried again next time.
        self.patience = match add(self.events.get_ref(), &self.path) {
            Ok(()) => LOOK_AGAIN,
            Err(_gone) => LOOK_FOR_IT,
        };
    }

    /// Waits for events and takes all of them.
    async fn drain(&mut self) {
        let mut buffer = [0; 4096];
        loop {
            let Ok(mut ready) = self.events.readable_mut().await else {
                return sleep(LOOK_AGAIN).await;
            };
            let taken =
                ready.try_io(|events| events.get_mut().read_events(&mut buffer).map(|e| e.count()));
            match taken {
                Ok(Ok(_)) => return,
                // Spinning on a broken descriptor would cost a CPU; looking now and then does not.
                Ok(Err(_)) => return sleep(LOOK_AGAIN).await,
                Err(_would_block) => {}
            }
        }
    }
}

fn add(events: &Inotify, path: &Path) -> io::Result<()> {
    let mask = WatchMask::CREATE
        | WatchMask::CLOSE_WRITE
        | WatchMask::MOVED_TO
        | WatchMask::MOVED_FROM
        | WatchMask::DELETE
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR;
    events.watches().add(path, mask).map(drop)
}

/// A directory for one test.
#[cfg(test)]
pub(crate) mod testing {
    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::{env, fs, process};

    /// Removed with all that is in it when dropped.
    #[derive(Debug)]
    pub(crate) struct TempDir(PathBuf);

    impl TempDir {
        pub(crate) fn new() -> Self {
            static NEXT: AtomicUsize = AtomicUsize::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = env::temp_dir().join(format!("malla-test-{}-{number}", process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        pub(crate) fn path(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            _ = fs::remove_dir_all(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Instant;

    use super::testing::TempDir;
    use super::*;

    async fn notices(watch: &mut DirWatch) -> bool {
        let begin = Instant::now();
        watch.changed().await;
        begin.elapsed() < LOOK_AGAIN / 2
    }

    #[tokio::test]
    async fn write_rename_and_delete_are_noticed() {
        let dir = TempDir::new();
        let mut watch = DirWatch::open(dir.path()).unwrap();
        fs::write(dir.path().join("a"), "1").unwrap();
        assert!(notices(&mut watch).await);
        fs::write(dir.path().join("a"), "2").unwrap();
        assert!(notices(&mut watch).await);
        fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
        assert!(notices(&mut watch).await);
        fs::remove_file(dir.path().join("b")).unwrap();
        assert!(notices(&mut watch).await);
    }

    #[tokio::test]
    async fn directory_that_comes_back_is_watched_again() {
        let dir = TempDir::new();
        let inside = dir.path().join("inside");
        fs::create_dir(&inside).unwrap();
        let mut watch = DirWatch::open(&inside).unwrap();
        fs::remove_dir(&inside).unwrap();
        assert!(notices(&mut watch).await);
        fs::create_dir(&inside).unwrap();
        watch.changed().await; // Finds it by looking.
        fs::write(inside.join("a"), "1").unwrap();
        assert!(notices(&mut watch).await);
    }

    #[tokio::test]
    async fn what_is_no_directory_is_refused() {
        let dir = TempDir::new();
        fs::write(dir.path().join("a"), "1").unwrap();
        assert!(DirWatch::open(&dir.path().join("a")).is_err());
        assert!(DirWatch::open(&dir.path().join("b")).is_err());
    }
}
