//! Attaching programs so that a restart leaves no gap: links are pinned, and a new agent moves them to
//! its programs (`BPF_LINK_UPDATE`) instead of making its own.
//!
//! After an upgrade that changed a layout, the old programs go on with the old maps until the new maps
//! know every pod ([`Programs::take_over`]): until then pods see what they see while an agent is down,
//! never a moment without capture.
//!
//! A pod in strict mode has another program of `sk_lookup` than one that accepts plain text.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use aya::Ebpf;
use aya::programs::{CgroupSockAddr, ProgramError, ProgramFd, SkLookup, SockOps};
use mesh_core::settings::Mode;

use super::pins::{Pins, failed, lookup_name, lookups, open_link, remove_layout};
use super::redirect::Redirect;
use super::sys::{self, AttachType, LinkInfo, Target};
use super::{CaptureError, PodCapture, lock};

/// A program that hangs on the cgroup.
struct Hook {
    program: &'static str,
    /// Also the name of its pin.
    what: &'static str,
    attach_type: AttachType,
}

/// Readers before the writer: whoever is captured by `connect` finds the others in place.
const HOOKS: [Hook; 5] = [
    Hook { program: "mesh_peername4", what: "getpeername4", attach_type: AttachType::Peername4 },
    Hook { program: "mesh_peername6", what: "getpeername6", attach_type: AttachType::Peername6 },
    Hook { program: "mesh_sockops", what: "sockops", attach_type: AttachType::SockOps },
    Hook { program: "mesh_connect4", what: "connect4", attach_type: AttachType::Connect4 },
    Hook { program: "mesh_connect6", what: "connect6", attach_type: AttachType::Connect6 },
];

/// Loads what [`Capture::start`](super::Capture::start) would, and lets go of it: whether this kernel, and
/// what this process may do, allow it. Nothing is attached or pinned.
///
/// # Errors
///
/// They do not.
pub fn rehearse(redirect_peer: bool) -> Result<(), CaptureError> {
    let mut ebpf = super::loader()
        .load(super::OBJECT)
        .map_err(|error| CaptureError::Load { what: "the maps", source: error.into() })?;
    load_all(&mut ebpf)?;
    if redirect_peer {
        Redirect::take(&mut ebpf)?;
    }
    Ok(())
}

/// A program of `sk_lookup`.
#[derive(Debug)]
struct Lookup {
    program: OwnedFd,
    id: u32,
}

impl Lookup {
    fn load(ebpf: &mut Ebpf, what: &'static str) -> Result<Self, CaptureError> {
        let program = load(ebpf, what, SkLookup::load, SkLookup::fd)?;
        let id = sys::program_id(program.as_fd())
            .map_err(|source| CaptureError::Load { what, source: source.into() })?;
        Ok(Self { program, id })
    }
}

/// Those of pods by their mode.
#[derive(Debug)]
struct Lookups {
    permissive: Lookup,
    strict: Lookup,
}

impl Lookups {
    fn load(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        Ok(Self {
            permissive: Lookup::load(ebpf, "mesh_lookup")?,
            strict: Lookup::load(ebpf, "mesh_strict")?,
        })
    }

    fn of(&self, mode: Mode) -> &OwnedFd {
        match mode {
            Mode::Permissive => &self.permissive.program,
            Mode::Strict => &self.strict.program,
        }
    }

    /// Whether one of them has this ID.
    fn have(&self, id: u32) -> bool {
        id == self.permissive.id || id == self.strict.id
    }
}

/// The hooks' programs in their order, and those of `sk_lookup`.
fn load_all(ebpf: &mut Ebpf) -> Result<(Vec<OwnedFd>, Lookups), CaptureError> {
    let mut hooks = Vec::new();
    for hook in &HOOKS {
        let fd = if hook.attach_type == AttachType::SockOps {
            load(ebpf, hook.program, SockOps::load, SockOps::fd)?
        } else {
            load(ebpf, hook.program, CgroupSockAddr::load, CgroupSockAddr::fd)?
        };
        hooks.push(fd);
    }
    Ok((hooks, Lookups::load(ebpf)?))
}

/// The loaded programs, and where older agents left links.
#[derive(Debug)]
pub(super) struct Programs {
    hooks: Vec<OwnedFd>,
    lookups: Lookups,
    cgroup: OwnedFd,
    cgroup_id: u64,
    /// Directories of other layouts, until [`Self::take_over`].
    older: Mutex<Vec<PathBuf>>,
}

impl Programs {
    pub(super) fn load(
        ebpf: &mut Ebpf,
        cgroup: OwnedFd,
        cgroup_id: u64,
        older: Vec<PathBuf>,
    ) -> Result<Self, CaptureError> {
        let (hooks, lookups) = load_all(ebpf)?;
        Ok(Self { hooks, lookups, cgroup, cgroup_id, older: Mutex::new(older) })
    }

    /// Directories of other layouts whose agents' programs are still in place.
    pub(super) fn older(&self) -> Vec<PathBuf> {
        lock(&self.older).clone()
    }

    /// Puts every hook in place, or leaves it to [`Self::take_over`] when an older agent's is there.
    pub(super) fn attach_hooks(&self, pins: &Pins) -> Result<(), CaptureError> {
        for (hook, program) in HOOKS.iter().zip(&self.hooks) {
            let path = pins.link(hook.what);
            if self.older_link(hook.what).is_some() && !path.exists() {
                continue;
            }
            self.attach_hook(hook, program, &path)?;
        }
        Ok(())
    }

    /// Gives the links of these pods that an agent of another layout made their place among ours. They run
    /// its programs until [`Self::take_over`].
    pub(super) fn adopt_lookups(
        &self,
        pins: &Pins,
        uids: &HashSet<String>,
    ) -> Result<(), CaptureError> {
        for layout in self.older() {
            for (uid, old) in lookups(&layout)? {
                if uids.contains(&uid) {
                    adopt(&old, &pins.lookup(&uid), AttachType::SkLookup)?;
                }
            }
        }
        Ok(())
    }

    /// Moves what an older agent of another layout left to our programs, and removes its pins. Pods that
    /// are not among `permissive` are strict: of those that are still to be enrolled nobody knows.
    ///
    /// For when our maps have all pods of the node. Crash-safe: what was not moved is found again.
    /// `inherit` takes what is worth keeping out of the maps in a layout's directory before that goes.
    pub(super) fn take_over(
        &self,
        pins: &Pins,
        permissive: &HashSet<String>,
        mut inherit: impl FnMut(&Path),
    ) -> Result<(), CaptureError> {
        let mut older = lock(&self.older);
        for (hook, program) in HOOKS.iter().zip(&self.hooks) {
            let path = pins.link(hook.what);
            for layout in older.iter() {
                adopt(&layout.join("links").join(hook.what), &path, hook.attach_type)?;
            }
            self.attach_hook(hook, program, &path)?;
        }
        if !older.is_empty() {
            for (uid, path) in lookups(pins.dir())? {
                let Some((link, _info)) = open_link(&path, AttachType::SkLookup)? else { continue };
                let mode = if permissive.contains(&uid) { Mode::Permissive } else { Mode::Strict };
                // In a namespace that is gone, maybe just now, nothing arrives.
                let is_gone = |error: &std::io::Error| error.raw_os_error() == Some(libc::ENOLINK);
                match sys::update_link(link.as_fd(), self.lookups.of(mode).as_fd()) {
                    Err(source) if !is_gone(&source) => {
                        return Err(CaptureError::Attach { what: "sk_lookup", source });
                    }
                    _ => {}
                }
            }
        }
        for layout in older.drain(..) {
            inherit(&layout);
            remove_layout(&layout)?;
        }
        Ok(())
    }

    fn attach_hook(&self, hook: &Hook, program: &OwnedFd, path: &Path) -> Result<(), CaptureError> {
        let attach = |source| CaptureError::Attach { what: hook.what, source };
        if let Some((link, info)) = open_link(path, hook.attach_type)? {
            if info.target == (Target::Cgroup { id: self.cgroup_id }) {
                return sys::update_link(link.as_fd(), program.as_fd()).map_err(attach);
            }
            // Another `--cgroup` than before: a link cannot move, so a short gap there is.
            fs::remove_file(path).map_err(failed("remove", path))?;
        }
        let link = sys::create_link(program.as_fd(), self.cgroup.as_fd(), hook.attach_type)
            .map_err(attach)?;
        sys::pin(link.as_fd(), path).map_err(failed("pin", path))
    }

    /// Links the lookup program of the pod's mode to its namespace, or moves the link that is there.
    pub(super) fn attach_lookup(
        &self,
        pins: &Pins,
        pod: &PodCapture<'_>,
    ) -> Result<(), CaptureError> {
        let (path, mode) = (pins.lookup(pod.uid), pod.settings.mode);
        if let Some(old) = self.older_link(&lookup_name(pod.uid)).filter(|_| !path.exists()) {
            adopt(&old, &path, AttachType::SkLookup)?;
        }
        if let Some((link, info)) = open_link(&path, AttachType::SkLookup)? {
            let inode = pod.netns.inode();
            if matches!(info.target, Target::Netns { inode: at } if u64::from(at) == inode) {
                return self.move_lookup(&link, &info, mode);
            }
            // The pod's sandbox was made anew: the link is dead, or of the one before.
            remove_lookup(&path)?;
        }
        let program = self.lookups.of(mode);
        let link = sys::create_link(program.as_fd(), pod.netns.as_fd(), AttachType::SkLookup)
            .map_err(|source| CaptureError::Attach { what: "sk_lookup", source })?;
        sys::pin(link.as_fd(), &path).map_err(failed("pin", &path))
    }

    /// Moves the link of an enrolled pod to the lookup program of this mode.
    pub(super) fn set_mode(&self, pins: &Pins, uid: &str, mode: Mode) -> Result<(), CaptureError> {
        match open_link(&pins.lookup(uid), AttachType::SkLookup)? {
            Some((link, info)) => self.move_lookup(&link, &info, mode),
            None => Ok(()),
        }
    }

    fn move_lookup(&self, link: &OwnedFd, info: &LinkInfo, mode: Mode) -> Result<(), CaptureError> {
        if !self.lookups.have(info.program) && !lock(&self.older).is_empty() {
            // What tells it of deliveries is the older agent's until `take_over`, and so this has to be.
            return Ok(());
        }
        sys::update_link(link.as_fd(), self.lookups.of(mode).as_fd())
            .map_err(|source| CaptureError::Attach { what: "sk_lookup", source })
    }

    /// Whether an agent, of whatever layout, had or has captured this pod.
    pub(super) fn has_lookup(&self, pins: &Pins, uid: &str) -> bool {
        pins.lookup(uid).exists() || self.older_link(&lookup_name(uid)).is_some()
    }

    /// Where an older agent pinned the link of this name.
    fn older_link(&self, name: &str) -> Option<PathBuf> {
        lock(&self.older).iter().map(|dir| dir.join("links").join(name)).find(|path| path.exists())
    }
}

/// Removes the pins of links whose namespace is gone: the kernel keeps such a link for ever.
pub(super) fn remove_dead_lookups(layout: &Path) -> Result<(), CaptureError> {
    for (_uid, path) in lookups(layout)? {
        let dead = open_link(&path, AttachType::SkLookup)?
            .is_some_and(|(_link, info)| info.target == Target::Netns { inode: 0 });
        if dead {
            fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
    }
    Ok(())
}

/// Ends the link to a pod's namespace, if there is one, and removes its pin.
///
/// Detached first: a link goes on after its last pin is gone, until the kernel gets round to freeing it,
/// and a namespace has room for 64. A pod that came and left quickly would run out of them.
pub(super) fn remove_lookup(path: &Path) -> Result<(), CaptureError> {
    if let Some((link, _info)) = open_link(path, AttachType::SkLookup)? {
        // It fails when the namespace is gone, and then there is nothing to end.
        drop(sys::detach_link(link.as_fd()));
        fs::remove_file(path).map_err(failed("remove", path))?;
    }
    Ok(())
}

/// Gives a link of an older agent its place among ours; its program is still the old one.
fn adopt(old: &Path, new: &Path, attach_type: AttachType) -> Result<(), CaptureError> {
    let Some((link, _info)) = open_link(old, attach_type)? else {
        return Ok(());
    };
    if !new.exists() {
        sys::pin(link.as_fd(), new).map_err(failed("pin", new))?;
    }
    fs::remove_file(old).map_err(failed("remove", old))
}

pub(super) fn load<'a, P>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
    mut load: impl FnMut(&mut P) -> Result<(), ProgramError>,
    fd: impl FnOnce(&P) -> Result<&ProgramFd, ProgramError>,
) -> Result<OwnedFd, CaptureError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
    P: 'a,
{
    let refused = |source: Box<dyn std::error::Error + Send + Sync>| CaptureError::Load {
        what: name,
        source,
    };
    let program =
        ebpf.program_mut(name).ok_or_else(|| refused("the object has no such program".into()))?;
    let program: &mut P =
        program.try_into().map_err(|error: ProgramError| refused(error.into()))?;
    verified(|| load(program)).map_err(|error| refused(error.into()))?;
    let fd = fd(program).map_err(|error| refused(error.into()))?;
    fd.as_fd().try_clone_to_owned().map_err(|error| refused(error.into()))
}

/// Calls `load` until the verifier has come to an end.
pub(super) fn verified(load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    until_verified(load, was_interrupted)
}

/// Whether the verifier gave up because a signal waits for this thread (`do_check`, Linux 5.1 and newer):
/// nothing is wrong with the program.
fn was_interrupted(error: &ProgramError) -> bool {
    matches!(error, ProgramError::LoadError { io_error, .. }
        if io_error.raw_os_error() == Some(libc::EAGAIN))
}

/// Calls `load` again while it is interrupted, as often as libbpf does.
fn until_verified<E>(
    mut load: impl FnMut() -> Result<(), E>,
    was_interrupted: impl Fn(&E) -> bool,
) -> Result<(), E> {
    const TRIES: usize = 5;
    for _ in 1..TRIES {
        match load() {
            Err(error) if was_interrupted(&error) => {}
            loaded => return loaded,
        }
    }
    load()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_is_loaded_again_while_the_verifier_is_interrupted() {
        let attempt = |interruptions, then: Result<(), &'static str>| {
            let mut tries = 0;
            let load = || {
                tries += 1;
                if tries <= interruptions { Err("interrupted") } else { then }
            };
            let loaded = until_verified(load, |error| *error == "interrupted");
            (loaded, tries)
        };
        assert_eq!(attempt(4, Ok(())), (Ok(()), 5));
        assert_eq!(attempt(1, Err("refused")), (Err("refused"), 2));
        assert_eq!(attempt(9, Ok(())), (Err("interrupted"), 5));
    }
}
