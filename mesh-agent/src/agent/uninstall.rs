//! What an agent leaves for the next one, and removes where there is to be none.

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context as _, Result};
use tracing::{error, info};

use super::turn::lock_path;
use crate::admin::{AdminError, AdminSocket};
use crate::capture::Capture;
use crate::mounted;
use crate::tunnel::ResetKey;

/// Removes everything that an agent leaves for the next one.
pub(super) fn remove(bpffs: &Path, admin_socket: &Path) {
    let removed = Capture::detach(bpffs).map_err(anyhow::Error::from).and_then(|detached| {
        remove_files(admin_socket)?;
        Ok(detached)
    });
    match removed {
        Ok(detached) => {
            info!(removed = detached.removed.len(), "uninstalled: nothing is left in the kernel");
        }
        Err(error) => {
            error!(
                error = format!("{error:#}"),
                "not all is removed: `mesh-agent detach` tries again"
            );
        }
    }
}

/// Removes what an agent keeps outside the kernel, unless one is running, and returns what that was.
///
/// # Errors
///
/// If something of it cannot be removed, or is something else.
pub fn remove_files(admin_socket: &Path) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    match AdminSocket::remove_leftover(admin_socket) {
        Ok(true) => removed.push(admin_socket.to_owned()),
        Ok(false) => {}
        Err(AdminError::InUse { .. }) => return Ok(removed),
        Err(error) => return Err(error.into()),
    }
    for file in [ResetKey::path(admin_socket), lock_path(admin_socket)] {
        match fs::remove_file(&file) {
            Ok(()) => removed.push(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("remove {}", file.display()));
            }
        }
    }
    // What somebody else keeps there keeps it.
    if let Some(dir) = admin_socket.parent().filter(|dir| mounted::remove_dir(dir)) {
        removed.push(dir.to_owned());
    }
    Ok(removed)
}
