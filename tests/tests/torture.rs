//! Torture: crashes, stalls, crowds and bad manners. Whatever happens underneath, a program sees
//! success, a refusal or a reset; never a wrong byte, never an early end.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::{
    Agent, Carrier, Family, Load, Mesh, Pattern, Pod, PodSpec, Serve, ServiceSpec, exchange,
    exchange_patterns, linger_zero, receive_pattern, send_pattern, wait,
};
use socket2::{Domain, Socket, Type};

/// What each of the programs of an ordeal exchanges in each direction.
const BYTES: u64 = 300_000;

fn mesh(carrier: Carrier) -> Result<Mesh> {
    Mesh::two_nodes_builder().carrier(carrier).start()
}

/// How an exchange may fail when an agent dies under it.
fn is_honest(error: &anyhow::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset};
    let cause = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>());
    let kind = cause.map(io::Error::kind);
    kind.is_some_and(|kind| matches!(kind, BrokenPipe | ConnectionRefused | ConnectionReset))
}

/// Programs that exchange [`BYTES`] over and over, across nodes and within them, while `change` does
/// its worst. Returns how often that succeeded and how often it failed honestly; anything else is an
/// error.
fn ordeal(
    mesh: &mut Mesh,
    change: impl FnOnce(&mut Mesh, &AtomicU64) -> Result<()>,
) -> Result<(u64, u64)> {
    // In turns, so that one thread uses a socket: the kernel tells a reset once, to whoever asks first.
    let serve = Serve::custom(|mut stream| {
        receive_pattern(&mut stream, BYTES, Pattern::CLIENT)?;
        send_pattern(&mut stream, BYTES, Pattern::SERVER)
    });
    let ask = |mut stream: TcpStream| -> Result<()> {
        send_pattern(&mut stream, BYTES, Pattern::CLIENT)?;
        stream.shutdown(Shutdown::Write).context("end sending")?;
        receive_pattern(&mut stream, BYTES, Pattern::SERVER)
    };
    let servers = ["b1", "b2", "a2"].map(|pod| mesh.pod(pod).serve(8080, serve.clone()));
    let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    let routes = [("a1", "b1"), ("a1", "b2"), ("a1", "a2"), ("b2", "a2"), ("b2", "b1")];
    let routes = routes.map(|(from, to)| (mesh.shared_pod(from), mesh.pod(to).v4(8080)));
    let (stop, good, bad) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let (wrong, wrongs) = mpsc::channel();
    let run = |from: &Pod, to: SocketAddr, wrong: &mpsc::Sender<String>| {
        while !stop.load(Ordering::Acquire) {
            let done = from.connect(to).and_then(ask);
            match done {
                Ok(()) => _ = good.fetch_add(1, Ordering::AcqRel),
                Err(error) if is_honest(&error) => {
                    bad.fetch_add(1, Ordering::AcqRel);
                    thread::sleep(Duration::from_millis(5));
                }
                Err(error) => wrong.send(format!("to {to}: {error:#}")).unwrap_or_default(),
            }
        }
    };
    thread::scope(|scope| {
        for (from, to) in &routes {
            for _ in 0..2 {
                let (run, wrong) = (&run, wrong.clone());
                scope.spawn(move || run(from, *to, &wrong));
            }
        }
        let changed = change(mesh, &good);
        stop.store(true, Ordering::Release);
        changed
    })?;
    let mut wrong: Vec<_> = wrongs.try_iter().collect();
    for server in &servers {
        let ends = server.outcomes().into_iter().filter_map(Result::err);
        let is_reset = |end: &String| end.contains("os error 104") || end.contains("os error 32");
        wrong.extend(ends.filter(|end| !is_reset(end)));
    }
    ensure!(wrong.is_empty(), "{} like {:#?}", wrong.len(), &wrong[..wrong.len().min(5)]);
    Ok((good.into_inner(), bad.into_inner()))
}

fn killed(carrier: Carrier) -> Result<()> {
    let mut mesh = mesh(carrier)?;
    let (good, bad) = ordeal(&mut mesh, |mesh, good| {
        let started = Instant::now();
        let mut round: u32 = 0;
        while started.elapsed() < Duration::from_secs(5) {
            // At another moment each time.
            thread::sleep(Duration::from_millis(u64::from(50 + round * 137 % 450)));
            let node = ["a", "b"][round as usize % 2];
            mesh.agent_mut(node).kill()?;
            mesh.agent_mut(node).restart()?;
            round += 1;
        }
        let before = good.load(Ordering::Acquire);
        wait::until(wait::SOON, "the mesh to work again", || {
            good.load(Ordering::Acquire) > before + 20
        })?;
        Ok(())
    })?;
    ensure!(good > 20 && bad > 0, "{good} exchanges succeeded, {bad} failed");
    Ok(())
}

#[test]
fn killed_agent_never_forges_an_end_lane() -> Result<()> {
    harness::require!();
    killed(Carrier::Lane)
}

#[test]
fn killed_agent_never_forges_an_end_quic() -> Result<()> {
    harness::require!();
    killed(Carrier::Quic)
}

#[test]
fn peer_that_slept_is_used_again() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mut mesh =
            Mesh::two_nodes_builder().carrier(carrier).flag("--connect-timeout-s=1").start()?;
        let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
        let to = mesh.service("b").v4(80);
        let mut held = mesh.pod("a1").connect(to)?;
        exchange(&mut held, b"before")?;
        mesh.agent_mut("b").signal(libc::SIGSTOP)?;
        let took: Vec<_> = thread::scope(|scope| {
            let all: Vec<_> = (0..20).map(|_| scope.spawn(|| mesh.pod("a1").refused(to))).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect::<Result<_>>()
        })?;
        let slowest = took.iter().max().context("nobody asked")?;
        ensure!(*slowest < Duration::from_secs(4), "{carrier:?}: one after another? {took:?}");
        mesh.agent_mut("b").signal(libc::SIGCONT)?;
        exchange(&mut held, b"a pause is no end")?;
        let woken = Instant::now();
        wait::until(wait::SOON, "the peer to be used again", || {
            mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"after")).is_ok()
        })?;
        ensure!(woken.elapsed() < Duration::from_secs(7), "healed after {:?}", woken.elapsed());
    }
    Ok(())
}

/// Lets nothing pass between the nodes, or everything again.
fn cut(mesh: &Mesh, cut: bool) -> Result<()> {
    let script = if cut {
        "add table inet cut { \
         chain in { type filter hook input priority 0; iifname to-0 drop; }; \
         chain out { type filter hook output priority 0; oifname to-0 drop; }; }"
    } else {
        "delete table inet cut"
    };
    mesh.node("b").netns().run(|| {
        ensure!(Command::new("nft").arg(script).status()?.success(), "nft {script}");
        Ok(())
    })
}

#[test]
fn link_that_is_cut_for_seconds_breaks_nothing() -> Result<()> {
    harness::require!("nft");
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let bytes = 20_000_000;
        let _server = mesh.pod("b1").serve(8080, Serve::Exchange(bytes))?;
        let stream = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
        thread::scope(|scope| {
            let exchanging =
                scope.spawn(|| exchange_patterns(&stream, bytes, Pattern::CLIENT, Pattern::SERVER));
            thread::sleep(Duration::from_millis(100));
            cut(&mesh, true)?;
            thread::sleep(Duration::from_secs(3));
            ensure!(!exchanging.is_finished(), "{carrier:?}: too early to tell");
            cut(&mesh, false)?;
            exchanging.join().unwrap().with_context(|| format!("{carrier:?}"))
        })?;
    }
    Ok(())
}

#[test]
fn readers_that_stall_hold_up_nobody_else() -> Result<()> {
    harness::require!();
    const READERS: u64 = 24;
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let _source = mesh.pod("b1").serve(8080, Serve::Source(1 << 30))?;
        let _echo = mesh.pod("b1").serve(8081, Serve::Echo)?;
        let rss = || anyhow::Ok(mesh.agent("a").rss_bytes()? + mesh.agent("b").rss_bytes()?);
        let before = rss()?;
        let connect = |_| mesh.pod("a1").connect(mesh.pod("b1").v4(8080));
        let stalled = (0..READERS).map(connect).collect::<Result<Vec<_>>>()?;
        let mut last = before;
        // Until every buffer on the way is full, and nothing grows any more.
        wait::until(wait::SOON, "the agents to hold what they will", || {
            thread::sleep(Duration::from_millis(700));
            let now = rss().unwrap_or_default();
            let grown = now.saturating_sub(last);
            last = now;
            grown < 1 << 20
        })?;
        // Both workers, whichever the connection gets to.
        for _ in 0..4 {
            let mut other = mesh.pod("a1").connect(mesh.pod("b1").v4(8081))?;
            other.set_read_timeout(Some(Duration::from_secs(5)))?;
            exchange(&mut other, &[7; 100_000])
                .with_context(|| format!("{carrier:?}: beside readers that stall"))?;
        }
        let grown = rss()?.saturating_sub(before);
        ensure!(grown < READERS * (4 << 20), "{carrier:?}: grown by {grown} bytes");
        drop(stalled);
    }
    Ok(())
}

/// Waits until no agent knows of an open connection.
fn wait_until_idle(mesh: &Mesh) -> Result<()> {
    for node in mesh.nodes() {
        wait::until(wait::SOON, "no connection to be left", || {
            let open = mesh.agent(node.name()).ask(&["connections"]);
            open.is_ok_and(|open| open.as_array().is_some_and(Vec::is_empty))
        })?;
    }
    Ok(())
}

/// File descriptors that an agent has open.
fn fds(agent: &Agent) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", agent.pid()))?.count())
}

/// What an agent may keep open for later: idle lanes, of every worker to every peer.
const SPARE: usize = 2 * 2 * 2 * 64;

#[test]
fn crowd_is_served_and_leaves_nothing_behind() -> Result<()> {
    harness::require!();
    const EACH: usize = 1000;
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let _server = mesh.pod("b1").serve(8080, Serve::Greet("x"))?;
        let to = mesh.pod("b1").v4(8080);
        let before = [fds(mesh.agent("a"))?, fds(mesh.agent("b"))?];
        let crowd = |pod: &str| {
            mesh.pod(pod).run(|| {
                let mut open = Vec::new();
                for n in 0..EACH {
                    open.push(TcpStream::connect(to).with_context(|| format!("number {n}"))?);
                }
                for (n, stream) in open.iter_mut().enumerate() {
                    stream.set_read_timeout(Some(wait::SOON))?;
                    stream.read_exact(&mut [0]).with_context(|| format!("number {n}"))?;
                }
                Ok(open)
            })
        };
        // All of them are open before the first ends.
        let open = thread::scope(|scope| {
            let dialling = ["a1", "a2"].map(|pod| scope.spawn(move || crowd(pod)));
            dialling.map(|one| one.join().unwrap()).into_iter().collect::<Result<Vec<_>>>()
        });
        drop(open.with_context(|| format!("{carrier:?}"))?);
        wait_until_idle(&mesh)?;
        for (node, before) in ["a", "b"].into_iter().zip(before) {
            let after = fds(mesh.agent(node))?;
            ensure!(after < before + SPARE, "{carrier:?}: {before} descriptors, then {after}");
        }
    }
    Ok(())
}

#[test]
fn many_short_connections_leave_nothing_behind() -> Result<()> {
    harness::require!();
    const EACH: usize = 600;
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let _servers = ["b1", "a2"].map(|pod| mesh.pod(pod).serve(8080, Serve::Echo).unwrap());
        let agents = ["a", "b"].map(|node| mesh.agent(node));
        let before = agents.map(|agent| fds(agent).unwrap());
        let run = |to: SocketAddr| {
            mesh.pod("a1").run(|| {
                for _ in 0..EACH {
                    let mut stream = TcpStream::connect(to)?;
                    stream.set_read_timeout(Some(wait::SOON))?;
                    exchange(&mut stream, b"x")?;
                }
                Ok(())
            })
        };
        let run = &run;
        thread::scope(|scope| {
            let targets = ["b1", "a2", "b1", "a2"].map(|to| mesh.pod(to).v4(8080));
            let running = targets.map(|to| scope.spawn(move || run(to)));
            running.into_iter().try_for_each(|one| one.join().unwrap())
        })?;
        wait_until_idle(&mesh)?;
        for (agent, before) in agents.into_iter().zip(before) {
            let after = fds(agent)?;
            ensure!(after < before + SPARE, "{carrier:?}: {before} descriptors, then {after}");
            ensure!(agent.metric("mesh_refusals_total", &[])? == 0.0, "{carrier:?}: refused");
        }
    }
    Ok(())
}

/// How a program that has sent and received something goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Manner {
    /// Closes, having read everything.
    Close,
    /// Closes without having read: the kernel makes that a reset.
    CloseUnread,
    /// Resets.
    Reset,
    /// Ends sending, and reads on.
    HalfThenRead,
    /// Ends sending, and resets later.
    HalfThenReset,
    /// Reads to the end, and writes then.
    Wait,
}

impl Manner {
    const ALL: [Self; 6] = [
        Self::Close,
        Self::CloseUnread,
        Self::Reset,
        Self::HalfThenRead,
        Self::HalfThenReset,
        Self::Wait,
    ];

    /// Long enough for anything to arrive, so that what is seen does not depend on who is faster.
    const SETTLE: Duration = Duration::from_millis(300);

    /// Does it, and tells what could be seen.
    fn behave(self, mut stream: TcpStream) -> Result<String> {
        stream.set_read_timeout(Some(Self::SETTLE * 8))?;
        stream.write_all(&[1; 1000])?;
        thread::sleep(Self::SETTLE);
        let mut seen = String::new();
        match self {
            Self::Close | Self::Reset => {
                stream.read_exact(&mut [0; 1000])?;
                thread::sleep(Self::SETTLE);
            }
            Self::CloseUnread => thread::sleep(Self::SETTLE),
            Self::HalfThenRead => {
                stream.shutdown(Shutdown::Write)?;
                seen = read_all(&mut stream);
            }
            Self::HalfThenReset => {
                stream.shutdown(Shutdown::Write)?;
                thread::sleep(Self::SETTLE * 2);
            }
            Self::Wait => {
                seen = read_all(&mut stream);
                thread::sleep(Self::SETTLE * 4);
                for _ in 0..2 {
                    let written = stream.write(&[1]).map_err(|error| error.kind());
                    seen = format!("{seen}, {written:?}");
                    thread::sleep(Self::SETTLE);
                }
            }
        }
        if matches!(self, Self::Reset | Self::HalfThenReset) {
            linger_zero(&stream)?;
        }
        Ok(seen)
    }
}

/// How much comes, and how it ends.
fn read_all(stream: &mut TcpStream) -> String {
    let mut bytes = 0;
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return format!("{bytes} bytes and the end"),
            Ok(n) => bytes += n,
            Err(error) => return format!("{bytes} bytes and {:?}", error.kind()),
        }
    }
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panicked| std::panic::resume_unwind(panicked))
}

/// What two programs see of each other, for each pair of manners of which one is watched.
fn manners(mesh: &Mesh, to: &str) -> Result<Vec<String>> {
    let watches = |manner| matches!(manner, Manner::HalfThenRead | Manner::Wait);
    let all = Manner::ALL.into_iter().flat_map(|client| Manner::ALL.map(|server| (client, server)));
    // Two that wait see only who loses patience first.
    let pairs = all.filter(|&(client, server)| {
        (watches(client) || watches(server)) && (client, server) != (Manner::Wait, Manner::Wait)
    });
    let meet = |port: u16, client: Manner, server: Manner| -> Result<String> {
        let listener = mesh.pod(to).listen(port)?;
        let dialled = mesh.pod("a1").connect(mesh.pod(to).v4(port))?;
        let (accepted, _) = listener.accept()?;
        let (seen, other) = thread::scope(|scope| {
            let dialling = scope.spawn(|| client.behave(dialled));
            let accepting = server.behave(accepted);
            (joined(dialling), accepting)
        });
        Ok(format!("{client:?} meets {server:?}: {:?} and {:?}", seen?, other?))
    };
    let meet = &meet;
    thread::scope(|scope| {
        let ports = 9000..;
        let running: Vec<_> = ports
            .zip(pairs)
            .map(|(port, (client, server))| scope.spawn(move || meet(port, client, server)))
            .collect();
        running.into_iter().map(joined).collect()
    })
}

#[test]
fn manners_are_seen_as_over_plain_tcp() -> Result<()> {
    harness::require!();
    let plain = Mesh::two_nodes_builder().plain().start()?;
    let (lane, quic) = (mesh(Carrier::Lane)?, mesh(Carrier::Quic)?);
    // Across the nodes by each carrier, and within one.
    let worlds = [(&plain, "b1"), (&lane, "b1"), (&quic, "b1"), (&lane, "a2")];
    let [plain, meshed @ ..] = thread::scope(|scope| {
        let meeting = worlds.map(|(mesh, to)| scope.spawn(move || manners(mesh, to)));
        meeting.map(|one| one.join().unwrap())
    });
    let plain = plain?;
    for (seen, name) in meshed.into_iter().zip(["lane", "quic", "local"]) {
        assert_eq!(plain, seen?, "{name}");
    }
    Ok(())
}

#[test]
fn close_right_after_connect_and_single_bytes_are_harmless() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let _server = mesh.pod("b1").serve(8080, Serve::Greet("hi"))?;
        let to = mesh.pod("b1").v4(8080);
        // Says nothing all the while, and is not forgotten.
        let mut silent = mesh.pod("a1").connect(to)?;
        let mut bytewise = mesh.pod("a1").connect(to)?;
        bytewise.read_exact(&mut [0; 2])?;
        for round in 0..200 {
            let stream = mesh.pod("a1").connect(to)?;
            if round % 2 == 0 {
                linger_zero(&stream)?;
            }
        }
        let mut writing = bytewise.try_clone()?;
        let bytes: Vec<u8> = (0..=250).cycle().take(3000).collect();
        let mut back = vec![0; bytes.len()];
        thread::scope(|scope| {
            let written =
                scope.spawn(|| bytes.iter().try_for_each(|byte| writing.write_all(&[*byte])));
            bytewise.read_exact(&mut back)?;
            written.join().unwrap()
        })?;
        ensure!(back == bytes, "{carrier:?}: wrong bytes");
        silent.read_exact(&mut [0; 2])?;
        drop((silent, bytewise, writing));
        wait_until_idle(&mesh)?;
    }
    Ok(())
}

/// A connection of `pod` from a port of the test's choice.
fn connect_from(pod: &Pod, port: u16, to: SocketAddr) -> Result<TcpStream> {
    let connected = pod.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&pod.v4(port).into())?;
        socket.connect(&to.into())?;
        socket.set_read_timeout(Some(wait::SOON))?;
        Ok(TcpStream::from(socket))
    });
    connected.with_context(|| format!("{} from port {port} to {to}", pod.name()))
}

#[test]
fn one_source_port_leads_to_several_destinations_at_once() -> Result<()> {
    harness::require!();
    let mut mesh = mesh(Carrier::Auto)?;
    let served = [("b1", "b1"), ("b2", "b2"), ("a2", "a2")];
    let _servers = served.map(|(pod, name)| mesh.pod(pod).serve(8080, Serve::Greet(name)).unwrap());
    // All of them wait to be accepted at the same moment.
    mesh.agent_mut("a").signal(libc::SIGSTOP)?;
    let mut streams = Vec::new();
    for from in ["a1", "a2"] {
        for to in ["b1", "b2"] {
            streams.push((to, connect_from(mesh.pod(from), 41_000, mesh.pod(to).v4(8080))?));
        }
    }
    mesh.agent_mut("a").signal(libc::SIGCONT)?;
    for (to, mut stream) in streams {
        let mut name = [0; 2];
        stream.read_exact(&mut name).context(to)?;
        assert_eq!(&name, to.as_bytes(), "another destination than the one that was asked for");
    }
    Ok(())
}

#[test]
fn agent_without_descriptors_says_so_and_recovers() -> Result<()> {
    harness::require!("prlimit");
    let mesh = mesh(Carrier::Auto)?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.pod("b1").v4(8080);
    exchange(&mut mesh.pod("a1").connect(to)?, b"before")?;
    for node in ["a", "b"] {
        let agent = mesh.agent(node);
        let limit = |most: usize| -> Result<()> {
            let mut prlimit = Command::new("prlimit");
            prlimit.arg(format!("--pid={}", agent.pid())).arg(format!("--nofile={most}:20000"));
            ensure!(prlimit.status()?.success(), "prlimit");
            Ok(())
        };
        // What the round before still holds would come free under the limit.
        wait_until_idle(&mesh)?;
        limit(fds(agent)? + 6)?;
        let open: Vec<_> = (0..40).map(|_| mesh.pod("a1").connect(to)).collect();
        // In its log where it cannot accept, in the access log where it cannot deliver.
        wait::until(wait::SOON, "the agent to say what it lacks", || {
            let lacks = |told: &str| told.contains("Too many open files");
            lacks(&agent.log()) || lacks(&agent.output())
        })?;
        drop(open);
        limit(20_000)?;
        wait::until(wait::SOON, "the agent to work again", || {
            mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"after")).is_ok()
        })?;
    }
    Ok(())
}

#[test]
fn address_that_another_pod_takes_over_means_the_new_one() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
        let (to, agent) = (mesh.pod("b1").v4(8080), mesh.agent("a"));
        exchange(&mut mesh.pod("a1").connect(to)?, b"to the old one")?;
        let old = fs::read_to_string(mesh.manifests().dir().join("pod-default-b1.yaml"))?;
        let new = old
            .replace(mesh.pod("b1").uid(), "successor")
            .replace("name: \"b1\"", "name: \"successor\"")
            .replace("serviceAccountName: \"b1\"", "serviceAccountName: \"successor\"");
        mesh.delete_pod_manifest("b1")?;
        mesh.manifests().write("pod-default-successor", &new)?;
        let ours = |identity: &str| identity.ends_with("/sa/successor");
        wait::until(wait::SOON, "the successor to be called", || {
            mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"hello")).is_ok()
                && agent.access_log().iter().any(|record| ours(record.text("dst.identity")))
        })?;
        wait_until_idle(&mesh)?;
        let before = agent.access_log().len();
        for _ in 0..20 {
            exchange(&mut mesh.pod("a1").connect(to)?, b"hello")?;
        }
        wait::until(wait::SOON, "20 records", || agent.access_log().len() >= before + 20)?;
        for record in &agent.access_log()[before..] {
            ensure!(ours(record.text("dst.identity")), "{carrier:?}: {record:?}");
        }
    }
    Ok(())
}

#[test]
fn pod_in_strict_mode_reaches_itself_through_its_service() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("b1", "b").annotation("malla.dev/mode", "strict"))
        .start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    for family in Family::BOTH {
        for to in [mesh.service("b").addr(family, 80), mesh.pod("b1").addr(family, 8080)] {
            exchange(&mut mesh.pod("b1").connect(to)?, b"it is me")
                .with_context(|| to.to_string())?;
        }
    }
    Ok(())
}

#[test]
fn service_goes_on_when_one_of_its_nodes_dies() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        for signal in [libc::SIGKILL, libc::SIGSTOP] {
            let mut mesh = Mesh::two_nodes_builder()
                .service(ServiceSpec::new("s").port(80, 8080).pods(&["a2", "b1"]))
                .carrier(carrier)
                .flag("--connect-timeout-s=1")
                .start()?;
            let servers = ["a2", "b1"].map(|pod| mesh.pod(pod).serve(8080, Serve::Echo).unwrap());
            let to = mesh.service("s").v4(80);
            wait::until(wait::SOON, "both to be called", || {
                mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"both")).is_ok()
                    && servers.iter().all(|server| !server.clients().is_empty())
            })?;
            mesh.agent_mut("b").signal(signal)?;
            let asked =
                (0..20).map(|_| exchange(&mut mesh.pod("a1").connect(to)?, b"still there?"));
            let failed = asked.filter(Result::is_err).count();
            // A carrier that was open already is found out by one connection of each worker; what
            // that one has sent may not be sent again.
            ensure!(failed <= 2, "{carrier:?}, signal {signal}: {failed} of 20 failed");
            mesh.agent_mut("b").signal(libc::SIGCONT)?;
        }
    }
    Ok(())
}

#[test]
fn server_enrols_and_leaves_under_quic_without_a_failed_request() -> Result<()> {
    harness::require!();
    let mesh = mesh(Carrier::Quic)?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.pod("b1").v4(8080);
    let mut held = mesh.pod("a1").connect(to)?;
    exchange(&mut held, b"before")?;
    Load::during(mesh.pod("a1"), to, |load| {
        for toggle in 0..20 {
            mesh.enrol("b1", toggle % 2 == 1)?;
            load.wait_for(3)?;
            exchange(&mut held, b"an open connection is left as it is")?;
        }
        Ok(())
    })?;
    Ok(())
}

#[test]
fn short_certificates_and_new_roots_fail_no_connection() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let lifetime = Duration::from_secs(4);
        let mesh = Mesh::two_nodes_builder().carrier(carrier).cert_lifetime(lifetime).start()?;
        let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
        let (dir, next) = (mesh.ca_dir(), mesh.state_dir().join("next-ca"));
        harness::init_ca(&next, "cluster.local")?;
        let put = |name: &str, text: &[u8]| -> Result<()> {
            fs::write(dir.join("new"), text)?;
            Ok(fs::rename(dir.join("new"), dir.join(name))?)
        };
        Load::during(mesh.pod("a1"), mesh.pod("b1").v4(8080), |_load| {
            let (old, new) = (fs::read(dir.join("root.pem"))?, fs::read(next.join("root.pem"))?);
            put("bundle.pem", &[old, new.clone()].concat())?;
            thread::sleep(Duration::from_secs(1));
            put("root.key", &fs::read(next.join("root.key"))?)?;
            put("root.pem", &new)?;
            // All that the old root has signed ends meanwhile.
            thread::sleep(lifetime + Duration::from_secs(1));
            put("bundle.pem", &new)?;
            thread::sleep(Duration::from_secs(1));
            Ok(())
        })?;
    }
    Ok(())
}
