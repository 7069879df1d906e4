//! A pod, the world at the other end of its cable, and what tests do with them.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mesh_agent::capture::{Capture, CaptureConfig, Listeners, PodCapture};
use mesh_agent::net::Netns;
use mesh_core::settings::{Mode, Settings};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::skip;

/// The pod's addresses, and those of the world on the other end of its cable.
pub(crate) const POD4: &str = "10.90.0.2";
pub(crate) const POD6: &str = "fd90::2";
pub(crate) const WORLD4: &str = "10.90.0.1";
pub(crate) const WORLD6: &str = "fd90::1";
/// Destinations of the mesh: nobody has these addresses.
pub(crate) const SERVICE4: &str = "10.96.0.10:80";
pub(crate) const SERVICE6: &str = "[fd96::10]:80";
pub(crate) const UID: &str = "0d3cbbd5-3e2c-4b3a-8a3f-6f3f3d1c2b1a";

pub(crate) fn root() -> bool {
    skip::unless_root("loads eBPF programs: run as root")
}

pub(crate) fn run(line: &str) {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// This process's cgroup while any test runs.
struct Cgroup(PathBuf);

static CGROUP_USERS: Mutex<usize> = Mutex::new(0);

impl Cgroup {
    fn join() -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
        let root = PathBuf::from(mount.split(' ').nth(1).unwrap());
        let path = root.join(format!("malla-{}-capture", std::process::id()));
        let mut users = CGROUP_USERS.lock().unwrap();
        if *users == 0 {
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("cgroup.procs"), std::process::id().to_string()).unwrap();
        }
        *users += 1;
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let mut users = CGROUP_USERS.lock().unwrap();
        *users -= 1;
        if *users == 0 {
            let parent = self.0.parent().unwrap().join("cgroup.procs");
            fs::write(parent, std::process::id().to_string()).unwrap();
            fs::remove_dir(&self.0).unwrap();
        }
    }
}

/// A pod and the world, joined by a cable, and a bpffs.
pub(crate) struct World {
    pub(crate) config: CaptureConfig,
    pub(crate) pod: Netns,
    pub(crate) world: Netns,
    pub(crate) names: [String; 2],
    pub(crate) mount: PathBuf,
    _cgroup: Cgroup,
}

impl World {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let id = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let cgroup = Cgroup::join();
        let names = [format!("malla-{id}-pod"), format!("malla-{id}-world")];
        let [pod, world] = &names;
        for name in [pod, world] {
            run(&format!("ip netns add {name}"));
            run(&format!("ip -n {name} link set lo up"));
        }
        run(&format!("ip -n {pod} link add eth0 type veth peer name eth0 netns {world}"));
        for (name, v4, v6) in [(pod, POD4, POD6), (world, WORLD4, WORLD6)] {
            // The kernel's own link-local address would turn up some time later.
            run(&format!("ip -n {name} link set eth0 addrgenmode none"));
            run(&format!("ip -n {name} addr add {v4}/24 dev eth0"));
            run(&format!("ip -n {name} addr add {v6}/64 dev eth0 nodad"));
            run(&format!("ip -n {name} link set eth0 up"));
        }
        run(&format!("ip -n {pod} route add default via {WORLD4}"));
        run(&format!("ip -n {pod} route add default via {WORLD6}"));
        let mount = std::env::temp_dir().join(format!("malla-{id}-capture"));
        fs::create_dir(&mount).unwrap();
        run(&format!("mount -t bpf bpf {}", mount.display()));
        let config = CaptureConfig {
            cgroup: cgroup.0.clone(),
            bpffs: mount.join("malla"),
            max_pods: 16,
            max_destinations: 64,
            max_flows: 4096,
            max_verdicts: 64,
            redirect_peer: false,
        };
        let open = |name: &str| Netns::open(&Path::new("/run/netns").join(name)).unwrap();
        let (pod, world) = (open(pod), open(world));
        Self { config, pod, world, names, mount, _cgroup: cgroup }
    }

    pub(crate) fn start(&self) -> Capture {
        let capture =
            Capture::start(&self.config).unwrap_or_else(|error| panic!("{}", chain(&error)));
        capture.carries(Duration::MAX);
        capture.beat();
        let mesh = [SERVICE4, SERVICE6].map(|service| addr(service).ip());
        capture.set_destinations(&HashSet::from(mesh), &HashMap::new()).unwrap();
        capture
    }

    /// The pod as it is asked to be captured, with one listener of each kind.
    pub(crate) fn pod_capture<'a>(
        &'a self,
        uid: &'a str,
        ips: &'a [IpAddr],
        settings: &'a Settings,
    ) -> PodCapture<'a> {
        PodCapture {
            uid,
            ips,
            netns: &self.pod,
            settings,
            predecessor: None,
            outbound_listeners: 1,
            inbound_listeners: 1,
        }
    }

    pub(crate) fn enrol(&self, capture: &Capture, settings: &Settings) -> Listeners {
        let ips = [ip(POD4), ip(POD6)];
        let pod = self.pod_capture(UID, &ips, settings);
        let pod = PodCapture { outbound_listeners: 4, inbound_listeners: 2, ..pod };
        let listeners = capture.enrol(&pod).unwrap_or_else(|error| panic!("{}", chain(&error)));
        capture.retain(&HashSet::from([UID.to_owned()]), &HashSet::new()).unwrap();
        listeners
    }

    /// Connects from the pod, as an application would.
    pub(crate) fn dial(&self, to: &str) -> io::Result<TcpStream> {
        self.pod.run(|| TcpStream::connect_timeout(&addr(to), Duration::from_secs(2))).unwrap()
    }

    /// Whether what the pod sends into the mesh is refused, and what comes to it in plain text.
    pub(crate) fn is_refused(&self) -> bool {
        let is = |result: io::Result<TcpStream>, kind| result.is_err_and(|err| err.kind() == kind);
        is(self.dial(SERVICE4), io::ErrorKind::PermissionDenied)
            && is(self.dial_in("10.90.0.2:8080"), io::ErrorKind::ConnectionRefused)
    }

    /// Connects from outside to the pod.
    pub(crate) fn dial_in(&self, to: &str) -> io::Result<TcpStream> {
        self.world.run(|| TcpStream::connect_timeout(&addr(to), Duration::from_secs(2))).unwrap()
    }

    /// Listens in the pod, as an application would.
    pub(crate) fn listen(&self, on: &str) -> [TcpListener; 1] {
        let listener = self.pod.run(|| TcpListener::bind(addr(on))).unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        [listener]
    }

    /// Listens in the world.
    pub(crate) fn listen_outside(&self, on: &str) -> [TcpListener; 1] {
        let listener = self.world.run(|| TcpListener::bind(addr(on))).unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        [listener]
    }

    /// What `preserve-client-address` may change in the pod's namespace, as `ip` and `/proc` show it.
    pub(crate) fn routing(&self) -> String {
        let ip = |what: &str| {
            let shown =
                Command::new("ip").args(["-n", &self.names[0]]).args(what.split(' ')).output();
            String::from_utf8(shown.unwrap().stdout).unwrap()
        };
        let shown =
            ["-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all"].map(ip);
        let settings = ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"];
        let read = |name: &str| fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap();
        let settings = self.pod.run(|| settings.map(read)).unwrap();
        format!("{}{}", shown.concat(), settings.concat())
    }

    pub(crate) fn app(&self, domain: Domain) -> Socket {
        self.pod.run(|| Socket::new(domain, Type::STREAM, Some(Protocol::TCP))).unwrap().unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _already_detached = Capture::detach(&self.config.bpffs);
        for name in &self.names {
            run(&format!("ip netns del {name}"));
        }
        run(&format!("umount -l {}", self.mount.display()));
        fs::remove_dir(&self.mount).unwrap();
    }
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

pub(crate) fn settings(change: impl FnOnce(&mut Settings)) -> Settings {
    let mut settings = Settings::default();
    change(&mut settings);
    settings
}

/// Those of a pod that gets no plain text.
pub(crate) fn strict() -> Settings {
    settings(|settings| settings.mode = Mode::Strict)
}

/// Waits until it holds.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(5);
    while !holds() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for a connection on one of the listeners.
pub(crate) fn accept(listeners: &[TcpListener]) -> (TcpStream, SocketAddr) {
    let end = Instant::now() + Duration::from_secs(2);
    loop {
        for listener in listeners {
            match listener.accept() {
                Ok(accepted) => return accepted,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        assert!(Instant::now() < end, "nobody connected");
        thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn nobody(listeners: &[TcpListener]) -> bool {
    listeners.iter().all(|listener| listener.accept().is_err())
}

pub(crate) fn count(capture: &Capture, name: &str) -> u64 {
    capture.counters().into_iter().find(|(found, _)| *found == name).unwrap().1
}

pub(crate) fn sock_addr(text: &str) -> SockAddr {
    addr(text).into()
}

pub(crate) fn peer(socket: &Socket) -> String {
    socket.peer_addr().unwrap().as_socket().unwrap().to_string()
}

pub(crate) fn local(socket: &Socket) -> SocketAddr {
    socket.local_addr().unwrap().as_socket().unwrap()
}

/// Accepts what the application's socket connected, and returns the destination that the agent learns.
pub(crate) fn learn(
    world: &World,
    capture: &Capture,
    listeners: &Listeners,
    app: &Socket,
) -> (TcpStream, String) {
    let (stream, peer) = accept(&listeners.outbound);
    assert_eq!(local(app).port(), peer.port(), "the application's own connection");
    let mut table = capture.orig_dst_table();
    let listener = stream.local_addr().unwrap().port();
    let (orig, chosen) = table.take(world.pod.cookie(), peer, listener).expect("an entry");
    assert_eq!(chosen, None, "nobody has decided anything yet");
    assert!(table.take(world.pod.cookie(), peer, listener).is_none(), "read once");
    (stream, orig.to_string())
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(future)
}

/// Settings for which the maps of a [`World`] have no room.
pub(crate) fn too_many_blocks() -> Settings {
    settings(|settings| {
        let block = |n: u32| format!("10.{}.{}.0/24", 97 + n / 256, n % 256).parse().unwrap();
        let blocks = (0..1024).map(block);
        settings.skip_outbound_cidrs = blocks.collect();
    })
}
