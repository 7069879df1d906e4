//! Sockets inside network namespaces of this test's own making. Needs root and `ip`, `ss`, `unshare`.
//!
//! ```text
//! namespace OUT                          namespace POD
//! 10.55.0.7, fd00:55::7 (the client)
//! 10.9.0.1,  fd00:9::1   eth0 ── eth0    10.9.0.2, fd00:9::2, default route to OUT
//! ```

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that goes wrong")]

mod skip;

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, process};

use mesh_agent::net::{
    self, DELIVERY_MARK, Netns, add_client_address_routes, remove_client_address_routes,
};
use socket2::{Domain, SockRef, Socket, Type};

const POD: [&str; 2] = ["10.9.0.2", "fd00:9::2"];
const CLIENT: [&str; 2] = ["10.55.0.7", "fd00:55::7"];
const WITHIN: Duration = Duration::from_secs(5);
/// Names the namespace to a copy of this test that sees a read-only `/proc/sys`.
const READ_ONLY: &str = "MALLA_TEST_READ_ONLY_PROC_SYS";

/// The two namespaces, removed on drop.
struct World {
    pod: String,
    out: String,
}

impl World {
    /// `None`, and a line that says so, without root.
    fn new() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if !skip::unless_root("makes network namespaces: run as root") {
            return None;
        }
        let name = format!("malla-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let world = Self { pod: format!("{name}-pod"), out: format!("{name}-out") };
        let (pod, out) = (&world.pod, &world.out);
        for line in [
            format!("netns add {pod}"),
            format!("netns add {out}"),
            format!("-n {pod} link set lo up"),
            format!("-n {out} link set lo up"),
            format!("-n {pod} link add eth0 type veth peer name eth0 netns {out}"),
            format!("-n {pod} addr add 10.9.0.2/24 dev eth0"),
            format!("-n {out} addr add 10.9.0.1/24 dev eth0"),
            format!("-n {pod} addr add fd00:9::2/64 dev eth0 nodad"),
            format!("-n {out} addr add fd00:9::1/64 dev eth0 nodad"),
            format!("-n {out} addr add 10.55.0.7/32 dev lo"),
            format!("-n {out} addr add fd00:55::7/128 dev lo nodad"),
            // The kernel's own link-local addresses would turn up some time later.
            format!("-n {pod} link set eth0 addrgenmode none"),
            format!("-n {out} link set eth0 addrgenmode none"),
            format!("-n {pod} addr add fe80::2/64 dev eth0 nodad"),
            format!("-n {out} addr add fe80::1/64 dev eth0 nodad"),
            format!("-n {pod} link set eth0 up"),
            format!("-n {out} link set eth0 up"),
            format!("-n {pod} route add default via 10.9.0.1"),
            format!("-n {pod} route add default via fd00:9::1"),
        ] {
            ip(&line);
        }
        Some(world)
    }

    fn pod(&self) -> Netns {
        Netns::open(&path_of(&self.pod)).unwrap()
    }

    fn out(&self) -> Netns {
        Netns::open(&path_of(&self.out)).unwrap()
    }

    /// All that `prepare` may touch, as `ip` and `/proc` show it.
    fn routing(&self) -> String {
        let shown = ["-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all"];
        let mut shown: Vec<_> =
            shown.iter().map(|what| ip(&format!("-n {} {what}", self.pod))).collect();
        for name in ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"] {
            shown.push(format!("{name} = {}", self.sysctl(name)));
        }
        shown.join("\n")
    }

    fn sysctl(&self, name: &str) -> String {
        self.pod().run(|| fs::read_to_string(format!("/proc/sys/net/{name}"))).unwrap().unwrap()
    }

    fn set_sysctl(&self, name: &str, value: &str) {
        self.pod().run(|| fs::write(format!("/proc/sys/net/{name}"), value)).unwrap().unwrap();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in [&self.pod, &self.out] {
            let deleted = Command::new("ip").args(["netns", "del", name]).status();
            drop(deleted); // Already panicking, or nothing to be done about it.
        }
    }
}

fn ip(line: &str) -> String {
    let output = Command::new("ip").args(line.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn path_of(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}

fn addr(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse::<IpAddr>().unwrap(), port)
}

fn listen(netns: &Netns, at: SocketAddr) -> TcpListener {
    netns.run(|| TcpListener::bind(at)).unwrap().unwrap()
}

/// A connection from inside `netns` with this source, made without anything of ours.
fn dial(netns: &Netns, from: SocketAddr, to: SocketAddr) -> TcpStream {
    let socket =
        netns.run(|| Socket::new(Domain::for_address(to), Type::STREAM, None)).unwrap().unwrap();
    socket.bind(&from.into()).unwrap();
    socket.connect_timeout(&to.into(), WITHIN).unwrap();
    socket.into()
}

/// A byte each way.
fn assert_exchanges(mut one: &TcpStream, mut other: &TcpStream) {
    for stream in [one, other] {
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(WITHIN)).unwrap();
    }
    let mut byte = [0];
    one.write_all(b"a").unwrap();
    other.read_exact(&mut byte).unwrap();
    other.write_all(b"b").unwrap();
    one.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"b");
}

async fn deliver(
    netns: &Netns,
    to: SocketAddr,
    client: Option<SocketAddr>,
) -> io::Result<TcpStream> {
    let delivering = net::deliver(netns, to, client, any);
    net::within(WITHIN, delivering).await.map(|stream| stream.into_std().unwrap())
}

fn prepare(pod: &Netns) {
    add_client_address_routes(pod, &POD.map(|ip| ip.parse().unwrap())).unwrap();
}

fn any(_socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(())
}

fn namespace_of_this_thread() -> PathBuf {
    fs::read_link("/proc/thread-self/ns/net").unwrap()
}

#[test]
fn cookie_is_what_a_socket_inside_reports() {
    let Some(world) = World::new() else { return };
    let pod = world.pod();
    let socket = pod.run(|| Socket::new(Domain::IPV4, Type::DGRAM, None)).unwrap().unwrap();
    let (mut cookie, mut len) = (0_u64, 8);
    // SAFETY: the kernel writes the eight bytes of `cookie` at most.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    assert_eq!(answer, 0);
    assert_eq!(pod.cookie(), cookie);
    assert_ne!(pod.cookie(), world.out().cookie());
    assert_eq!(pod.cookie(), world.pod().cookie(), "the same after opening it again");
}

#[test]
fn what_is_no_network_namespace_is_refused() {
    for path in ["/proc/self/ns/mnt", "/dev/null", "/etc/passwd"] {
        assert_eq!(
            Netns::open(Path::new(path)).unwrap_err().kind(),
            ErrorKind::InvalidInput,
            "{path}"
        );
    }
    assert_eq!(
        Netns::open(Path::new("/run/netns/malla-none")).unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

/// Opening one for reading waits for somebody who writes.
#[test]
fn path_that_leads_to_a_fifo_holds_up_nobody() {
    let path = env::temp_dir().join(format!("malla-{}-fifo", process::id()));
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    let error = Netns::open(&path).unwrap_err();
    fs::remove_file(&path).unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[test]
fn thread_returns_home_also_from_a_panic() {
    let Some(world) = World::new() else { return };
    let pod = world.pod();
    let home = namespace_of_this_thread();
    let inside = pod.run(namespace_of_this_thread).unwrap();
    assert_ne!(inside, home);
    assert_eq!(namespace_of_this_thread(), home);

    let panicked = catch_unwind(AssertUnwindSafe(|| pod.run::<()>(|| panic!("on purpose"))));
    assert!(panicked.is_err());
    assert_eq!(namespace_of_this_thread(), home);
}

#[tokio::test]
async fn error_kinds_tell_refused_unreachable_and_silent() {
    let Some(world) = World::new() else { return };
    let pod = world.pod();
    ip(&format!("-n {} route add unreachable 10.66.0.0/16", world.pod));
    // The peer has no route back and drops what is not its own: silence.
    ip(&format!("-n {} route add blackhole 10.77.0.0/16", world.out));

    let kind = async |to, within| {
        net::within(within, net::pass_through(&pod, to, any)).await.unwrap_err().kind()
    };
    for ip in POD.into_iter().chain(["10.9.0.1", "fd00:9::1"]) {
        assert_eq!(kind(addr(ip, 81), WITHIN).await, ErrorKind::ConnectionRefused, "{ip}");
    }
    assert_eq!(kind(addr("10.66.0.1", 80), WITHIN).await, ErrorKind::HostUnreachable);
    let (asked, within) = (Instant::now(), Duration::from_millis(300));
    assert_eq!(kind(addr("10.77.0.1", 80), within).await, ErrorKind::TimedOut);
    assert!((within..WITHIN).contains(&asked.elapsed()), "{:?}", asked.elapsed());
}

#[tokio::test]
async fn closed_port_refuses_a_delivery_at_once() {
    let Some(world) = World::new() else { return };
    let pod = world.pod();
    prepare(&pod);
    for (to, client) in POD.into_iter().zip(CLIENT) {
        for client in [Some(addr(client, 40000)), None] {
            let asked = Instant::now();
            let error = deliver(&pod, addr(to, 81), client).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to} {client:?}");
            assert!(asked.elapsed() < Duration::from_millis(200), "{:?}", asked.elapsed());
        }
    }
}

#[tokio::test]
async fn address_that_is_not_the_pods_is_no_destination_of_a_delivery() {
    let Some(world) = World::new() else { return };
    let error = deliver(&world.pod(), addr("10.9.0.1", 80), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrNotAvailable);
}

#[tokio::test]
async fn application_sees_the_client_and_its_replies_come_back() {
    let Some(world) = World::new() else { return };
    let pod = world.pod();
    prepare(&pod);
    for (to, client) in POD.into_iter().zip(CLIENT) {
        let app = listen(&pod, addr(to, 80));
        let client = addr(client, 40000);
        let delivered = deliver(&pod, addr(to, 80), Some(client)).await.unwrap();
        let (accepted, from) = app.accept().unwrap();
        assert_eq!(from.ip(), client.ip());
        assert_ne!(from.port(), client.port());
        assert_exchanges(&delivered, &accepted);
    }
}

#[tokio::test]
async fn without_a_client_or_preparation_the_application_sees_its_own_address() {
    let Some(world) = World::new() else { return };
    let pod = world.pod();
    let app = listen(&pod, addr(POD[0], 80));
    let client = addr(CLIENT[0], 40000);
    let _unprepared = deliver(&pod, addr(POD[0], 80), Some(client)).await.unwrap();
    assert_eq!(app.accept().unwrap().1.ip(), addr(POD[0], 0).ip());

    // Through another handle, as capture does.
    prepare(&pod.try_clone().unwrap());
    let _prepared = deliver(&pod, addr(POD[0], 80), Some(client)).await.unwrap();
    assert_eq!(app.accept().unwrap().1.ip(), client.ip());

    let _no_client = deliver(&pod, addr(POD[0], 80), None).await.unwrap();
    assert_eq!(app.accept().unwrap().1.ip(), addr(POD[0], 0).ip());
}

#[tokio::test]
async fn same_clients_own_connections_still_use_the_network() {
    let Some(world) = World::new() else { return };
    let (pod, out) = (world.pod(), world.out());
    prepare(&pod);
    for (to, client) in POD.into_iter().zip(CLIENT) {
        let app = listen(&pod, addr(to, 80));
        let delivered = deliver(&pod, addr(to, 80), Some(addr(client, 40000))).await.unwrap();
        let (from_agent, _) = app.accept().unwrap();
        let own = dial(&out, addr(client, 0), addr(to, 80));
        let (from_client, _) = app.accept().unwrap();

        assert_exchanges(&own, &from_client);
        assert_exchanges(&delivered, &from_agent);
        assert_eq!(SockRef::from(&from_client).mark().unwrap(), 0);
        assert_eq!(SockRef::from(&from_agent).mark().unwrap(), DELIVERY_MARK);

        // And what the pod opens itself, to that same client.
        let service = listen(&out, addr(client, 90));
        let dialled = dial(&pod, addr(to, 0), addr(client, 90));
        assert_exchanges(&dialled, &service.accept().unwrap().0);
    }
}

/// Every 27th delivery first draws a port from which the client itself has a connection open: the two
/// would be each other's mirror image in one namespace.
#[tokio::test]
async fn deliveries_do_not_meet_the_connections_that_the_client_opened_itself() {
    let Some(world) = World::new() else { return };
    let (pod, out) = (world.pod(), world.out());
    prepare(&pod);
    let app = listen(&pod, addr(POD[0], 80));
    let own: Vec<_> = (0..600)
        .map(|n| {
            let own = dial(&out, addr(CLIENT[0], 16384 + 27 * n), addr(POD[0], 80));
            (own, app.accept().unwrap().0)
        })
        .collect();

    for (_, accepted) in own.iter().cycle().take(200) {
        let client = accepted.peer_addr().unwrap();
        let delivered = deliver(&pod, addr(POD[0], 80), Some(client)).await.unwrap();
        let (from_agent, seen) = app.accept().unwrap();
        assert_eq!(seen, delivered.local_addr().unwrap());
        assert_ne!(seen, client);
        assert_exchanges(&delivered, &from_agent);
    }
    for (own, accepted) in &own {
        assert_exchanges(own, accepted);
    }
}

#[tokio::test]
async fn application_that_listens_on_a_likely_port_is_stepped_around() {
    let Some(world) = World::new() else { return };
    let pod = world.pod();
    prepare(&pod);
    let app = listen(&pod, addr(POD[0], 80));
    // A quarter of the first range.
    let _taken: Vec<_> = (0..512).map(|n| listen(&pod, addr("0.0.0.0", 16384 + 32 * n))).collect();
    for client in [Some(addr(CLIENT[0], 40000)), None] {
        for _ in 0..200 {
            let delivered = deliver(&pod, addr(POD[0], 80), client).await.unwrap();
            assert_exchanges(&delivered, &app.accept().unwrap().0);
        }
    }
}

/// The side that connects closes first, as when a client closes first: 20,000 ports in TIME_WAIT
/// would be more than the first range has.
#[tokio::test]
async fn deliveries_take_over_time_wait_and_no_port_of_the_applications() {
    let Some(world) = World::new() else { return };
    let pod = world.pod();
    prepare(&pod);
    // An application that has nearly run out of ports itself.
    world.set_sysctl("ipv4/ip_local_port_range", "40000 40009");
    let app = listen(&pod, addr(POD[0], 80));
    for client in [Some(addr(CLIENT[0], 40000)), None] {
        for _ in 0..20_000 {
            let delivered = deliver(&pod, addr(POD[0], 80), client).await.unwrap();
            let (accepted, from) = app.accept().unwrap();
            assert!((16384..=32767).contains(&from.port()), "{from}");
            delivered.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!((&accepted).read(&mut [0]).unwrap(), 0);
            drop(accepted);
            delivered.set_nonblocking(false).unwrap();
            assert_eq!((&delivered).read(&mut [0]).unwrap(), 0);
        }
    }
    let waiting = Command::new("ip")
        .args(["netns", "exec", &world.pod, "ss", "-Htan", "state", "time-wait"])
        .output()
        .unwrap();
    let waiting = String::from_utf8(waiting.stdout).unwrap().lines().count();
    assert!(waiting > 1000, "the test did not make TIME_WAIT: {waiting}");
    // The application still has all ten of its ports.
    let _own: Vec<_> =
        (0..10).map(|_| (dial(&pod, addr(POD[0], 0), addr(POD[0], 80)), app.accept())).collect();
}

#[test]
fn preparing_and_removing_leaves_no_trace() {
    let Some(world) = World::new() else { return };
    let before = world.routing();
    prepare(&world.pod());
    let prepared = world.routing();
    for line in ["fwmark 0x6d616c6c lookup 27745", "local default dev lo table 27745"] {
        assert_eq!(prepared.matches(line).count(), 2, "once for each family: {prepared}");
    }
    // As after a restart of the agent.
    prepare(&world.pod());
    assert_eq!(world.routing(), prepared);
    remove_client_address_routes(&world.pod()).unwrap();
    assert_eq!(world.routing(), before);
    remove_client_address_routes(&world.pod()).unwrap();
    assert_eq!(world.routing(), before);
}

#[test]
fn setting_that_was_on_before_stays_on() {
    let Some(world) = World::new() else { return };
    world.set_sysctl("ipv4/tcp_fwmark_accept", "1");
    let before = world.routing();
    prepare(&world.pod());
    prepare(&world.pod());
    remove_client_address_routes(&world.pod()).unwrap();
    assert_eq!(world.routing(), before);
}

#[tokio::test]
async fn pod_without_ipv6_is_prepared_for_ipv4() {
    let Some(world) = World::new() else { return };
    world.set_sysctl("ipv6/conf/all/disable_ipv6", "1");
    let (pod, before) = (world.pod(), world.routing());
    prepare(&pod);
    let app = listen(&pod, addr(POD[0], 80));
    let client = addr(CLIENT[0], 40000);
    let _delivered = deliver(&pod, addr(POD[0], 80), Some(client)).await.unwrap();
    assert_eq!(app.accept().unwrap().1.ip(), client.ip());
    remove_client_address_routes(&pod).unwrap();
    assert_eq!(world.routing(), before);
}

/// As in a container that is not privileged. The copy of this test that sees `/proc/sys` so prepares
/// the namespace, this one looks at the result.
#[test]
fn settings_are_written_although_proc_sys_is_read_only() {
    if let Some(name) = env::var_os(READ_ONLY) {
        let pod = Netns::open(&path_of(name.to_str().unwrap())).unwrap();
        let refused = pod.run(|| fs::write("/proc/sys/net/ipv4/tcp_fwmark_accept", "1"));
        assert_eq!(refused.unwrap().unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
        prepare(&pod);
        return;
    }
    let Some(world) = World::new() else { return };
    let script = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys \
                  && exec \"$0\" --exact settings_are_written_although_proc_sys_is_read_only";
    let copy = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(env::current_exe().unwrap())
        .env(READ_ONLY, &world.pod)
        .output()
        .unwrap();
    assert!(copy.status.success(), "{}", String::from_utf8_lossy(&copy.stdout));
    assert_eq!(world.sysctl("ipv4/tcp_fwmark_accept").trim(), "1");
    assert_eq!(world.sysctl("ipv6/fwmark_reflect").trim(), "1");
}

#[tokio::test]
async fn what_a_pods_listener_accepts_sends_at_once_is_probed_and_resets_when_dropped() {
    let listener = net::listen(net::Bind::To("127.0.0.1".parse().unwrap())).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let far = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (near, _) = listener.accept().await.unwrap();
    assert!(near.nodelay().unwrap());
    let socket = SockRef::from(&near);
    assert!(socket.keepalive().unwrap());
    assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(180));
    drop(near);
    far.readable().await.unwrap();
    assert_eq!(far.try_read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}
