//! Which namespaces have the routes that show applications their clients ([`crate::net`]), and when
//! those go.
//!
//! Connections outlive their pod's enrolment, and live by the routes. So a namespace that needs them no
//! longer is *retired*: they go when the last such connection has ended. A note among the pins,
//! `routes/<inode of the namespace> -> <pod>`, is written before anything else and removed after
//! everything else, so that whatever ends this process, its successor or `detach` finds them.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::CaptureError;
use super::pins::{Pins, failed, list};
use crate::net::{self, Netns};

/// The namespaces that have routes, by inode: a namespace that is held open keeps its own.
#[derive(Debug)]
pub(super) struct Routes {
    dir: PathBuf,
    retiring: HashMap<u64, Arc<Netns>>,
}

/// What a note says.
#[derive(Debug)]
struct Note {
    path: PathBuf,
    inode: u64,
    pod: String,
}

impl Routes {
    /// Begins with the notes of earlier agents, also of those with another layout.
    pub(super) fn open(pins: &Pins, older: &[PathBuf]) -> Result<Self, CaptureError> {
        let dir = pins.routes();
        for note in older.iter().map(|layout| notes(layout)).collect::<Result<Vec<_>, _>>()? {
            for Note { path, inode, .. } in note {
                fs::rename(&path, dir.join(inode.to_string())).map_err(failed("move", &path))?;
            }
        }
        Ok(Self { dir, retiring: HashMap::new() })
    }

    /// Before the first delivery that could need them.
    pub(super) fn add(
        &mut self,
        uid: &str,
        netns: &Netns,
        ips: &[IpAddr],
    ) -> Result<(), CaptureError> {
        let path = self.note(netns.inode());
        match symlink(uid, &path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("note", &path)(error));
            }
            _written => {}
        }
        self.retiring.remove(&netns.inode());
        net::add_client_address_routes(netns, ips)
            .map_err(|source| CaptureError::Routes { uid: uid.to_owned(), source })
    }

    /// Nothing new will need them in this namespace, if it has any.
    pub(super) fn release(&mut self, netns: &Arc<Netns>) {
        if fs::symlink_metadata(self.note(netns.inode())).is_ok() {
            self.retiring.insert(netns.inode(), Arc::clone(netns));
        }
    }

    /// Takes away what no connection lives by any more; says whether some are left.
    pub(super) fn retire(&mut self) -> bool {
        let Self { dir, retiring } = self;
        retiring.retain(|inode, netns| match net::retire_client_address_routes(netns) {
            Ok(false) => true,
            Ok(true) => {
                forget(&dir.join(inode.to_string()));
                false
            }
            Err(error) => {
                // The note stays, and with it another try when pods next change.
                tracing::warn!(
                    %error,
                    netns = inode,
                    stage = "deliver",
                    "the routes for client addresses stay in a namespace that does not need them"
                );
                false
            }
        });
        !retiring.is_empty()
    }

    /// Retires what an earlier agent left in namespaces that are not among `needed`, unless their pod
    /// is one of `expected`.
    pub(super) fn adopt(
        &mut self,
        needed: &HashSet<u64>,
        expected: &HashSet<String>,
    ) -> Result<(), CaptureError> {
        let mut left: HashMap<u64, PathBuf> = read(&self.dir)?
            .into_iter()
            .filter(|note| !needed.contains(&note.inode) && !expected.contains(&note.pod))
            .filter(|note| !self.retiring.contains_key(&note.inode))
            .map(|note| (note.inode, note.path))
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        for (inode, path) in namespaces() {
            if left.contains_key(&inode)
                && let Ok(netns) = Netns::open(&path)
            {
                left.remove(&inode);
                self.retiring.insert(inode, Arc::new(netns));
            }
        }
        // Gone, and the routes with them.
        left.values().for_each(|path| forget(path));
        Ok(())
    }

    fn note(&self, inode: u64) -> PathBuf {
        self.dir.join(inode.to_string())
    }
}

/// The inodes of the namespaces in which a layout's agent has added routes.
pub(super) fn noted(layout: &Path) -> Result<impl Iterator<Item = u64>, CaptureError> {
    Ok(notes(layout)?.into_iter().map(|note| note.inode))
}

/// Takes the routes away from the namespaces with these inodes at once: for when no agent runs, and so
/// no delivery. Returns where.
pub(super) fn remove_from(mut inodes: HashSet<u64>) -> Vec<PathBuf> {
    let found = namespaces().filter(|(inode, _path)| inodes.remove(inode));
    let removed = found.filter(|(_inode, path)| {
        Netns::open(path).is_ok_and(|netns| net::remove_client_address_routes(&netns).is_ok())
    });
    removed.map(|(_inode, path)| path).collect()
}

fn notes(layout: &Path) -> Result<Vec<Note>, CaptureError> {
    read(&layout.join("routes"))
}

/// What is no note of ours is left out, and `pins` removes it with the directory.
fn read(dir: &Path) -> Result<Vec<Note>, CaptureError> {
    let note = |path: PathBuf| {
        let inode = path.file_name()?.to_str()?.parse().ok()?;
        let pod = fs::read_link(&path).ok()?.to_str()?.to_owned();
        Some(Note { path, inode, pod })
    };
    Ok(list(dir)?.into_iter().filter_map(note).collect())
}

fn forget(note: &Path) {
    if let Err(error) = fs::remove_file(note) {
        tracing::warn!(%error, note = %note.display(), stage = "capture", "a note stays");
    }
}

/// Every place where a network namespace can be found by name or by process: the same one is found in
/// several, and most are no pod's, so look before entering.
fn namespaces() -> impl Iterator<Item = (u64, PathBuf)> {
    let list = |dir| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let named = list("/run/netns");
    let processes = list("/proc").map(|process| process.join("ns/net"));
    named.chain(processes).filter_map(|path| Some((fs::metadata(&path).ok()?.ino(), path)))
}
