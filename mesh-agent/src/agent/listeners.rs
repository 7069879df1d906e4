//! Where others reach the agent: other nodes' agents, Prometheus, the kubelet, and the command line.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use socket2::Socket;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tracing::{error, warn};

use super::views::Views;
use crate::admin::{self, AdminSocket};
use crate::cli::Run;
use crate::node::Worker;
use crate::telemetry::{self, LogLevel, Telemetry};
use crate::tunnel::{ResetKey, Steering};
use crate::workers::Workers;
use crate::{inbound, net};

/// Where tunnels arrive. Of two agents that share the ports the later one gets new lanes and QUIC connections from
/// [`Self::open`] and [`Steering::take_over`] on: before it has certificates it could but refuse them.
#[derive(Debug)]
pub(super) struct Doors {
    /// Of lanes, until they are open: for each worker.
    lanes: Vec<(Socket, oneshot::Sender<std::net::TcpListener>)>,
    /// Chooses between the QUIC socket and those of the agents before and after this one.
    pub(super) steering: Steering,
}

impl Doors {
    /// Takes new lanes, once.
    ///
    /// # Errors
    ///
    /// Of the first that cannot be listened on; the others are.
    pub(super) fn open(&mut self) -> io::Result<()> {
        let opened = self.lanes.drain(..).map(|(socket, open)| {
            // Whose worker is gone needs none.
            open.send(net::listen_on(&socket)?).ok();
            Ok(())
        });
        opened.collect::<Vec<io::Result<()>>>().into_iter().collect()
    }

    /// Lets go of what was never opened.
    pub(super) fn shut(&mut self) {
        self.lanes.clear();
    }
}

/// Prepares to take tunnels: a TCP listener on every worker (the kernel spreads connections over them)
/// and the QUIC endpoint on the first, since one socket must see all packets of a connection.
pub(super) fn serve_tunnels(
    options: &Run,
    workers: &Workers,
    contexts: &[Arc<Worker>],
    dismissed: &watch::Receiver<bool>,
    tunnels: &mut JoinSet<()>,
) -> Result<Doors> {
    let port = options.tunnel_port.get();
    let any = net::any_address();
    let mut lanes = Vec::new();
    for (index, context) in contexts.iter().enumerate() {
        let socket = net::bind_shared(SocketAddr::new(any, port))
            .with_context(|| format!("listen for tunnels on TCP port {port}"))?;
        let (open, opened) = oneshot::channel();
        lanes.push((socket, open));
        let (context, drain) = (Arc::clone(context), dismissed.clone());
        let serving = workers.spawn(index, async move {
            // An agent that ends before it is its turn.
            let Ok(listener) = opened.await else { return };
            let listener = match TcpListener::from_std(listener) {
                Ok(listener) => listener,
                Err(error) => return error!(%error, stage = "tunnel", "lanes are not served"),
            };
            let tunnels = Arc::clone(&context.tunnels);
            let handler = move |request| inbound::serve_request(Arc::clone(&context), request);
            if let Err(error) = tunnels.serve_lanes(listener, drain, handler).await {
                error!(%error, stage = "tunnel", "lanes are not served");
            }
        });
        tunnels.spawn(joined(serving));
    }
    let socket = net::udp_socket(SocketAddr::new(any, port))
        .with_context(|| format!("listen for tunnels on UDP port {port}"))?;
    let steering = Steering::new(&socket).context("share the UDP port with other agents")?;
    let key = reset_key(&options.admin.socket)?;
    let tag = steering.tag();
    let (context, drain) = (Arc::clone(&contexts[0]), dismissed.clone());
    let serving = workers.spawn(0, async move {
        let tunnels = Arc::clone(&context.tunnels);
        let handler = move |request| inbound::serve_request(Arc::clone(&context), request);
        if let Err(error) = tunnels.serve_quic(socket, &key, tag, drain, handler).await {
            error!(%error, stage = "tunnel", "QUIC is not served");
        }
    });
    tunnels.spawn(joined(serving));
    Ok(Doors { lanes, steering })
}

/// The key that the agent before this one had. Without it peers take longer to learn of a restart.
fn reset_key(admin_socket: &Path) -> Result<ResetKey> {
    let path = ResetKey::path(admin_socket);
    ResetKey::open(&path).or_else(|error| {
        warn!(
            %error, path = %path.display(), stage = "tunnel",
            "no lasting key for QUIC resets: after a restart peers' QUIC connections hang until they time out",
        );
        ResetKey::random().context("make a key for QUIC resets")
    })
}

async fn joined(task: tokio::task::JoinHandle<()>) {
    if let Err(error) = task.await
        && error.is_panic()
    {
        error!(%error, stage = "tunnel", "a tunnel listener panicked");
    }
}

/// Serves metrics, probes and the admin socket: in place of the agent before this one, or beside nobody.
pub(super) async fn serve_http(
    options: &Run,
    telemetry: &Telemetry,
    views: &Arc<Views>,
    log: LogLevel,
    control: &mut JoinSet<()>,
) -> Result<()> {
    let listen = async |addr| {
        if options.standby.is_on() {
            return Ok(TcpListener::from_std(net::listen_shared(usable(addr))?)?);
        }
        listen(addr).await
    };
    let metrics = listen(options.metrics_addr).await.context("--metrics-addr")?;
    let probes = listen(options.ready_addr).await.context("--ready-addr")?;
    let socket = AdminSocket::bind(&options.admin.socket).context("--admin-socket")?;
    let telemetry_for_metrics = telemetry.clone();
    control.spawn(async move {
        let exposition = move || telemetry_for_metrics.exposition();
        match telemetry::serve_metrics(metrics, exposition).await {}
    });
    let readiness = Arc::clone(views).readiness();
    control.spawn(async move { match telemetry::serve_probes(probes, readiness).await {} });
    let sources = Arc::clone(views).admin_sources(telemetry.clone(), log);
    control.spawn(async move { match admin::serve(socket, sources).await {} });
    Ok(())
}

/// Whether an agent that waits for its turn could listen where it is told to: what another program has, it would
/// find out when the one before it has gone.
pub(super) fn rehearse(options: &Run) -> Result<()> {
    let Run { tunnel_port, metrics_addr, ready_addr, .. } = options;
    let ports = Port::all(*tunnel_port, *metrics_addr, *ready_addr);
    // Which of an agent's UDP sockets gets a packet is told by their number, and this may be the moment when
    // another agent counts them.
    for port in ports.into_iter().filter(|port| port.transport == Transport::Tcp) {
        port.rehearse().with_context(|| {
            let Port { flag, addr, .. } = port;
            format!("{flag}: listen on {addr}, in place of the agent that runs here")
        })?;
    }
    Ok(())
}

/// A port of the node that an agent has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    /// The flag that says where it is.
    pub(crate) flag: &'static str,
    /// What comes there.
    pub(crate) transport: Transport,
    /// Where it is.
    pub(crate) addr: SocketAddr,
}

/// What comes to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

impl Port {
    /// All that an agent with these flags has.
    pub(crate) fn all(
        tunnel_port: NonZeroU16,
        metrics_addr: SocketAddr,
        ready_addr: SocketAddr,
    ) -> [Self; 4] {
        let tunnels = SocketAddr::new(net::any_address(), tunnel_port.get());
        [
            ("--tunnel-port", Transport::Tcp, tunnels),
            ("--tunnel-port", Transport::Udp, tunnels),
            ("--metrics-addr", Transport::Tcp, usable(metrics_addr)),
            ("--ready-addr", Transport::Tcp, usable(ready_addr)),
        ]
        .map(|(flag, transport, addr)| Self { flag, transport, addr })
    }

    /// Whether an agent would get it now, be it beside one that shares it. Nothing arrives at a TCP socket that does
    /// not listen; but not for a UDP port that an agent has, lest a third one counts this socket as an agent's
    /// ([`Steering`]).
    pub(crate) fn rehearse(&self) -> io::Result<()> {
        match self.transport {
            Transport::Tcp => net::bind_shared(self.addr).map(drop),
            Transport::Udp => net::udp_socket(self.addr).map(drop),
        }
    }
}

pub(super) async fn listen(addr: SocketAddr) -> Result<TcpListener> {
    let addr = usable(addr);
    TcpListener::bind(addr).await.with_context(|| format!("listen on {addr}"))
}

/// `addr`, or its IPv4 counterpart where the node has no IPv6.
pub(super) fn usable(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) if v6.ip() == &Ipv6Addr::UNSPECIFIED && net::any_address().is_ipv4() => {
            SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), v6.port())
        }
        addr => addr,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn rehearsed(flag: &str, transport: Transport, number: u16) -> io::Result<()> {
        let addr = SocketAddr::new(net::any_address(), number);
        let all = Port::all(NonZeroU16::new(number).unwrap(), addr, addr);
        let mut ports = all.iter().filter(|port| port.transport == transport);
        ports.find(|port| port.flag == flag).unwrap().rehearse()
    }

    #[test]
    fn port_that_another_program_has_is_found_and_one_that_an_agent_shares_is_not() {
        let any = SocketAddr::new(net::any_address(), 0);
        let in_use = |tried: io::Result<()>| tried.unwrap_err().kind() == io::ErrorKind::AddrInUse;

        let theirs = UdpSocket::bind(any).unwrap();
        let port = theirs.local_addr().unwrap().port();
        assert!(in_use(rehearsed("--tunnel-port", Transport::Udp, port)));
        let theirs = TcpListener::bind(any).unwrap();
        let port = theirs.local_addr().unwrap().port();
        for flag in ["--tunnel-port", "--metrics-addr", "--ready-addr"] {
            assert!(in_use(rehearsed(flag, Transport::Tcp, port)), "{flag}");
        }

        let shared = net::udp_socket(any).unwrap();
        let port = shared.local_addr().unwrap().port();
        rehearsed("--tunnel-port", Transport::Udp, port).unwrap();
        let shared = net::listen_shared(any).unwrap();
        let port = shared.local_addr().unwrap().port();
        rehearsed("--metrics-addr", Transport::Tcp, port).unwrap();
    }
}
