//! Torture: crashes, stalls, crowds and bad manners. Whatever happens underneath, a program sees
//! success, a refusal or a reset; never a wrong byte, never an early end.

mod capture;
mod change;
mod clock;
mod crash;
mod crowd;
mod disk;
mod kill;
mod manners;
mod network;

use std::fs;
use std::io;
use std::thread;

use anyhow::Result;
use harness::{Agent, Carrier, Family, Mesh, PodSpec, long, wait};

fn mesh(carrier: Carrier) -> Result<Mesh> {
    // Node a's pods talk through their agent, whose relay is what suffers here; node b's directly.
    let relayed = PodSpec::new("a2", "a").annotation("malla.dev/direct", "off");
    Mesh::two_nodes_builder().carrier(carrier).pod(relayed).start()
}

/// Both carriers by IPv4, and lanes by IPv6; in the long form also QUIC by IPv6.
fn carriers() -> Vec<(Carrier, Family)> {
    let [lane, quic] = Carrier::BOTH;
    let [v4, v6] = Family::BOTH;
    let all = [(lane, v4), (quic, v4), (lane, v6), (quic, v6)];
    all[..long::either(3, all.len())].to_vec()
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

/// What a thread has returned, or its panic.
fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panicked| std::panic::resume_unwind(panicked))
}

/// File descriptors that an agent has open.
fn fds(agent: &Agent) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", agent.pid()))?.count())
}

/// How an exchange may fail when the mesh changes under it.
fn is_honest(error: &anyhow::Error) -> bool {
    // The last one is what shutdown(2) says of a connection that has just been reset.
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotConnected};
    let cause = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>());
    let kind = cause.map(io::Error::kind);
    kind.is_some_and(|kind| {
        matches!(kind, BrokenPipe | ConnectionRefused | ConnectionReset | NotConnected)
    })
}
