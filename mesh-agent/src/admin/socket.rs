//! The Unix socket that the command line asks.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _,
};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process;

use thiserror::Error;
use tokio::net::UnixListener;

/// Why there is no admin socket.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdminError {
    /// Another agent answers there.
    #[error("another agent answers at {path}: stop it, or choose another --admin-socket")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else is there, which is not ours to remove.
    #[error("{path} is not a socket: remove it, or choose another --admin-socket")]
    NotASocket {
        /// What is there.
        path: PathBuf,
    },
    /// A leftover could not be removed.
    #[error("remove the admin socket {path}")]
    Remove {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket could not be made.
    #[error("make the admin socket {path}")]
    Make {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl AdminError {
    /// The log field: a closed set.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InUse { .. } => "in_use",
            Self::NotASocket { .. } => "not_a_socket",
            Self::Remove { .. } => "remove",
            Self::Make { .. } => "make",
        }
    }
}

/// A listening socket that only its owner may use; removed when dropped.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    path: OwnedPath,
}

/// A socket's path, removed when dropped if it is still the same socket: a successor may have put
/// its own there.
#[derive(Debug)]
pub(super) struct OwnedPath {
    path: PathBuf,
    inode: u64,
}

impl AdminSocket {
    /// Listens at `path`. A socket that nobody answers is a leftover and is replaced.
    ///
    /// # Errors
    ///
    /// If another agent answers there, something else is there, or the socket cannot be made. Needs
    /// a tokio runtime.
    pub fn bind(path: &Path) -> Result<Self, AdminError> {
        refuse_what_is_not_ours(path)?;
        let make = |source| AdminError::Make { path: path.into(), source };
        if let Some(dir) = path.parent().filter(|dir| !dir.exists()) {
            DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(make)?;
        }
        // Made under another name and moved into place, so that at `path` there is never a socket
        // that others may open.
        let mut hidden = path.as_os_str().to_owned();
        hidden.push(format!(".{}", process::id()));
        let hidden = PathBuf::from(hidden);
        let moved = || {
            fs::remove_file(&hidden).or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            })?;
            let listener = UnixListener::bind(&hidden)?;
            fs::set_permissions(&hidden, Permissions::from_mode(0o600))?;
            fs::rename(&hidden, path)?;
            let inode = fs::symlink_metadata(path)?.ino();
            Ok((listener, inode))
        };
        let (listener, inode) = moved().map_err(|error| {
            fs::remove_file(&hidden).ok();
            make(error)
        })?;
        Ok(Self { listener, path: OwnedPath { path: path.into(), inode } })
    }

    /// Removes what an agent that was killed left at `path`, and says whether there was anything.
    ///
    /// # Errors
    ///
    /// If an agent answers there, something else is there, or it cannot be removed.
    pub fn remove_leftover(path: &Path) -> Result<bool, AdminError> {
        refuse_what_is_not_ours(path)?;
        match fs::remove_file(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(AdminError::Remove { path: path.into(), source }),
        }
    }

    /// What to accept from, and what removes the path when dropped.
    pub(super) fn into_parts(self) -> (UnixListener, OwnedPath) {
        (self.listener, self.path)
    }
}

fn refuse_what_is_not_ours(path: &Path) -> Result<(), AdminError> {
    let Ok(there) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !there.file_type().is_socket() {
        return Err(AdminError::NotASocket { path: path.into() });
    }
    match UnixStream::connect(path) {
        Ok(_somebody) => Err(AdminError::InUse { path: path.into() }),
        Err(_nobody) => Ok(()),
    }
}

impl Drop for OwnedPath {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|there| there.ino() == self.inode) {
            // Left behind it would be replaced by the next agent.
            fs::remove_file(&self.path).ok();
        }
    }
}
