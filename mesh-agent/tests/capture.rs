//! Capture against the real kernel: a pod is a network namespace, the programs hang on a cgroup of this
//! process. Needs root; skipped without.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "clippy takes only the test functions themselves for tests, not their helpers"
)]

mod skip;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mesh_agent::capture::probe::{self, FeatureState};
use mesh_agent::capture::{
    Capture, CaptureConfig, CaptureError, Destinations, Listeners, PodCapture, Role,
};
use mesh_agent::net::{self, Netns};
use mesh_core::settings::Settings;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// The pod's addresses, and those of the world on the other end of its cable.
const POD4: &str = "10.90.0.2";
const POD6: &str = "fd90::2";
const WORLD4: &str = "10.90.0.1";
const WORLD6: &str = "fd90::1";
/// Destinations of the mesh: nobody has these addresses.
const SERVICE4: &str = "10.96.0.10:80";
const SERVICE6: &str = "[fd96::10]:80";
const UID: &str = "0d3cbbd5-3e2c-4b3a-8a3f-6f3f3d1c2b1a";

fn root() -> bool {
    skip::unless_root("loads eBPF programs: run as root")
}

fn run(line: &str) {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn addr(text: &str) -> SocketAddr {
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
struct World {
    config: CaptureConfig,
    pod: Netns,
    world: Netns,
    names: [String; 2],
    mount: PathBuf,
    _cgroup: Cgroup,
}

impl World {
    fn new() -> Self {
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
        };
        let open = |name: &str| Netns::open(&Path::new("/run/netns").join(name)).unwrap();
        let (pod, world) = (open(pod), open(world));
        Self { config, pod, world, names, mount, _cgroup: cgroup }
    }

    fn start(&self) -> Capture {
        let capture =
            Capture::start(&self.config).unwrap_or_else(|error| panic!("{}", chain(&error)));
        let mesh = [SERVICE4, SERVICE6].map(|service| addr(service).ip());
        capture.set_destinations(&HashSet::from(mesh)).unwrap();
        capture
    }

    fn enrol(&self, capture: &Capture, settings: &Settings) -> Listeners {
        let pod = PodCapture {
            uid: UID,
            ips: &[ip(POD4), ip(POD6)],
            netns: &self.pod,
            settings,
            outbound_listeners: 4,
            inbound_listeners: 2,
        };
        let listeners = capture.enrol(&pod).unwrap_or_else(|error| panic!("{}", chain(&error)));
        capture.retain(&HashSet::from([UID.to_owned()])).unwrap();
        listeners
    }

    /// Connects from the pod, as an application would.
    fn dial(&self, to: &str) -> io::Result<TcpStream> {
        self.pod.run(|| TcpStream::connect_timeout(&addr(to), Duration::from_secs(2))).unwrap()
    }

    /// Connects from outside to the pod.
    fn dial_in(&self, to: &str) -> io::Result<TcpStream> {
        self.world.run(|| TcpStream::connect_timeout(&addr(to), Duration::from_secs(2))).unwrap()
    }

    /// Listens in the pod, as an application would.
    fn listen(&self, on: &str) -> [TcpListener; 1] {
        let listener = self.pod.run(|| TcpListener::bind(addr(on))).unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        [listener]
    }

    /// Listens in the world.
    fn listen_outside(&self, on: &str) -> [TcpListener; 1] {
        let listener = self.world.run(|| TcpListener::bind(addr(on))).unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        [listener]
    }

    fn app(&self, domain: Domain) -> Socket {
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

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

fn settings(change: impl FnOnce(&mut Settings)) -> Settings {
    let mut settings = Settings::default();
    change(&mut settings);
    settings
}

/// Waits for a connection on one of the listeners.
fn accept(listeners: &[TcpListener]) -> (TcpStream, SocketAddr) {
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

fn nobody(listeners: &[TcpListener]) -> bool {
    listeners.iter().all(|listener| listener.accept().is_err())
}

fn count(capture: &Capture, name: &str) -> u64 {
    capture.counters().into_iter().find(|(found, _)| *found == name).unwrap().1
}

fn sock_addr(text: &str) -> SockAddr {
    addr(text).into()
}

fn peer(socket: &Socket) -> String {
    socket.peer_addr().unwrap().as_socket().unwrap().to_string()
}

fn local(socket: &Socket) -> SocketAddr {
    socket.local_addr().unwrap().as_socket().unwrap()
}

/// Accepts what the application's socket connected, and returns the destination that the agent learns.
fn learn(
    world: &World,
    capture: &Capture,
    listeners: &Listeners,
    app: &Socket,
) -> (TcpStream, String) {
    let (stream, peer) = accept(&listeners.outbound);
    assert_eq!(local(app).port(), peer.port(), "the application's own connection");
    let mut table = capture.orig_dst_table();
    let listener = stream.local_addr().unwrap().port();
    let orig = table.take(world.pod.cookie(), peer, listener).expect("an original destination");
    assert!(table.take(world.pod.cookie(), peer, listener).is_none(), "read once");
    (stream, orig.to_string())
}

/// A way to connect, from the matrix of cases that must be captured.
fn captures(domain: Domain, to: &str, connect: impl FnOnce(&World, &Socket)) {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let app = world.app(domain);
    connect(&world, &app);
    let (_agent, orig) = learn(&world, &capture, &listeners, &app);
    let canonical = SocketAddr::new(addr(to).ip().to_canonical(), addr(to).port());
    assert_eq!(orig, canonical.to_string());
    assert_eq!(peer(&app), to, "getpeername is the destination");
    let own = if canonical.is_ipv4() { ip(POD4) } else { ip(POD6) };
    assert_eq!(local(&app).ip().to_canonical(), own, "getsockname is the pod");
}

#[test]
fn v4_is_captured() {
    captures(Domain::IPV4, SERVICE4, |_, app| app.connect(&sock_addr(SERVICE4)).unwrap());
}

#[test]
fn v6_is_captured() {
    captures(Domain::IPV6, SERVICE6, |_, app| app.connect(&sock_addr(SERVICE6)).unwrap());
}

#[test]
fn v4_mapped_is_captured() {
    let mapped = "[::ffff:10.96.0.10]:80";
    captures(Domain::IPV6, mapped, |_, app| app.connect(&sock_addr(mapped)).unwrap());
}

#[test]
fn bound_socket_is_captured_and_keeps_its_port() {
    captures(Domain::IPV4, SERVICE4, |_, app| {
        app.bind(&sock_addr("10.90.0.2:40123")).unwrap();
        app.connect(&sock_addr(SERVICE4)).unwrap();
        assert_eq!(local(app).port(), 40123);
    });
}

#[test]
fn socket_bound_to_its_device_is_captured() {
    captures(Domain::IPV4, SERVICE4, |_, app| {
        app.bind_device(Some(b"eth0")).unwrap();
        app.connect(&sock_addr(SERVICE4)).unwrap();
    });
}

#[test]
fn non_blocking_connect_is_captured() {
    captures(Domain::IPV4, SERVICE4, |_, app| {
        app.set_nonblocking(true).unwrap();
        let error = app.connect(&sock_addr(SERVICE4)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
        let end = Instant::now() + Duration::from_secs(2);
        while app.peer_addr().is_err() {
            assert!(Instant::now() < end, "never connected");
            thread::sleep(Duration::from_millis(1));
        }
        assert!(app.take_error().unwrap().is_none());
    });
}

#[test]
fn fast_open_is_captured() {
    captures(Domain::IPV4, SERVICE4, |_, app| {
        // `sendto(MSG_FASTOPEN)` connects and sends at once.
        let sent = app.send_to_with_flags(b"hello", &sock_addr(SERVICE4), libc::MSG_FASTOPEN);
        assert_eq!(sent.unwrap(), 5);
    });
}

#[test]
fn deferred_fast_open_is_captured() {
    captures(Domain::IPV4, SERVICE4, |_, app| {
        let on: libc::c_int = 1;
        // SAFETY: the kernel reads one `int`.
        let set = unsafe {
            libc::setsockopt(
                std::os::fd::AsRawFd::as_raw_fd(app),
                libc::IPPROTO_TCP,
                libc::TCP_FASTOPEN_CONNECT,
                (&raw const on).cast(),
                4,
            )
        };
        assert_eq!(set, 0);
        app.connect(&sock_addr(SERVICE4)).unwrap();
        app.send(b"hello").unwrap();
    });
}

#[test]
fn mptcp_is_captured() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let app = world.pod.run(|| Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)));
    let Ok(app) = app.unwrap() else {
        skip::skipped("needs a kernel with MPTCP");
        return;
    };
    app.connect(&sock_addr(SERVICE4)).unwrap();
    let (_agent, orig) = learn(&world, &capture, &listeners, &app);
    assert_eq!(orig, SERVICE4);
    assert_eq!(peer(&app), SERVICE4, "getpeername is the destination (Linux 5.19 and newer)");
    assert_eq!(local(&app).ip(), ip(POD4));
}

#[test]
fn connections_to_one_destination_take_turns_on_the_listeners() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let apps: Vec<_> = (0..4).map(|_| world.dial(SERVICE4).unwrap()).collect();
    // Listeners are in turns of v4 and v6.
    for (index, listener) in listeners.outbound.iter().enumerate() {
        assert_eq!(listener.accept().is_ok(), index % 2 == 0, "listener {index}");
    }
    assert_eq!(apps.len(), 4);
}

#[test]
fn pods_with_the_same_addresses_and_ports_do_not_mix() {
    if !root() {
        return;
    }
    let [one, two] = [World::new(), World::new()];
    let capture = one.start();
    let services = ["10.96.0.10:80", "10.96.0.11:80"];
    let wanted = services.map(|service| addr(service).ip());
    capture.set_destinations(&HashSet::from(wanted)).unwrap();
    let settings = Settings::default();
    // Addresses of pods differ on a node; what a socket is bound to need not. The key is the namespace.
    let enrol = |world: &World, uid, own| {
        let ips = [ip(own)];
        let pod = PodCapture {
            uid,
            ips: &ips,
            netns: &world.pod,
            settings: &settings,
            outbound_listeners: 1,
            inbound_listeners: 1,
        };
        capture.enrol(&pod).unwrap()
    };
    run(&format!("ip -n {} addr add 10.90.0.3/24 dev eth0", two.names[0]));
    let listeners = [enrol(&one, "one", POD4), enrol(&two, "two", "10.90.0.3")];
    let mut table = capture.orig_dst_table();
    for ((world, listeners), service) in [&one, &two].into_iter().zip(&listeners).zip(services) {
        let app = world.app(Domain::IPV4);
        app.bind(&sock_addr("10.90.0.2:40999")).unwrap();
        app.connect(&sock_addr(service)).unwrap();
        let (stream, peer) = accept(&listeners.outbound);
        assert_eq!(peer, addr("10.90.0.2:40999"));
        let listener = stream.local_addr().unwrap().port();
        let orig = table.take(world.pod.cookie(), peer, listener).unwrap();
        assert_eq!(orig.to_string(), service);
    }
    let shared = PodCapture {
        uid: "three",
        ips: &[ip(POD4)],
        netns: &two.pod,
        settings: &settings,
        outbound_listeners: 1,
        inbound_listeners: 1,
    };
    assert_eq!(capture.enrol(&shared).unwrap_err().reason(), "shared_address");
}

#[test]
fn fifty_toggles_fail_no_connection() {
    use std::sync::atomic::{AtomicBool, AtomicU64};

    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    capture.set_destinations(&HashSet::from([ip(WORLD4)])).unwrap();
    let outside = world.listen_outside("10.90.0.1:8080");
    let stop = AtomicBool::new(false);
    let connected = AtomicU64::new(0);
    // Two more have ended, so one has happened wholly in the present state.
    let one_more = || {
        let before = connected.load(Ordering::Relaxed);
        let deadline = Instant::now() + Duration::from_secs(10);
        while connected.load(Ordering::Relaxed) < before + 2 {
            if Instant::now() > deadline {
                stop.store(true, Ordering::Relaxed);
                panic!("nothing connects any more");
            }
            while outside[0].accept().is_ok() {}
            thread::yield_now();
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                world.dial("10.90.0.1:8080").unwrap();
                // The port of a reset connection is free at once.
                connected.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut kept = Vec::new();
        for _ in 0..50 {
            kept.push(world.enrol(&capture, &Settings::default()));
            one_more();
            capture.leave(UID).unwrap();
            one_more();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let (captured, connected) = (count(&capture, "captured"), connected.load(Ordering::Relaxed));
    assert!(captured >= 50 && captured + 50 <= connected, "{captured} of {connected} captured");
}

#[test]
fn what_is_not_of_the_mesh_is_left_alone() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let outside = world.listen_outside("10.90.0.1:8080");
    let app = world.dial("10.90.0.1:8080").unwrap();
    assert_eq!(app.peer_addr().unwrap(), addr("10.90.0.1:8080"));
    accept(&outside);
    assert!(nobody(&listeners.outbound));
    assert_eq!(count(&capture, "connect_not_mesh"), 1);
    assert_eq!(count(&capture, "captured"), 0);
}

#[test]
fn pod_that_is_not_enrolled_is_left_alone() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    capture.set_destinations(&HashSet::from([ip(WORLD4)])).unwrap();
    let outside = world.listen_outside("10.90.0.1:8080");
    let _app = world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
    assert!(capture.counters().iter().all(|(_, count)| *count == 0), "{:?}", capture.counters());
}

#[test]
fn outbound_all_captures_what_is_not_of_the_mesh() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let all = settings(|settings| settings.outbound = mesh_core::settings::Outbound::All);
    let listeners = world.enrol(&capture, &all);
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr("203.0.113.9:443")).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, "203.0.113.9:443");
}

#[test]
fn destinations_that_do_not_fit_are_captured_with_everything_else() {
    if !root() {
        return;
    }
    let mut world = World::new();
    world.config.max_destinations = 2;
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let third = "10.96.0.11:80";
    let three = [SERVICE4, SERVICE6, third].map(|service| addr(service).ip());
    match capture.set_destinations(&HashSet::from(three)).unwrap() {
        Destinations::Everything(CaptureError::Full { map, limit: 2, remedy }) => {
            assert_eq!((map, remedy), ("DESTINATIONS", "raise --max-destinations"));
        }
        other => panic!("{other:?}"),
    }
    for to in [SERVICE4, third, "203.0.113.9:443"] {
        let app = world.app(Domain::IPV4);
        app.connect(&sock_addr(to)).unwrap();
        assert_eq!(learn(&world, &capture, &listeners, &app).1, to);
    }

    // The new ones take the places of those that go.
    let two = HashSet::from([ip("10.96.0.11"), ip("10.96.0.12")]);
    assert!(matches!(capture.set_destinations(&two).unwrap(), Destinations::Listed));
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr(third)).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, third);
    let outside = world.listen_outside("10.90.0.1:8080");
    let _app = world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
}

#[test]
fn pod_reaches_itself_without_the_agent() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let all = settings(|settings| settings.outbound = mesh_core::settings::Outbound::All);
    let listeners = world.enrol(&capture, &all);
    for on in ["127.0.0.1:8080", "10.90.0.2:8081", "[::1]:8080", "[fd90::2]:8081"] {
        let app = world.listen(on);
        let _client = world.dial(on).unwrap();
        accept(&app);
    }
    assert!(nobody(&listeners.outbound) && nobody(&listeners.inbound));
}

#[test]
fn listeners_of_the_agent_cannot_be_dialled() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    for listener in &listeners.outbound {
        let to = listener.local_addr().unwrap().to_string();
        let error = world.dial(&to).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{to} from inside");
        let error = world.dial_in(&to).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{to} from outside");
    }
    assert_eq!(count(&capture, "connect_own_listener"), 8);
    assert_eq!(count(&capture, "lookup_own_listener"), 8);
}

#[test]
fn skipped_ports_and_blocks_are_left_alone() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    capture.set_destinations(&HashSet::from([ip(WORLD4), ip(WORLD6)])).unwrap();
    let skip = settings(|settings| {
        settings.skip_outbound_ports = "1,2,3306,9000-9100".parse().unwrap();
        settings.skip_outbound_cidrs = vec!["fd90::/64".parse().unwrap()];
    });
    let listeners = world.enrol(&capture, &skip);
    for to in ["10.90.0.1:9050", "10.90.0.1:3306", "[fd90::1]:80"] {
        let outside = world.listen_outside(to);
        let _app = world.dial(to).unwrap();
        accept(&outside);
    }
    assert!(nobody(&listeners.outbound));
    assert_eq!(count(&capture, "connect_skipped_port"), 2);
    assert_eq!(count(&capture, "connect_skipped_cidr"), 1);
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr("10.90.0.1:9101")).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, "10.90.0.1:9101");

    capture.update(UID, &Settings::default()).unwrap();
    let app = world.app(Domain::IPV6);
    app.connect(&sock_addr("[fd90::1]:80")).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, "[fd90::1]:80");
}

#[test]
fn sockets_of_the_agent_are_not_captured() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    capture.set_destinations(&HashSet::from([ip(WORLD4)])).unwrap();
    let listeners = world.enrol(&capture, &Settings::default());
    let outside = world.listen_outside("10.90.0.1:8080");
    let to = addr("10.90.0.1:8080");
    let _stream =
        block_on(net::pass_through(&world.pod, to, |socket| capture.exempt(socket, Role::Agent)))
            .unwrap();
    accept(&outside);
    assert!(nobody(&listeners.outbound));
    assert_eq!(count(&capture, "connect_agent"), 1);
}

#[test]
fn what_comes_in_is_steered_with_both_addresses() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    for (to, from) in [("10.90.0.2:8080", WORLD4), ("[fd90::2]:9999", WORLD6)] {
        let client = world.dial_in(to).unwrap();
        let (agent, peer) = accept(&listeners.inbound);
        assert_eq!(agent.local_addr().unwrap(), addr(to));
        assert_eq!(peer, client.local_addr().unwrap());
        assert_eq!(peer.ip(), ip(from));
    }
    assert_eq!(count(&capture, "lookup_steered"), 2);
}

#[test]
fn plain_text_in_strict_mode_is_refused_at_once() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let strict = settings(|settings| {
        settings.mode = mesh_core::settings::Mode::Strict;
        settings.skip_inbound_ports = "9090".parse().unwrap();
    });
    let listeners = world.enrol(&capture, &strict);
    let app = world.listen("0.0.0.0:8080");
    let started = Instant::now();
    for to in ["10.90.0.2:8080", "[fd90::2]:8080"] {
        let error = world.dial_in(to).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    assert!(nobody(&app) && nobody(&listeners.inbound));
    assert_eq!(count(&capture, "lookup_strict"), 2);

    let metrics = world.listen("0.0.0.0:9090");
    let _scrape = world.dial_in("10.90.0.2:9090").unwrap();
    accept(&metrics);
}

#[test]
fn refusal_in_the_kernel_is_told_with_both_ends_and_at_a_bounded_rate() {
    if !root() {
        return;
    }
    let world = World::new();
    // The ring is the last agent's: one that reads its own must not hear the one before.
    drop(world.start());
    let capture = world.start();
    let strict = settings(|settings| settings.mode = mesh_core::settings::Mode::Strict);
    let _listeners = world.enrol(&capture, &strict);

    let said = Said::default();
    let writer = said.clone();
    let events = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    let _here = tracing::subscriber::set_default(events);
    let (log, again) = (capture.take_log().unwrap(), capture.take_log());
    assert!(again.is_none(), "one reader");
    block_on(async {
        let follow = std::pin::pin!(log.follow());
        let told = async {
            world.dial_in("[fd90::2]:8080").unwrap_err();
            while !said.text().contains("fd90::2") {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            for _ in 0..100 {
                world.dial_in("10.90.0.2:8080").unwrap_err();
            }
            while !said.text().contains("10.90.0.2") {
                world.dial_in("10.90.0.2:8080").unwrap_err();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            ended = follow => panic!("{ended:?}"),
            done = tokio::time::timeout(Duration::from_secs(10), told) => {
                done.unwrap_or_else(|_late| panic!("{}", said.text()));
            }
        }
    });
    let text = said.text();
    assert!(text.contains("plain text to a strict pod"), "{text}");
    assert!(text.contains("[fd90::1]:") && text.contains("to [fd90::2]:8080"), "{text}");
    assert!(text.contains("10.90.0.1") && text.contains("10.90.0.2]:8080"), "{text}");
    let refused = usize::try_from(count(&capture, "lookup_strict")).unwrap();
    assert!(refused > 100 && text.lines().count() < refused / 2, "{refused} refused:\n{text}");
}

/// What the agent's log says.
#[derive(Clone, Default)]
struct Said(std::sync::Arc<Mutex<Vec<u8>>>);

impl Said {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl io::Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(future)
}

/// Delivers to an application at `to`, with `client`'s address, and exchanges bytes.
fn delivers(to: &str, client: Option<&str>, seen: &str) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let strict = settings(|settings| settings.mode = mesh_core::settings::Mode::Strict);
    let listeners = world.enrol(&capture, &strict);
    // Enrolment has done it; once more must be fine.
    net::add_client_address_routes(&world.pod, &[ip(POD4), ip(POD6)]).unwrap();
    let app = world.listen(to);
    block_on(async {
        let client = client.map(|client| SocketAddr::new(ip(client), 40000));
        let deliver = net::deliver(&world.pod, addr(to), client, |socket| {
            capture.exempt(socket, Role::Deliver)
        });
        let limit = Duration::from_secs(2);
        let mut agent = tokio::time::timeout(limit, deliver).await.expect("in time").unwrap();
        let (mut app, peer) = accept(&app);
        assert_eq!(peer.ip(), ip(seen));
        io::Write::write_all(&mut app, b"pong").unwrap();
        let mut read = [0; 4];
        tokio::time::timeout(limit, agent.read_exact(&mut read)).await.unwrap().unwrap();
        agent.write_all(b"ping").await.unwrap();
        io::Read::read_exact(&mut app, &mut read).unwrap();
        assert_eq!(&read, b"ping");
    });
    assert!(nobody(&listeners.inbound) && nobody(&listeners.outbound));
    assert_eq!(count(&capture, "lookup_delivery") + count(&capture, "lookup_self"), 1);

    net::remove_client_address_routes(&world.pod).unwrap();
    let rules = Command::new("ip").args(["-n", &world.names[0], "rule"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&rules.stdout).contains("fwmark"));
}

#[test]
fn delivery_keeps_the_clients_v4_address() {
    delivers("10.90.0.2:8080", Some("10.244.7.9"), "10.244.7.9");
}

#[test]
fn delivery_keeps_the_clients_v6_address() {
    delivers("[fd90::2]:8080", Some("fd44:7::9"), "fd44:7::9");
}

#[test]
fn delivery_without_the_clients_address_comes_from_the_pod() {
    delivers("10.90.0.2:8080", None, POD4);
}

#[test]
fn delivery_as_the_pod_itself_reaches_the_application() {
    delivers("10.90.0.2:8080", Some(POD4), POD4);
}

#[test]
fn announced_tuple_does_not_let_others_in() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let strict = settings(|settings| settings.mode = mesh_core::settings::Mode::Strict);
    let _listeners = world.enrol(&capture, &strict);
    let app = world.listen("10.90.0.2:8080");
    let client = Some(SocketAddr::new(ip(WORLD4), 40000));
    let delivered = block_on(net::deliver(&world.pod, addr("10.90.0.2:8080"), client, |socket| {
        capture.exempt(socket, Role::Deliver)
    }))
    .unwrap();
    let from = delivered.local_addr().unwrap();
    drop((delivered, accept(&app)));
    // The grace after the handshake.
    thread::sleep(Duration::from_millis(1200));

    let client =
        world.world.run(|| Socket::new(Domain::IPV4, Type::STREAM, None)).unwrap().unwrap();
    client.bind(&from.into()).unwrap();
    let error = client.connect(&sock_addr("10.90.0.2:8080")).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(count(&capture, "lookup_strict"), 1);
}

#[test]
fn without_an_agent_connections_fail_at_once() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    drop(world.enrol(&capture, &Settings::default()));
    drop(capture);
    let _app = world.listen("0.0.0.0:8080");
    let started = Instant::now();
    let out = world.dial(SERVICE4).unwrap_err();
    let into = world.dial_in("10.90.0.2:8080").unwrap_err();
    assert_eq!(out.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(into.kind(), io::ErrorKind::ConnectionRefused);
    assert!(started.elapsed() < Duration::from_millis(200), "{:?}", started.elapsed());
}

#[test]
fn pod_that_fails_open_bypasses_a_silent_agent() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    capture.set_destinations(&HashSet::from([ip(WORLD4)])).unwrap();
    let open = settings(|settings| settings.fail_open = true);
    drop(world.enrol(&capture, &open));
    let app = world.listen("0.0.0.0:8080");
    let outside = world.listen_outside("10.90.0.1:8080");
    assert!(world.dial("10.90.0.1:8080").is_err(), "the heartbeat is fresh");

    thread::sleep(Duration::from_millis(5100));
    let _out = world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
    let _into = world.dial_in("10.90.0.2:8080").unwrap();
    accept(&app);
    assert_eq!(count(&capture, "connect_fail_open"), 1);
    assert_eq!(count(&capture, "lookup_fail_open"), 1);
}

#[test]
fn pod_that_leaves_is_left_alone_and_its_connections_live() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    capture.set_destinations(&HashSet::from([ip(WORLD4)])).unwrap();
    let listeners = world.enrol(&capture, &Settings::default());
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr("10.90.0.1:8080")).unwrap();
    let (mut agent, _) = learn(&world, &capture, &listeners, &app);

    capture.leave(UID).unwrap();
    let outside = world.listen_outside("10.90.0.1:8080");
    let _direct = world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
    let own = world.listen("0.0.0.0:8080");
    let _into = world.dial_in("10.90.0.2:8080").unwrap();
    accept(&own);
    assert_eq!(peer(&app), "10.90.0.1:8080");
    io::Write::write_all(&mut agent, b"still").unwrap();
    let mut read = [0; 5];
    io::Read::read_exact(&mut &app, &mut read).unwrap();
    assert_eq!(&read, b"still");
    assert!(capture.leave(UID).is_err(), "not enrolled any more");
}

/// The pins below the bpffs, and the kernel's ID of each link.
fn link_ids(world: &World) -> Vec<(String, String)> {
    let mut ids = Vec::new();
    for layout in fs::read_dir(&world.config.bpffs).unwrap() {
        for link in fs::read_dir(layout.unwrap().path().join("links")).unwrap() {
            let path = link.unwrap().path();
            let info = probe::link(&path).unwrap();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            ids.push((name, format!("link {} program {}", info.0, info.1)));
        }
    }
    ids.sort();
    ids
}

#[test]
fn restart_moves_the_links_to_the_new_programs() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    drop(world.enrol(&capture, &Settings::default()));
    let before = link_ids(&world);
    assert_eq!(before.len(), 6, "{before:?}");
    drop(capture);

    let capture = world.start();
    assert_eq!(world.dial(SERVICE4).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    let listeners = world.enrol(&capture, &Settings::default());
    let after = link_ids(&world);
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        let (link, program) = before.split_once(" program ").unwrap();
        assert_eq!(after.split_once(" program ").unwrap().0, link, "{name} is the same link");
        assert_ne!(after.split_once(" program ").unwrap().1, program, "{name} has a new program");
    }
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr(SERVICE4)).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, SERVICE4);
}

#[test]
fn another_layout_is_taken_over_without_a_gap() {
    if !root() {
        return;
    }
    let mut world = World::new();
    let old = world.start();
    drop(world.enrol(&old, &Settings::default()));
    let before = link_ids(&world);
    drop(old);

    world.config.max_flows *= 2;
    let capture = world.start();
    assert_eq!(link_ids(&world), before, "the old programs stay until the new maps know the pods");
    assert_eq!(world.dial(SERVICE4).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    let listeners = world.enrol(&capture, &Settings::default());
    let after = link_ids(&world);
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        let link = |text: &str| text.split_once(" program ").unwrap().0.to_owned();
        assert_eq!(link(after), link(before), "{name} is the same link");
        assert_ne!(after, before, "{name} has a new program");
    }
    assert_eq!(fs::read_dir(&world.config.bpffs).unwrap().count(), 1, "the old layout is gone");
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr(SERVICE4)).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, SERVICE4);
}

#[test]
fn pods_that_are_gone_after_a_restart_leave_no_pin() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    drop(world.enrol(&capture, &Settings::default()));
    drop(capture);
    let capture = world.start();
    capture.retain(&HashSet::new()).unwrap();
    assert_eq!(link_ids(&world).len(), 5);
    let app = world.listen("0.0.0.0:8080");
    let _into = world.dial_in("10.90.0.2:8080").unwrap();
    accept(&app);
}

#[test]
fn foreign_pins_are_refused_by_name() {
    if !root() {
        return;
    }
    let world = World::new();
    drop(world.start());
    let layout = fs::read_dir(&world.config.bpffs).unwrap().next().unwrap().unwrap().path();
    let refused = |path: &Path| {
        let error = Capture::start(&world.config).unwrap_err();
        assert_eq!(error.reason(), "foreign_pin", "{}", chain(&error));
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    };

    // A map of another kind under our name.
    let control = layout.join("maps/CONTROL");
    let kept = layout.join("kept");
    fs::rename(&control, &kept).unwrap();
    fs::rename(layout.join("maps/FLOWS"), &control).unwrap();
    refused(&control);
    fs::rename(&control, layout.join("maps/FLOWS")).unwrap();
    fs::rename(&kept, &control).unwrap();

    // A link of another hook under our name.
    let connect4 = layout.join("links/connect4");
    fs::rename(&connect4, &kept).unwrap();
    fs::rename(layout.join("links/sockops"), &connect4).unwrap();
    refused(&connect4);
    fs::rename(&connect4, layout.join("links/sockops")).unwrap();
    fs::rename(&kept, &connect4).unwrap();

    // A directory that no agent makes.
    let stranger = world.config.bpffs.join("stranger");
    fs::create_dir(&stranger).unwrap();
    refused(&stranger);
    fs::remove_dir(&stranger).unwrap();
    drop(world.start());
}

#[test]
fn namespace_is_left_as_it_was_without_client_addresses() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let plain = settings(|settings| settings.preserve_client_address = false);
    let _listeners = world.enrol(&capture, &plain);
    let rules = || {
        let rules = Command::new("ip").args(["-n", &world.names[0], "rule"]).output().unwrap();
        String::from_utf8(rules.stdout).unwrap()
    };
    assert!(!rules().contains("fwmark"), "{}", rules());
    capture.update(UID, &Settings::default()).unwrap();
    assert!(rules().contains("fwmark 0x6d616c6c lookup 27745"), "{}", rules());
}

#[test]
fn detach_leaves_nothing() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    drop(capture);

    let detached = Capture::detach(&world.config.bpffs).unwrap();
    assert_eq!(detached.removed.len(), 10 + 6 + 3 + 1, "{detached:#?}");
    assert_eq!(detached.namespaces.len(), 1, "{detached:#?}");
    assert!(!world.config.bpffs.exists());
    assert!(
        world.dial(SERVICE4).is_err_and(|error| error.kind() != io::ErrorKind::ConnectionRefused)
    );
    let app = world.listen("0.0.0.0:8080");
    let _into = world.dial_in("10.90.0.2:8080").unwrap();
    accept(&app);
    assert_eq!(Capture::detach(&world.config.bpffs).unwrap(), Default::default(), "twice is fine");
}

#[test]
fn missing_bpffs_is_said_with_the_remedy() {
    if !root() {
        return;
    }
    let world = World::new();
    let config = CaptureConfig { bpffs: "/tmp/malla-no-bpffs".into(), ..world.config.clone() };
    let error = Capture::start(&config).unwrap_err();
    assert_eq!(error.reason(), "no_bpffs");
    assert!(error.to_string().contains("mount -t bpf bpf /tmp"), "{error}");
    let config = CaptureConfig { cgroup: "/tmp".into(), ..world.config.clone() };
    assert_eq!(Capture::start(&config).unwrap_err().reason(), "not_cgroup2");
}

#[test]
fn full_map_is_said_with_its_limit() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    let many = settings(|settings| {
        let blocks = (0..=255).map(|third| format!("10.97.{third}.0/24").parse().unwrap());
        settings.skip_outbound_cidrs = blocks.collect();
    });
    let error = capture.update(UID, &many).unwrap_err();
    assert_eq!(error.reason(), "map_full");
    assert!(error.to_string().contains("SKIP_CIDRS is full at 128"), "{error}");
}

#[test]
fn this_kernel_has_all_that_capture_needs() {
    if !root() {
        return;
    }
    let world = World::new();
    let features = probe::run(&world.config.cgroup, &world.config.bpffs);
    let wrong: Vec<_> =
        features.iter().filter(|feature| feature.state != FeatureState::Ok).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(!world.config.bpffs.exists(), "probing changes nothing");
}
