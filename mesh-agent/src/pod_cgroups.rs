//! Notices pods by the cgroups that the kubelet makes for them: before the API tells of any address, and
//! before there is a process.
//!
//! # Guarantees
//!
//! - A cgroup that is made while this watches is told at once (inotify), and one whose event was lost, or
//!   that was made before its parent was watched, with the next look.
//! - Only cgroups of this node: where several nodes share a kernel, as in tests, the processes tell
//!   whose a tree is.
//! - What is watched is bounded; what exceeds it is found by looking.
//!
//! # Not here
//!
//! Which pods these are, and what becomes of them.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use mesh_core::cgroup::pod_of_name;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

use crate::net;
use crate::processes::{DEEPEST, directories, processes};

/// Between looks at all that is there: what events do not tell.
const LOOK: Duration = Duration::from_secs(5);
/// Directories watched at once. A node has three or four that pods lie in, and each pod one while it
/// starts.
const MOST_WATCHES: usize = 2048;
/// What every form of [`mesh_core::cgroup`] calls the tree of all pods.
const KUBEPODS: &str = "kubepods";

/// A pod's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodCgroup {
    /// The pod's UID, as far as the name tells: a static pod's is another one.
    pub uid: String,
    /// The kernel's ID: no other cgroup ever has it.
    pub id: u64,
    /// Where it is.
    pub path: PathBuf,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A pod's cgroup was made.
    Came(PodCgroup),
    /// A container's cgroup was made in that of the pod with this UID: a process follows.
    Grew(String),
    /// The cgroup with this ID, of the pod with this UID, is gone.
    Went(String, u64),
}

#[derive(Debug)]
enum Watched {
    /// A directory that pods' cgroups lie in.
    Parent(PathBuf),
    /// A pod's.
    Pod(String),
}

/// The cgroups of this node's pods, watched.
#[derive(Debug)]
pub struct PodCgroups {
    root: PathBuf,
    events: AsyncFd<Inotify>,
    watched: HashMap<WatchDescriptor, Watched>,
    parents: HashSet<PathBuf>,
    pods: HashMap<String, PodCgroup>,
    look_again: Instant,
}

impl PodCgroups {
    /// Watches below `root`, the root of the node's cgroup2 tree, and returns what is there already. Needs
    /// a tokio runtime with IO and time.
    ///
    /// # Errors
    ///
    /// The user's inotify limits are reached.
    pub fn open(root: &Path) -> io::Result<(Self, Vec<PodCgroup>)> {
        #[expect(
            deprecated,
            reason = "`Inotify` keeps its descriptor open as long as it lives; see `DirWatch`"
        )]
        let events = AsyncFd::new(Inotify::init()?)?;
        let mut this = Self {
            root: root.into(),
            events,
            watched: HashMap::new(),
            parents: HashSet::new(),
            pods: HashMap::new(),
            look_again: Instant::now() + LOOK,
        };
        this.look();
        let mut there: Vec<PodCgroup> = this.pods.values().cloned().collect();
        there.sort_by_key(|pod| pod.id);
        Ok((this, there))
    }

    /// Waits for what happens next. Cancel-safe.
    pub async fn next(&mut self) -> Vec<Seen> {
        loop {
            let look_again = self.look_again;
            let seen = tokio::select! {
                seen = self.events() => seen,
                () = sleep_until(look_again) => self.look(),
            };
            if !seen.is_empty() {
                return seen;
            }
        }
    }

    /// From now on tells what is made in the pod's cgroup.
    pub fn watch(&mut self, uid: &str) -> Vec<Seen> {
        let Some(pod) = self.pods.get(uid) else { return Vec::new() };
        let path = pod.path.clone();
        self.add(&path, Watched::Pod(uid.to_owned()));
        // Before the watch was there.
        let has_grown = directories(&path).next().is_some();
        has_grown.then(|| Seen::Grew(uid.to_owned())).into_iter().collect()
    }

    /// Stops telling that.
    pub fn unwatch(&mut self, uid: &str) {
        let is_its = |watched: &Watched| matches!(watched, Watched::Pod(pod) if pod == uid);
        let found = self.watched.iter().find(|(_, watched)| is_its(watched));
        if let Some(watch) = found.map(|(watch, _)| watch.clone()) {
            self.watched.remove(&watch);
            // It is gone with its directory, or now.
            self.events.get_ref().watches().remove(watch).ok();
        }
    }

    async fn events(&mut self) -> Vec<Seen> {
        let mut buffer = [0; 4096];
        let Ok(mut ready) = self.events.readable_mut().await else {
            return std::future::pending().await;
        };
        let taken = ready.try_io(|events| {
            let events = events.get_mut().read_events(&mut buffer)?;
            let own = |event: inotify::Event<&std::ffi::OsStr>| {
                let name = event.name.and_then(|name| name.to_str()).map(str::to_owned);
                (event.wd, event.mask, name)
            };
            Ok(events.map(own).collect::<Vec<_>>())
        });
        match taken {
            Ok(Ok(events)) => events.into_iter().flat_map(|event| self.event(event)).collect(),
            Ok(Err(_broken)) => {
                // Looking now and then is what is left.
                sleep_until(self.look_again).await;
                Vec::new()
            }
            Err(_would_block) => Vec::new(),
        }
    }

    fn event(
        &mut self,
        (watch, mask, name): (WatchDescriptor, EventMask, Option<String>),
    ) -> Vec<Seen> {
        if mask.contains(EventMask::Q_OVERFLOW) {
            return self.look();
        }
        if mask.contains(EventMask::IGNORED) {
            if let Some(Watched::Parent(path)) = self.watched.remove(&watch) {
                self.parents.remove(&path);
            }
            return Vec::new();
        }
        let (Some(name), Some(watched)) = (name, self.watched.get(&watch)) else {
            return Vec::new();
        };
        if !mask.contains(EventMask::ISDIR) {
            return Vec::new();
        }
        let is_new = mask.contains(EventMask::CREATE);
        match watched {
            Watched::Pod(uid) => is_new.then(|| Seen::Grew(uid.clone())).into_iter().collect(),
            Watched::Parent(parent) => {
                let path = parent.join(&name);
                match pod_of_name(&name) {
                    Some(uid) if is_new => self.came(uid, path),
                    Some(uid) => self.went(&uid, &path),
                    None if is_new => self.parent(path, DEEPEST),
                    None => Vec::new(),
                }
            }
        }
    }

    fn came(&mut self, uid: String, path: PathBuf) -> Vec<Seen> {
        // The kernel's ID of a cgroup is its inode.
        let Some(id) = net::inode(&path) else { return Vec::new() };
        let before = self.pods.get(&uid).map(|pod| pod.id);
        if before == Some(id) {
            return Vec::new();
        }
        let pod = PodCgroup { uid: uid.clone(), id, path };
        self.pods.insert(uid.clone(), pod.clone());
        let went = before.map(|before| Seen::Went(uid, before));
        went.into_iter().chain([Seen::Came(pod)]).collect()
    }

    fn went(&mut self, uid: &str, path: &Path) -> Vec<Seen> {
        if self.pods.get(uid).is_none_or(|pod| pod.path != path) {
            return Vec::new();
        }
        self.unwatch(uid);
        let gone = self.pods.remove(uid);
        gone.map(|pod| Seen::Went(pod.uid, pod.id)).into_iter().collect()
    }

    /// Watches a directory that pods' cgroups may lie in, and finds what is there.
    fn parent(&mut self, path: PathBuf, deep: usize) -> Vec<Seen> {
        if !self.parents.contains(&path) && self.add(&path, Watched::Parent(path.clone())) {
            self.parents.insert(path.clone());
        }
        let mut seen = Vec::new();
        // After watching: what is made meanwhile is told twice, and counts once.
        for (name, place) in directories(&path) {
            if let Some(uid) = pod_of_name(&name) {
                seen.extend(self.came(uid, place));
            } else if deep > 0 {
                seen.extend(self.parent(place, deep - 1));
            }
        }
        seen
    }

    /// Looks at everything.
    fn look(&mut self) -> Vec<Seen> {
        self.look_again = Instant::now() + LOOK;
        let gone: Vec<PodCgroup> = self
            .pods
            .values()
            .filter(|pod| net::inode(&pod.path) != Some(pod.id))
            .cloned()
            .collect();
        let mut seen: Vec<Seen> = Vec::new();
        for pod in gone {
            seen.extend(self.went(&pod.uid, &pod.path));
        }
        let mut trees: Vec<PathBuf> = Vec::new();
        let mut places = vec![(self.root.clone(), 0)];
        while let Some((place, depth)) = places.pop() {
            for (name, path) in directories(&place) {
                let is_tree = name == KUBEPODS || name.ends_with("kubepods.slice");
                if is_tree {
                    trees.push(path);
                } else if depth < DEEPEST && pod_of_name(&name).is_none() {
                    places.push((path, depth + 1));
                }
            }
        }
        // Of another node if all of its processes are. With none at all, the only one is ours.
        let is_only = trees.len() == 1;
        for tree in trees {
            if self.parents.contains(&tree) || is_only || processes(&tree).next().is_some() {
                seen.extend(self.parent(tree, DEEPEST));
            }
        }
        seen
    }

    fn add(&mut self, path: &Path, what: Watched) -> bool {
        if self.watched.len() >= MOST_WATCHES {
            return false;
        }
        let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::ONLYDIR;
        match self.events.get_ref().watches().add(path, mask) {
            Ok(watch) => {
                self.watched.insert(watch, what);
                true
            }
            // Gone, or no more are allowed: what it would have told is found by looking.
            Err(_error) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::dirwatch::testing::TempDir;

    const ONE: &str = "d5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c11";
    const TWO: &str = "d5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c12";
    const THREE: &str = "d5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c13";

    /// How a kubelet calls the cgroups of pods, and a runtime that of a container.
    #[derive(Clone, Copy, Debug)]
    struct Form {
        root: &'static [&'static str],
        is_systemd: bool,
        container: &'static str,
    }

    const FORMS: [Form; 5] = [
        Form { root: &["kubepods"], is_systemd: false, container: "3f9a" },
        Form { root: &["kubepods"], is_systemd: false, container: "crio-3f9a" },
        Form { root: &["kubepods"], is_systemd: true, container: "cri-containerd-3f9a.scope" },
        Form { root: &["kubepods"], is_systemd: true, container: "crio-3f9a.scope" },
        // A node that is a container itself.
        Form {
            root: &["kubelet", "kubepods"],
            is_systemd: true,
            container: "cri-containerd-3f9a.scope",
        },
    ];

    impl Form {
        /// Where that of `parts` is, below that of all pods.
        fn path(self, parts: &[&str]) -> String {
            let parts = [self.root, parts].concat();
            if !self.is_systemd {
                return parts.join("/");
            }
            // A slice is called after all that it lies in.
            let parts: Vec<String> = parts.iter().map(|part| part.replace('-', "_")).collect();
            let slices = (1..=parts.len()).map(|n| format!("{}.slice", parts[..n].join("-")));
            slices.collect::<Vec<_>>().join("/")
        }

        fn pod(self, class: &str, uid: &str) -> String {
            let pod = format!("pod{uid}");
            match class {
                // Pods whose requests are their limits lie beside the other classes.
                "guaranteed" => self.path(&[pod.as_str()]),
                class => self.path(&[class, pod.as_str()]),
            }
        }
    }

    struct Tree {
        dir: TempDir,
        form: Form,
    }

    impl Tree {
        /// One of this node: it has a process.
        fn new(form: Form) -> Self {
            let this = Self { dir: TempDir::new(), form };
            this.make("node-1", &form.path(&["besteffort"]));
            let root = this.make("node-1", &form.path(&[]));
            fs::write(root.join("cgroup.procs"), "7\n").unwrap();
            this
        }

        fn root(&self) -> &Path {
            self.dir.path()
        }

        fn make(&self, node: &str, below: &str) -> PathBuf {
            let path = self.root().join(node).join(below);
            fs::create_dir_all(&path).unwrap();
            path
        }

        fn pod_of(&self, class: &str, uid: &str) -> PodCgroup {
            let path = self.make("node-1", &self.form.pod(class, uid));
            PodCgroup { uid: uid.into(), id: net::inode(&path).unwrap(), path }
        }

        fn pod(&self, uid: &str) -> PodCgroup {
            self.pod_of("besteffort", uid)
        }
    }

    #[test]
    fn forms_are_those_of_the_drivers() {
        let paths = FORMS.map(|form| form.pod("burstable", ONE));
        let systemd = "kubepods.slice/kubepods-burstable.slice/\
                       kubepods-burstable-podd5a5c9f2_90d5_43b4_b1b4_2a7a0a1b6c11.slice";
        let kind = "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/\
                    kubelet-kubepods-burstable-podd5a5c9f2_90d5_43b4_b1b4_2a7a0a1b6c11.slice";
        let cgroupfs = "kubepods/burstable/podd5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c11";
        assert_eq!(paths, [cgroupfs, cgroupfs, systemd, systemd, kind]);
    }

    #[tokio::test]
    async fn pod_is_told_when_it_comes_when_it_grows_and_when_it_goes() {
        for form in FORMS {
            let tree = Tree::new(form);
            let before = tree.pod(ONE);
            let (mut cgroups, there) = PodCgroups::open(tree.root()).unwrap();
            assert_eq!(there, [before], "{form:?}");
            let began = Instant::now();
            let pod = tree.pod(TWO);
            assert_eq!(cgroups.next().await, [Seen::Came(pod.clone())], "{form:?}");
            assert_eq!(cgroups.watch(TWO), []);
            fs::create_dir(pod.path.join(form.container)).unwrap();
            assert_eq!(cgroups.next().await, [Seen::Grew(TWO.into())], "{form:?}");
            assert_eq!(cgroups.watch(TWO), [Seen::Grew(TWO.into())], "it has grown already");
            fs::remove_dir_all(&pod.path).unwrap();
            assert_eq!(cgroups.next().await, [Seen::Went(TWO.into(), pod.id)], "{form:?}");
            assert!(began.elapsed() < LOOK / 2, "nobody had to look: {form:?}");
            assert!(cgroups.watched.values().all(|one| matches!(one, Watched::Parent(_))));
        }
    }

    #[tokio::test]
    async fn tree_that_comes_later_is_found_with_what_is_in_it() {
        for form in FORMS {
            let tree = Tree::new(form);
            let (mut cgroups, there) = PodCgroups::open(tree.root()).unwrap();
            assert_eq!(there, []);
            let began = Instant::now();
            // Both before the new parent can be watched.
            let pod = tree.pod_of("burstable", ONE);
            assert_eq!(cgroups.next().await, [Seen::Came(pod)], "{form:?}");
            let pod = tree.pod_of("burstable", TWO);
            assert_eq!(cgroups.next().await, [Seen::Came(pod)], "its parent is watched: {form:?}");
            let pod = tree.pod_of("guaranteed", THREE);
            assert_eq!(cgroups.next().await, [Seen::Came(pod)], "and that one's: {form:?}");
            assert!(began.elapsed() < LOOK / 2, "nobody had to look: {form:?}");
        }
    }

    /// An agent may be there before the kubelet.
    #[tokio::test(start_paused = true)]
    async fn all_of_a_node_that_comes_later_is_found_by_looking() {
        for form in FORMS {
            let dir = TempDir::new();
            let (mut cgroups, there) = PodCgroups::open(dir.path()).unwrap();
            assert_eq!(there, []);
            let tree = Tree { dir, form };
            let pod = tree.pod(ONE);
            assert_eq!(cgroups.next().await, [Seen::Came(pod.clone())], "{form:?}");
            let parent = pod.path.parent().unwrap();
            assert!(cgroups.parents.contains(parent), "it is watched: {form:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_events_did_not_tell_is_found_by_looking() {
        for form in FORMS {
            let tree = Tree::new(form);
            let gone = tree.pod(ONE);
            let (mut cgroups, _there) = PodCgroups::open(tree.root()).unwrap();
            let watches: Vec<_> = cgroups.watched.drain().map(|(watch, _)| watch).collect();
            for watch in watches {
                cgroups.events.get_ref().watches().remove(watch).unwrap();
            }
            fs::remove_dir_all(&gone.path).unwrap();
            let came = tree.pod(TWO);
            let seen = cgroups.next().await;
            assert_eq!(seen, [Seen::Went(ONE.into(), gone.id), Seen::Came(came)], "{form:?}");
        }
    }

    #[tokio::test]
    async fn pods_of_another_node_are_not_told() {
        for form in FORMS {
            let tree = Tree::new(form);
            let other = tree.make("node-2", &form.pod("guaranteed", TWO));
            // How a process of another PID namespace is shown.
            fs::write(other.join("cgroup.procs"), "0\n").unwrap();
            let ours = tree.pod(ONE);
            let (_cgroups, there) = PodCgroups::open(tree.root()).unwrap();
            assert_eq!(there, [ours], "{form:?}");
        }
    }
}
