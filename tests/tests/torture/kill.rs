//! Agents that are killed at random moments under load.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use harness::{
    Carrier, Family, Mesh, Pattern, Pod, Serve, exchange, long, receive_pattern, send_pattern, wait,
};

use crate::{is_honest, mesh};

/// The most that an exchange sends in each direction: more than every buffer on the way.
const MOST_BYTES: u64 = 3_000_000;

/// How an ordeal went so far.
#[derive(Debug, Default)]
struct Count {
    good: AtomicU64,
    refused: AtomicU64,
    reset: AtomicU64,
}

impl Count {
    fn add(&self, done: &Result<()>) {
        let kind = done.as_ref().err().map(|error| {
            error.chain().find_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind)
        });
        let which = match kind {
            None => &self.good,
            Some(Some(io::ErrorKind::ConnectionRefused)) => &self.refused,
            Some(_) => &self.reset,
        };
        which.fetch_add(1, Ordering::AcqRel);
    }

    fn good(&self) -> u64 {
        self.good.load(Ordering::Acquire)
    }
}

/// Sends so many bytes and ends, and expects so many and the end. In turns, so that one thread uses a
/// socket: the kernel tells a reset once, to whoever asks first.
pub(crate) fn ask(mut stream: TcpStream, up: u64, down: u64) -> Result<()> {
    stream.write_all(&[up.to_be_bytes(), down.to_be_bytes()].concat()).context("send the sizes")?;
    send_pattern(&mut stream, up, Pattern::CLIENT)?;
    stream.shutdown(Shutdown::Write).context("end sending")?;
    receive_pattern(&mut stream, down, Pattern::SERVER)
}

/// Answers [`ask`].
pub(crate) fn answer(mut stream: TcpStream) -> Result<()> {
    let (mut up, mut down) = ([0; 8], [0; 8]);
    stream.read_exact(&mut up).context("read the first size")?;
    stream.read_exact(&mut down).context("read the second size")?;
    receive_pattern(&mut stream, u64::from_be_bytes(up), Pattern::CLIENT)?;
    send_pattern(&mut stream, u64::from_be_bytes(down), Pattern::SERVER)
}

/// Programs that exchange bytes over and over, across nodes, through one node's agent and past the
/// other's, while `change` does its worst. Whatever they see is success, a refusal or a reset.
fn ordeal(
    mesh: &mut Mesh,
    rng: &mut Rng,
    change: impl FnOnce(&mut Mesh, &mut Rng, &Count) -> Result<()>,
) -> Result<Count> {
    let servers = ["b1", "b2", "a2"].map(|pod| mesh.pod(pod).serve(8080, Serve::custom(answer)));
    let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    let routes = [("a1", "b1"), ("a1", "b2"), ("a1", "a2"), ("b2", "a2"), ("b2", "b1")];
    // Across nodes, on one, and directly, each by both families.
    let routes = routes.map(|(from, to)| {
        let to = Family::BOTH.map(|family| mesh.pod(to).addr(family, 8080));
        (mesh.shared_pod(from), to)
    });
    for client in ["a1", "b2"] {
        // In five minutes they would run out of ports to dial the same server from, as without a mesh.
        mesh.pod(client).sysctl("net/ipv4/tcp_tw_reuse", "1")?;
        mesh.pod(client).sysctl("net/ipv4/ip_local_port_range", "10240 65535")?;
    }
    let (stop, count) = (AtomicBool::new(false), Count::default());
    let (wrong, wrongs) = mpsc::channel();
    let run = |from: &Pod, to: SocketAddr, mut rng: Rng, wrong: &mpsc::Sender<String>| {
        while !stop.load(Ordering::Acquire) {
            // Small ones mostly, and some that are on their way when it happens.
            let most = if rng.u8(..) < 64 { MOST_BYTES } else { 20_000 };
            let (up, down) = (rng.u64(1..most), rng.u64(1..most));
            let done = from.connect(to).and_then(|stream| ask(stream, up, down));
            count.add(&done);
            if let Err(error) = done {
                if !is_honest(&error) {
                    wrong
                        .send(format!("{up} and {down} bytes to {to}: {error:#}"))
                        .unwrap_or_default();
                }
                // Programs that are refused wait a moment: ten that do not leave nothing to whoever starts.
                thread::sleep(Duration::from_millis(20));
            }
        }
    };
    thread::scope(|scope| {
        for (from, to) in &routes {
            for to in to {
                let (run, wrong, rng) = (&run, wrong.clone(), rng.fork());
                scope.spawn(move || run(from, *to, rng, &wrong));
            }
        }
        let changed = change(mesh, rng, &count);
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
    Ok(count)
}

fn killed(carrier: Carrier) -> Result<()> {
    let mut rng = Rng::with_seed(long::seed());
    let mut mesh = mesh(carrier)?;
    let (mut kills, mut backs) = (0, Vec::new());
    let _echo = mesh.pod("b1").serve(8081, Serve::Echo)?;
    // Whether both agents carry: then what is measured is one of them.
    let mut carries = true;
    let count = ordeal(&mut mesh, &mut rng, |mesh, rng, count| {
        let started = Instant::now();
        let lasts = long::either(Duration::from_secs(5), Duration::from_secs(300));
        while started.elapsed() < lasts {
            let node = ["a", "b"][rng.usize(..2)];
            mesh.agent_mut(node).kill()?;
            let began = Instant::now();
            mesh.agent_mut(node).start_again()?;
            kills += 1;
            let carried = std::mem::replace(&mut carries, false);
            if rng.bool() {
                // Also while it starts.
                thread::sleep(Duration::from_millis(rng.u64(..600)));
                continue;
            }
            wait::until(wait::SOON, "an exchange between the nodes", || tunnelled(mesh).is_ok())?;
            if carried {
                backs.push((began.elapsed(), node));
            }
            for node in ["a", "b"] {
                mesh.agent_mut(node).wait_until_ready()?;
            }
            carries = true;
            thread::sleep(Duration::from_millis(rng.u64(..1_000)));
        }
        for node in ["a", "b"] {
            mesh.agent_mut(node).wait_until_ready()?;
        }
        let before = count.good();
        wait::until(wait::SOON, "the mesh to work again", || count.good() > before + 20)
    })?;
    for node in ["a", "b"] {
        let mut backs: Vec<_> =
            backs.iter().filter(|(_, of)| *of == node).map(|(back, _)| *back).collect();
        backs.sort();
        let part = |of: usize| {
            backs.get((backs.len() * of / 10).min(backs.len().saturating_sub(1))).copied()
        };
        if let (Some(best), Some(usual), Some(most), Some(worst)) =
            (part(0), part(5), part(9), part(10))
        {
            long::report(&format!(
                "{carrier:?}: {} of agent {node}: back after {usual:?}, 9 of 10 within {most:?}, \
                 {best:?} to {worst:?}",
                backs.len()
            ));
            // In the suite other tests run beside it, and a handful of kills have no median.
            ensure!(!long::is_long() || usual < Duration::from_secs(1), "{node}: {backs:?}");
        }
    }
    long::report(&format!("{carrier:?}: {kills} kills, {count:?}"));
    let bad = count.refused.into_inner() + count.reset.into_inner();
    ensure!(count.good.into_inner() > 20 && bad > 0, "{kills} kills and {bad} failures");
    let direct = mesh.agent("b").metric("mesh_capture_total", &[("event", "direct_taken")])?;
    ensure!(direct > 0.0, "nothing went the direct way");
    // Nothing of it is left that would hold up the next one.
    tunnelled(&mesh)
}

/// An exchange through both agents.
fn tunnelled(mesh: &Mesh) -> Result<()> {
    let mut stream = mesh.pod("a1").connect(mesh.pod("b1").v4(8081))?;
    exchange(&mut stream, b"carried again")
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
