//! Accepts connections for one of the services until told to stop, then lets requests finish.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::{convert::Infallible, io, pin::pin, sync::Arc, time::Duration};

use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::{Request, StatusCode, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio::{sync::watch, task::JoinSet};

use crate::call::{Call, Reply, error};
use crate::details;
use crate::productpage::Productpage;
use crate::ratings::Ratings;
use crate::reviews::Reviews;

/// Largest request body: a form or a handful of ratings.
pub(crate) const BODY_LIMIT_BYTES: usize = 64 * 1024;
/// Enough for a burst of load; Linux caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 1024;
/// Outlasts the slowest call of these services (10 s), so that no request is cut by a stop.
const GRACE: Duration = Duration::from_secs(12);
/// Long enough for a file descriptor to come free, short enough not to show as latency.
const ACCEPT_RETRY: Duration = Duration::from_millis(10);

/// Which service answers.
#[derive(Debug)]
pub(crate) enum App {
    /// The front.
    Productpage(Productpage),
    /// Facts about the book.
    Details,
    /// Opinions about it.
    Reviews(Reviews),
    /// Stars.
    Ratings(Ratings),
}

impl App {
    async fn answer(&self, call: &Call) -> Reply {
        match self {
            Self::Productpage(service) => service.answer(call).await,
            Self::Details => details::answer(call),
            Self::Reviews(service) => service.answer(call).await,
            Self::Ratings(service) => service.answer(call),
        }
    }
}

/// Listens on `port` of both IP families, or of IPv4 where the kernel has no IPv6.
///
/// # Errors
///
/// Fails when the port is taken.
pub(crate) fn listen(port: u16) -> io::Result<TcpListener> {
    let dual = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::IPV6, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_only_v6(false)?;
        bind(socket, (Ipv6Addr::UNSPECIFIED, port).into())
    };
    let v4 = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        bind(socket, (Ipv4Addr::UNSPECIFIED, port).into())
    };
    let socket = dual().or_else(|error| match error.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => Err(error),
        _ => v4(),
    })?;
    TcpListener::from_std(socket.into())
}

fn bind(socket: Socket, address: SocketAddr) -> io::Result<Socket> {
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Serves `app` until `stop`, then closes idle connections and waits for requests under way.
///
/// Cancel-safe: dropping the future cuts every connection.
pub(crate) async fn serve(listener: TcpListener, app: App, stop: impl Future<Output = ()>) {
    let app = Arc::new(app);
    let (stopping, stopped) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut stop = pin!(stop);
    loop {
        tokio::select! {
            biased; // A stop must win over a client that never stops connecting.
            () = &mut stop => break,
            // Reap, so that finished connections do not pile up.
            Some(_ended) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _peer)) => {
                    connections.spawn(connection(stream, Arc::clone(&app), stopped.clone()));
                }
                // EMFILE and its kin persist until something closes: spinning would starve that.
                Err(_) => sleep(ACCEPT_RETRY).await,
            },
        }
    }
    drop(listener);
    stopping.send_replace(true);
    let all = async { while connections.join_next().await.is_some() {} };
    // What is still open after the grace is cut with the set.
    let _cut = timeout(GRACE, all).await;
}

async fn connection(stream: TcpStream, app: Arc<App>, mut stopped: watch::Receiver<bool>) {
    // Only a hint for latency: a socket that refuses it serves all the same.
    let _slower = stream.set_nodelay(true);
    let service = service_fn(|request| {
        let app = Arc::clone(&app);
        async move { Ok::<_, Infallible>(answer(&app, request).await) }
    });
    let mut serving = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .serve_connection(TokioIo::new(stream), service)
    );
    // How a connection ended is the client's affair; the service goes on.
    tokio::select! {
        _ended = serving.as_mut() => return,
        _ = stopped.wait_for(|stop| *stop) => serving.as_mut().graceful_shutdown(),
    }
    let _ended = serving.await;
}

async fn answer(app: &App, request: Request<Incoming>) -> Reply {
    let (head, body) = request.into_parts();
    match Limited::new(body, BODY_LIMIT_BYTES).collect().await {
        Ok(body) => {
            let call = Call {
                method: head.method,
                path: head.uri.path().to_owned(),
                headers: head.headers,
                body: body.to_bytes(),
            };
            app.answer(&call).await
        }
        Err(_) => error(StatusCode::PAYLOAD_TOO_LARGE, "the request's body is too large"),
    }
}
