//! Directories of the node that a container has mounted, as a `hostPath` of the kubelet's: removed, they stay where
//! they are for whoever has mounted them, which is why nobody in that container can.
//!
//! Process 1 sees the same directory where it lies on the node, if the container shares the node's processes.
//!
//! # Guarantees
//!
//! - What is removed is the very directory that is mounted here, by device and inode, and empty.
//! - A directory that the node itself has mounted there stays: its mount would go with it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Removes an empty directory, on the node if it is mounted here from there, and says whether it is gone by that.
pub fn remove_dir(dir: &Path) -> bool {
    // EBUSY, or EROFS in a container whose own files are read-only.
    fs::remove_dir(dir).is_ok() || on_node(dir).is_some_and(|there| fs::remove_dir(there).is_ok())
}

/// Where process 1 has what is mounted at `dir`.
fn on_node(dir: &Path) -> Option<PathBuf> {
    // What is mounted where process 1 sees it too is the node's own affair.
    let namespace = |process: &str| inode(&Path::new("/proc").join(process).join("ns/mnt"));
    if namespace("self")? == namespace("1")? {
        return None;
    }
    let dir = fs::canonicalize(dir).ok()?;
    let here = mounts(&fs::read("/proc/self/mountinfo").ok()?);
    let there = mounts(&fs::read("/proc/1/mountinfo").ok()?);
    let wanted = inode(&dir)?;
    places(&here, &there, &dir)
        .filter_map(|place| Some(Path::new("/proc/1/root").join(place.strip_prefix("/").ok()?)))
        .find(|place| inode(place) == Some(wanted))
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).map(|found| (found.dev(), found.ino())).ok()
}

/// Where in `there` what `here` has mounted at `dir` may be seen, but for mount points.
fn places<'a>(
    here: &[Mount],
    there: &'a [Mount],
    dir: &Path,
) -> impl Iterator<Item = PathBuf> + use<'a> {
    // Of several at one place the last one is seen.
    let mounted = here.iter().rev().find(|mount| mount.point == dir).cloned();
    let of_same = there.iter().filter_map(move |mount| {
        let mounted = mounted.as_ref().filter(|mounted| mounted.device == mount.device)?;
        let below = mounted.root.strip_prefix(&mount.root).ok()?;
        (!below.as_os_str().is_empty()).then(|| mount.point.join(below))
    });
    of_same.filter(|place| !there.iter().any(|mount| mount.point == *place))
}

/// One that a process sees.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    /// `major:minor`.
    device: OsString,
    /// What of the file system is mounted.
    root: PathBuf,
    /// Where.
    point: PathBuf,
}

/// Reads `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`: `proc_pid_mountinfo(5)`.
fn mounts(text: &[u8]) -> Vec<Mount> {
    let lines = text.split(|byte| *byte == b'\n');
    let read = lines.filter_map(|line| {
        let mut words = line.split(|byte| *byte == b' ').skip(2).map(unescaped);
        let (device, root, point) = (words.next()?, words.next()?, words.next()?);
        Some(Mount { device, root: root.into(), point: point.into() })
    });
    // A namespace has none: `net:[4026531840]`.
    read.filter(|mount| mount.root.is_absolute() && mount.point.is_absolute()).collect()
}

/// A word in which the kernel has written space, tab, line feed and backslash as three octal digits.
fn unescaped(word: &[u8]) -> OsString {
    let mut read = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&byte, after)) = rest.split_first() {
        let code = after
            .first_chunk::<3>()
            .filter(|_| byte == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        read.push(code.unwrap_or(byte));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(read)
}

/// For the fuzzer (`mesh-agent/fuzz`).
#[cfg(any(fuzzing, test))]
pub mod fuzzing {
    use super::{mounts, places};

    /// Any two texts, of which the first NUL parts one from the other, are what two processes see mounted; what is found
    /// lies below something that the second one sees, and is no mount point of it.
    pub fn mounted(input: &[u8]) {
        let (here, there) = match input.iter().position(|byte| *byte == 0) {
            Some(at) => (&input[..at], &input[at + 1..]),
            None => (input, input),
        };
        let (here, there) = (mounts(here), mounts(there));
        for mount in here.iter().take(8) {
            for place in places(&here, &there, &mount.point) {
                assert!(there.iter().any(|seen| place.starts_with(&seen.point)), "{place:?}");
                assert!(there.iter().all(|seen| seen.point != place), "{place:?}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A container's, as containerd makes it.
    const HERE: &[u8] = b"\
        1000 900 0:60 / / ro,relatime - overlay overlay rw\n\
        1001 1000 0:24 /malla /run/malla rw,nosuid master:12 - tmpfs tmpfs rw\n\
        1002 1000 0:33 /malla /host/bpf rw master:9 - bpf bpf rw\n\
        1003 1000 8:1 /var/lib/mal\\040la /space rw - ext4 /dev/sda1 rw\n\
        1004 1000 0:40 / /whole rw - tmpfs tmpfs rw\n";

    fn found(there: &[u8], dir: &str) -> Vec<PathBuf> {
        places(&mounts(HERE), &mounts(there), Path::new(dir)).collect()
    }

    #[test]
    fn seeds_of_the_fuzzer_hold() {
        crate::fuzzing::replay("mounted", fuzzing::mounted);
    }

    #[test]
    fn directory_is_found_where_the_node_has_its_file_system() {
        let node = b"\
            30 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            31 30 0:24 / /run rw - tmpfs tmpfs rw\n\
            32 30 0:33 / /sys/fs/bpf rw - bpf bpf rw\n\
            33 30 0:40 / /whole rw - tmpfs tmpfs rw\n";
        let on = |path: &str| vec![PathBuf::from(path)];
        assert_eq!(found(node, "/run/malla"), on("/run/malla"));
        assert_eq!(found(node, "/host/bpf"), on("/sys/fs/bpf/malla"));
        assert_eq!(found(node, "/space"), on("/var/lib/mal la"));
        assert!(found(node, "/whole").is_empty(), "there it is a mount point, too");
        assert!(found(node, "/host").is_empty(), "nothing is mounted there");
        // A node that is a container itself has all of it in one file system, or seen at several places.
        let node = b"30 1 0:24 / / rw - tmpfs tmpfs rw\n31 30 0:24 /malla /elsewhere rw - tmpfs tmpfs rw\n";
        assert_eq!(found(node, "/run/malla"), on("/malla"));
    }

    #[test]
    fn mount_point_of_the_node_is_none_to_remove() {
        let node = b"\
            31 30 0:24 / /run rw - tmpfs tmpfs rw\n\
            32 31 0:24 /malla /run/malla rw - tmpfs tmpfs rw\n";
        assert!(found(node, "/run/malla").is_empty());
        assert!(found(HERE, "/run/malla").is_empty(), "process 1 is in this very container");
        assert!(found(b"", "/run/malla").is_empty());
        assert!(found(b"torn 1 0:24\n\n", "/run/malla").is_empty());
    }

    #[test]
    fn escapes_are_read_and_what_is_none_stays() {
        for (written, read) in [
            ("a\\040b\\134", "a b\\"),
            ("\\011", "\t"),
            ("\\9", "\\9"),
            ("\\04", "\\04"),
            ("\\777", "\\777"),
        ] {
            assert_eq!(unescaped(written.as_bytes()), OsString::from(read), "{written}");
        }
    }
}
