//! The key of QUIC's stateless resets (RFC 9000 section 10.3), which outlives the agent.
//!
//! A peer's connection to an agent that was killed is dead, and only the next agent can say so: with a
//! token that the dead one promised, made from this key and the connection's id. With another key peers
//! would send into nothing until their idle time-out.
//!
//! # Guarantees
//!
//! - Readable by root alone, and only if it is: a key that others can read or write is replaced.
//! - It is for endpoints that see the packets of no other's connections, which RFC 9000 section 21.11 forbids
//!   to reset: those that serve, of which a node has one, or while one agent follows the other two
//!   (`steering`). What dials has keys of its own.
//!
//! # Not here
//!
//! Anything that proves an identity: who has this key can end connections whose packets it sees, and
//! read or change nothing. That is why it may lie in a file, and keys of workloads may not.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::{fmt, process};

use aws_lc_rs::{hmac, rand};

const LEN: usize = 32;

/// A secret that resets are made from.
#[derive(Clone)]
pub struct ResetKey([u8; LEN]);

impl fmt::Debug for ResetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ResetKey(..)")
    }
}

impl ResetKey {
    /// A key for this process alone.
    ///
    /// # Errors
    ///
    /// Fails if the system has no randomness.
    pub fn random() -> io::Result<Self> {
        let mut key = [0; LEN];
        rand::fill(&mut key).map_err(|_unspecified| io::Error::other("no randomness"))?;
        Ok(Self(key))
    }

    /// Where the key lies: beside the admin socket, in a directory that ends with the machine's uptime,
    /// as all connections do.
    pub fn path(admin_socket: &Path) -> PathBuf {
        admin_socket.with_file_name("quic-reset.key")
    }

    /// The key that the agent before this one had, or a new one in its place.
    ///
    /// # Errors
    ///
    /// Fails if it can neither be read nor made.
    pub fn open(path: &Path) -> io::Result<Self> {
        match Self::read(path) {
            Ok(Some(key)) => return Ok(key),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        if let Some(dir) = path.parent().filter(|dir| !dir.exists()) {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        let key = Self::random()?;
        // Made under another name and moved into place, so that nobody ever reads half of it.
        let mut hidden = path.as_os_str().to_owned();
        hidden.push(format!(".{}", process::id()));
        let hidden = PathBuf::from(hidden);
        Self::forget(&hidden)?;
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&hidden);
        let moved = made?.write_all(&key.0).and_then(|()| fs::rename(&hidden, path));
        if moved.is_err() {
            Self::forget(&hidden).ok();
        }
        moved.map(|()| key)
    }

    /// Removes the key. Says whether there was one.
    ///
    /// # Errors
    ///
    /// Fails if it is there and cannot be removed.
    pub fn forget(path: &Path) -> io::Result<bool> {
        match fs::remove_file(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// `None` if what is there is no key, or not ours alone.
    fn read(path: &Path) -> io::Result<Option<Self>> {
        // A link that leads elsewhere is replaced too.
        if !fs::symlink_metadata(path)?.is_file() {
            return Ok(None);
        }
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        let owner = fs::metadata("/proc/self")?.uid();
        if metadata.mode() & 0o077 != 0 || metadata.uid() != owner {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(LEN + 1);
        file.take(LEN as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes.try_into().ok().map(Self))
    }

    pub(super) fn hmac(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::dirwatch::testing::TempDir;

    #[test]
    fn key_is_the_same_after_a_restart_and_only_its_owner_can_read_it() {
        let dir = TempDir::new();
        let path = ResetKey::path(&dir.path().join("run/admin.sock"));
        let first = ResetKey::open(&path).unwrap();
        assert_eq!(ResetKey::open(&path).unwrap().0, first.0);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(
            fs::read_dir(dir.path().join("run")).unwrap().count(),
            1,
            "nothing else is left"
        );
        assert!(ResetKey::forget(&path).unwrap());
        assert!(!ResetKey::forget(&path).unwrap());
        assert_ne!(ResetKey::open(&path).unwrap().0, first.0);
    }

    #[test]
    fn key_that_others_can_read_or_that_is_none_is_replaced() {
        let dir = TempDir::new();
        let path = ResetKey::path(&dir.path().join("admin.sock"));
        let first = ResetKey::open(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let second = ResetKey::open(&path).unwrap();
        assert_ne!(second.0, first.0);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);

        for wrong in [&second.0[..31], &[7; 33]] {
            fs::write(&path, wrong).unwrap();
            let third = ResetKey::open(&path).unwrap();
            assert_ne!(third.0[..31], second.0[..31]);
            assert_ne!(third.0, [7; 32]);
        }

        let elsewhere = dir.path().join("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        let theirs = fs::read(&elsewhere).unwrap();
        assert_ne!(ResetKey::open(&path).unwrap().0[..], theirs[..]);
        assert!(fs::symlink_metadata(&path).unwrap().is_file());
    }

    #[test]
    fn key_reaches_no_log() {
        let key = ResetKey([7; LEN]);
        assert_eq!(format!("{key:?}"), "ResetKey(..)");
    }
}
