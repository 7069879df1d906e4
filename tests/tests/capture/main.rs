//! Capture and original destination: whatever way a program connects, the agent takes the connection
//! and carries it where the program meant, and the program cannot tell.

mod dialled;
mod left_alone;
mod ports;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use socket2::{Domain, Protocol, Socket, Type};

/// Long enough for a busy machine, short enough for a test that fails.
const LIMIT: Duration = Duration::from_secs(10);

fn stream(to: SocketAddr) -> Result<Socket> {
    Ok(Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?)
}
