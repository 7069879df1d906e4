//! Connections to the application, in its own network namespace.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use socket2::Socket;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{
    DELIVERY_MARK, Netns, connected, do_not_pace, domain, relayed_socket, source_port,
    start_connect,
};

/// How long a connection in a client's name may go without an answer before it is tried from another
/// port. Over loopback the answer comes within microseconds, or the SYN went to a socket that the
/// client opened itself from that very port ([`source_port`]), or the application's queue is full.
/// Doubles with each try, as a retransmission would.
const PATIENCE: Duration = Duration::from_millis(250);

/// Connects to the application at `to`, an address of the pod itself. The application sees `client`'s
/// IP address as the source, its port being another ([`source_port`] says why); without a client, or
/// in a namespace that was not prepared for it ([`super::add_client_address_routes`]), the pod's own
/// address.
///
/// `exempt` is called with each socket before anything leaves: there are several if ports are taken.
/// No time limit here: see [`super::within`].
///
/// Cancel-safe: dropping the future closes the socket.
///
/// # Errors
///
/// Whatever `connect()` answers: its kind tells `ConnectionRefused`. `AddrNotAvailable` if no port is
/// left or `to` is not the pod's, `InvalidInput` if `client` is of another family.
pub async fn deliver(
    netns: &Netns,
    to: SocketAddr,
    client: Option<SocketAddr>,
    exempt: impl Fn(BorrowedFd<'_>) -> io::Result<()>,
) -> io::Result<TcpStream> {
    // Held until the answer: from then on the kernel knows the connection by its mark.
    let showing = client.and_then(|_client| netns.clients.begin());
    let client = client.filter(|_client| showing.is_some());
    if client.is_some_and(|client| client.is_ipv4() != to.is_ipv4()) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut patience = PATIENCE;
    let avoid = source_port::avoided(client, to);
    for port in source_port::candidates(avoid, fastrand::u16) {
        let mut from = client.unwrap_or(to);
        from.set_port(port);

        let socket = netns.run(|| relayed_socket(domain(to.ip())))??;
        do_not_pace(&socket)?;
        exempt(socket.as_fd())?;
        if client.is_some() {
            take_foreign_address(&socket, to)?;
        }
        // Many connections may share a port if they differ otherwise, TIME_WAIT does not count.
        socket.set_reuse_address(true)?;
        match socket.bind(&from.into()) {
            // The application listens there.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => continue,
            bound => bound?,
        }

        let connecting = connect(socket, to);
        let connected = if client.is_some() {
            let Ok(connected) = timeout(patience, connecting).await else {
                patience *= 2;
                continue;
            };
            connected
        } else {
            connecting.await
        };
        match connected {
            // Another connection has exactly these addresses and ports.
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
            connected => return connected,
        }
    }
    Err(io::Error::from(io::ErrorKind::AddrNotAvailable))
}

/// Lets `socket` bind to an address that is not this machine's, and leads the replies back to it.
fn take_foreign_address(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    if to.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
    }
    socket.set_mark(DELIVERY_MARK)
}

async fn connect(socket: Socket, to: SocketAddr) -> io::Result<TcpStream> {
    start_connect(&socket, to)?;
    connected(socket).await
}
