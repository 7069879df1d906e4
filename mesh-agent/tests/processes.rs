//! A pod's network namespace, found by its processes: in cgroups named as container runtimes name them, with
//! processes in namespaces of this test's own making. Needs root, cgroup v2 and `ip`.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that goes wrong")]

mod skip;

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use mesh_agent::net::Netns;
use mesh_agent::processes::{NotFound, Processes};

const UID: &str = "d5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c11";

/// Where the kubelet and a runtime put a container of this pod. `_` for `-` in UIDs is systemd's driver.
const PLACES: [&str; 4] = [
    "kubepods/burstable/podd5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c11/3f9a",
    "kubepods.slice/kubepods-burstable.slice/\
     kubepods-burstable-podd5a5c9f2_90d5_43b4_b1b4_2a7a0a1b6c11.slice/cri-containerd-3f9a.scope",
    "kubepods.slice/kubepods-podd5a5c9f2_90d5_43b4_b1b4_2a7a0a1b6c11.slice/crio-3f9a.scope",
    "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/\
     kubelet-kubepods-besteffort-podd5a5c9f2_90d5_43b4_b1b4_2a7a0a1b6c11.slice/cri-containerd-3f9a.scope",
];

/// A node's cgroups, and what runs in them.
struct Node {
    root: PathBuf,
    /// Its processes: process 1, which whoever runs tests may not look at, is this one.
    proc: PathBuf,
    name: String,
    running: Vec<Child>,
}

impl Node {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
        let nth = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("malla-{}-{nth}-processes", process::id());
        let root = Path::new(mount.split(' ').nth(1).unwrap()).join(&name);
        let proc = std::env::temp_dir().join(&name);
        fs::create_dir(&root).unwrap();
        fs::create_dir(&proc).unwrap();
        symlink(format!("/proc/{}", process::id()), proc.join("1")).unwrap();
        Self { root, proc, name, running: Vec::new() }
    }

    /// A process in the cgroup at `place`, in the namespace of this name or the node's.
    fn run(&mut self, place: &str, netns: Option<&str>) {
        let mut command = match netns {
            None => Command::new("sleep"),
            Some(netns) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", netns, "sleep"]);
                command
            }
        };
        let child = command.arg("600").stdin(Stdio::null()).spawn().unwrap();
        self.running.push(child);
        let place = self.root.join(place);
        fs::create_dir_all(&place).unwrap();
        let id = self.running.last().unwrap().id();
        fs::write(place.join("cgroup.procs"), id.to_string()).unwrap();
        symlink(format!("/proc/{id}"), self.proc.join(id.to_string())).unwrap();
        let is_there = || match netns {
            None => true,
            // `ip` enters the namespace before it becomes the other program.
            Some(netns) => {
                let there = Netns::open(&path_of(netns)).unwrap().inode();
                Netns::open(Path::new(&format!("/proc/{id}/ns/net"))).unwrap().inode() == there
            }
        };
        while !is_there() {
            std::thread::yield_now();
        }
    }

    fn end(&mut self) {
        for mut child in self.running.drain(..) {
            child.kill().ok();
            child.wait().ok();
        }
    }

    fn find(&self, ips: &[&str]) -> Result<u64, NotFound> {
        let ips: Vec<IpAddr> = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        let mut processes = Processes::new(&self.root, &self.proc).unwrap();
        processes.netns(UID, &ips).map(|netns| netns.inode())
    }

    /// Those that are seen of the pod whose cgroup is at `place`.
    fn addresses(&self, place: &str) -> Option<Vec<IpAddr>> {
        let processes = Processes::new(&self.root, &self.proc).unwrap();
        processes.addresses(UID, &self.root.join(place))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.end();
        fn remove(place: &Path) {
            for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    remove(&entry.path());
                }
            }
            fs::remove_dir(place).ok();
        }
        remove(&self.root);
        fs::remove_dir_all(&self.proc).ok();
    }
}

/// A namespace with addresses, removed on drop.
struct Sandbox(String);

impl Sandbox {
    fn new(node: &Node, which: &str, addresses: &[&str]) -> Self {
        let name = format!("{}-{which}", node.name);
        ip(&["netns", "add", &name]);
        let sandbox = Self(name);
        ip(&["-n", &sandbox.0, "link", "add", "eth0", "type", "veth", "peer", "name", "peer0"]);
        for address in addresses {
            // An IPv6 address is none while it is looked for elsewhere.
            ip(&["-n", &sandbox.0, "addr", "add", address, "dev", "eth0", "nodad"]);
        }
        sandbox
    }

    fn inode(&self) -> u64 {
        Netns::open(&path_of(&self.0)).unwrap().inode()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        Command::new("ip").args(["netns", "del", &self.0]).status().ok();
    }
}

fn path_of(netns: &str) -> PathBuf {
    Path::new("/run/netns").join(netns)
}

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn namespace_of_a_pod_is_found_by_its_cgroup_and_its_addresses() {
    if !skip::unless_root("makes network namespaces and cgroups: run as root") {
        return;
    }
    for place in PLACES {
        let mut node = Node::new();
        let pod = Sandbox::new(&node, "pod", &["10.9.1.2/24", "fd09:1::2/64"]);
        assert!(matches!(node.find(&["10.9.1.2"]), Err(NotFound::NoCgroup { .. })), "{place}");
        node.run(place, Some(&pod.0));
        assert_eq!(node.find(&["10.9.1.2", "fd09:1::2"]).unwrap(), pod.inode(), "{place}");
        node.end();
        assert!(matches!(node.find(&["10.9.1.2"]), Err(NotFound::NoProcess { .. })), "{place}");
    }
}

/// What a pod is captured by before the API tells of any address.
#[test]
fn addresses_of_a_pod_are_those_of_its_sandbox_while_nothing_else_is_in_it() {
    if !skip::unless_root("makes network namespaces and cgroups: run as root") {
        return;
    }
    for place in PLACES {
        let mut node = Node::new();
        let pod = Sandbox::new(&node, "pod", &["10.9.1.2/24", "fd09:1::2/64"]);
        let (cgroup, sandbox) = place.rsplit_once('/').unwrap();
        assert_eq!(node.addresses(cgroup), None, "{place}: no cgroup");
        // What watches over the sandbox is in the node's namespace, and there first: CRI-O has it in the
        // pod's cgroup or outside of it, as it is configured.
        node.run("system.slice/crio-conmon-3f9a.scope", None);
        node.run(&format!("{cgroup}/crio-conmon-3f9a.scope"), None);
        assert_eq!(node.addresses(cgroup), None, "{place}: nothing but what watches over it");
        fs::create_dir(node.root.join(place)).unwrap();
        assert_eq!(node.addresses(cgroup), None, "{place}: no process of its own");
        node.run(place, Some(&pod.0));
        let both = ["10.9.1.2", "fd09:1::2"].map(|ip| ip.parse::<IpAddr>().unwrap());
        assert_eq!(node.addresses(cgroup).as_deref(), Some(&both[..]), "{place}");
        // A container, which may have changed them, and what watches over that.
        node.run(&format!("{cgroup}/crio-conmon-4b1c.scope"), None);
        assert_eq!(node.addresses(cgroup).as_deref(), Some(&both[..]), "{place}: no container yet");
        let container = sandbox.replace("3f9a", "4b1c");
        node.run(&format!("{cgroup}/{container}"), Some(&pod.0));
        assert_eq!(node.addresses(cgroup), None, "{place}: a container");
    }
}

/// A sandbox without a network of its own, or with somebody else's.
#[test]
fn addresses_of_the_node_are_no_pods() {
    if !skip::unless_root("makes network namespaces and cgroups: run as root") {
        return;
    }
    let mut node = Node::new();
    let (cgroup, _) = PLACES[0].rsplit_once('/').unwrap();
    node.run(PLACES[0], None);
    assert_eq!(node.addresses(cgroup), None);
    // A process of another pod is none of this one's, whatever it is asked by.
    let other = Sandbox::new(&node, "other", &["10.9.1.3/24"]);
    let elsewhere = "kubepods/burstable/podd5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c12";
    node.run(&format!("{elsewhere}/3f9a"), Some(&other.0));
    assert_eq!(node.addresses(elsewhere), None);
}

/// What a cgroup says is not enough: the namespace is the pod's only if it has the pod's addresses.
#[test]
fn namespace_that_does_not_have_the_pods_addresses_is_refused() {
    if !skip::unless_root("makes network namespaces and cgroups: run as root") {
        return;
    }
    let mut node = Node::new();
    node.run(PLACES[0], None);
    assert!(matches!(node.find(&["10.9.1.2"]), Err(NotFound::HostNetwork)));
    let other = Sandbox::new(&node, "other", &["10.9.1.3/24", "fd09:1::3/64"]);
    node.run(PLACES[0], Some(&other.0));
    for wrong in [&["10.9.1.2"][..], &["10.9.1.3", "fd09:1::2"], &["10.9.1.3", "10.9.1.2"]] {
        match node.find(wrong) {
            Err(NotFound::NoAddress { ip }) => assert_eq!(ip.to_string(), wrong[wrong.len() - 1]),
            found => panic!("{wrong:?}: {found:?}"),
        }
    }
    // Beside them there is one that has them.
    let pod = Sandbox::new(&node, "pod", &["10.9.1.2/24"]);
    node.run(PLACES[0], Some(&pod.0));
    assert_eq!(node.find(&["10.9.1.2"]).unwrap(), pod.inode());
}
