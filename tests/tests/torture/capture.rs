//! Pods with the same ports, and pods that take over others' addresses.

use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context as _, Result};
use harness::{Carrier, Pod, Serve, wait};
use socket2::{Domain, Socket, Type};

use crate::mesh;

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
