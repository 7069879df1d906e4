//! The direct way: pods of one node that the agent has let talk once talk without it.

mod admission;
mod books;
mod churn;
mod node;
mod verdicts;
mod way;

use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use harness::{Mesh, Pod, Server, exchange, wait};

/// Whether the server has seen the client's own socket since it had seen `before` clients: what the agent delivers
/// comes from another port. Not among those before: to the agent's listener the kernel may give the port of a
/// connection that goes to the server itself.
fn is_direct(server: &Server, before: usize, stream: &TcpStream) -> Result<bool> {
    let local = stream.local_addr()?;
    let local = SocketAddr::new(local.ip().to_canonical(), local.port());
    Ok(server.clients().iter().skip(before).any(|client| *client == local))
}

/// Connects and exchanges a word; says whether that was direct.
fn connect(client: &Pod, to: SocketAddr, server: &Server) -> Result<(TcpStream, bool)> {
    let before = server.clients().len();
    let mut stream = client.connect(to)?;
    exchange(&mut stream, b"hello")?;
    let direct = is_direct(server, before, &stream)?;
    Ok((stream, direct))
}

/// Connects until the kernel lets a connection through by itself.
fn until_direct(client: &Pod, to: SocketAddr, server: &Server) -> Result<TcpStream> {
    let mut last = None;
    let found =
        wait::until_some(wait::SOON, "a direct connection", || match connect(client, to, server) {
            Ok((stream, true)) => Some(stream),
            Ok((_, false)) => None,
            Err(error) => {
                last = Some(error);
                None
            }
        });
    match (found, last) {
        (Err(error), Some(last)) => Err(error).context(format!("{last:#}")),
        (found, _) => found,
    }
}

fn mapped(addr: SocketAddr) -> Result<SocketAddr> {
    let SocketAddr::V4(v4) = addr else { anyhow::bail!("{addr} is not IPv4") };
    Ok((v4.ip().to_ipv6_mapped(), v4.port()).into())
}

fn kernel(mesh: &Mesh, event: &str) -> Result<f64> {
    mesh.agent("a").metric("mesh_capture_total", &[("event", event)])
}

/// How long the agent may take to read what has changed, on a machine that is busy with other tests.
const READ_WITHIN: Duration = Duration::from_secs(10);

/// The moment before something is changed.
struct Change {
    /// So many bytes the agent's log had.
    known: usize,
    at: SystemTime,
}

impl Change {
    /// Of what is written next.
    fn begin(mesh: &Mesh) -> Self {
        Self { known: mesh.agent("a").log().len(), at: SystemTime::now() }
    }

    /// From when the agent read it, which must not take for ever either, until `ended`.
    fn since_read(&self, mesh: &Mesh, ended: SystemTime) -> Result<Duration> {
        let read = mesh.agent("a").logged_at(self.known, "new snapshot")?;
        // The log's time is cut to microseconds, and so may lie before.
        let took = read.duration_since(self.at).unwrap_or_default();
        ensure!(took < READ_WITHIN, "read after {took:?}");
        ended.duration_since(read).context("it had not been read yet")
    }
}

/// Has node `a` do what nftables understands.
fn nft(mesh: &Mesh, rules: &str) -> Result<String> {
    let nft = || Command::new("nft").arg(rules).output().context("nft");
    let said = mesh.node("a").netns().run(nft)?;
    ensure!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    Ok(String::from_utf8(said.stdout)?)
}
