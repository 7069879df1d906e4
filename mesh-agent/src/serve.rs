//! Accepts connections until told to stop, then lets the accepted ones go on.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::gate::Gate;
use crate::polling;

/// Long enough for a file descriptor to come free, short enough not to show as latency.
const ACCEPT_RETRY: Duration = Duration::from_millis(10);

/// A node has hundreds of listeners, and all of them lack descriptors together.
static TOLD: LazyLock<Gate> = LazyLock::new(Gate::default);

/// Runs `handle` on each connection, in a task of its own on this worker, until `stop` turns true or
/// its sender is gone. Takes then what has already been queued, closes the listener, so that further
/// clients are refused at once, and returns when the last connection has ended.
///
/// Every connection holds one permit of `permits`, which other listeners share. When there are none,
/// the connection accepted last waits for one and nothing further is accepted: the kernel's backlog
/// holds the excess and clients see latency rather than resets. A stop ends that for those who come
/// later: they are refused, while those who were queued go on waiting. A listener that waits for clients holds
/// no permit, or idle pods would use up those of busy ones.
///
/// `until_handed_over` is dropped when the listener is closed and all that it had has been given to `handle`.
///
/// Cancel-safe: dropping the future cuts every connection.
pub async fn serve<H, F>(
    listener: TcpListener,
    permits: Arc<Semaphore>,
    mut stop: watch::Receiver<bool>,
    until_handed_over: impl Send,
    handle: H,
) where
    H: Fn(TcpStream, SocketAddr) -> F + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    let mut waiting = Vec::new();
    loop {
        let accepted = tokio::select! {
            biased; // A stop must win over a client that never stops connecting.
            _ = stop.wait_for(|stop| *stop) => break,
            // Reap, so that finished connections do not pile up.
            Some(ended) = connections.join_next() => {
                report_panic(ended);
                continue;
            }
            accepted = accept(&listener) => accepted,
        };
        let permit = tokio::select! {
            biased;
            permit = permit(&permits) => permit,
            // The listener is closed first: nobody else may queue behind this one.
            _ = stop.wait_for(|stop| *stop) => {
                waiting.push(accepted);
                break;
            }
        };
        spawn(&mut connections, &handle, permit, accepted);
    }
    // Whoever is in the queue has seen its connection succeed: a close would reset it. The queue is
    // no longer than the backlog.
    while let Ok(accepted) = timeout(Duration::ZERO, accept(&listener)).await {
        waiting.push(accepted);
    }
    drop(listener);
    for accepted in waiting {
        let permit = permit(&permits).await;
        spawn(&mut connections, &handle, permit, accepted);
    }
    drop(until_handed_over);
    while let Some(ended) = connections.join_next().await {
        report_panic(ended);
    }
}

fn spawn<H, F>(
    connections: &mut JoinSet<()>,
    handle: &H,
    permit: OwnedSemaphorePermit,
    (stream, from): (TcpStream, SocketAddr),
) where
    H: Fn(TcpStream, SocketAddr) -> F + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    // Not an `async` block: what that captures and then awaits has a place in it twice.
    connections.spawn(handle(stream, from).map(move |()| drop(permit)));
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection's task panicked");
    }
}

async fn permit(permits: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    #[expect(clippy::expect_used, reason = "nothing closes this semaphore")]
    Arc::clone(permits).acquire_owned().await.expect("never closed")
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => {
                polling::worked();
                return accepted;
            }
            // The client went away between SYN and accept (accept(2)): nothing is wrong with us.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            // EMFILE and its kin persist until something closes: spinning would starve that.
            Err(error) => {
                if let Some(unlogged) = TOLD.pass("accept") {
                    warn!(%error, unlogged, stage = "capture", "accept failed");
                }
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn stop_takes_the_queue_refuses_the_next_and_waits_for_the_last() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let mut queued = TcpStream::connect(addr).await.unwrap();
        let (stop, stopped) = watch::channel(true);

        let echo = |mut stream: TcpStream, _from| async move {
            let mut byte = [0];
            stream.read_exact(&mut byte).await.unwrap();
            stream.write_all(&byte).await.unwrap();
        };
        let (done, mut is_done) = oneshot::channel();
        tokio::spawn(async move {
            serve(listener, Arc::new(Semaphore::new(8)), stopped, (), echo).await;
            done.send(()).unwrap();
        });
        while TcpStream::connect(addr).await.is_ok() {
            tokio::task::yield_now().await;
        }

        assert!(is_done.try_recv().is_err(), "the queued connection is still open");
        queued.write_all(b"x").await.unwrap();
        let mut byte = [0];
        queued.read_exact(&mut byte).await.unwrap();
        is_done.await.unwrap();
        drop(stop);
    }

    #[tokio::test]
    async fn connections_beyond_the_limit_wait_for_a_permit() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (_stop, stopped) = watch::channel(false);
        let permits = Arc::new(Semaphore::new(1));
        let hello = |mut stream: TcpStream, _from| async move {
            stream.write_all(b"x").await.unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
        };
        tokio::spawn(serve(listener, permits, stopped, (), hello));

        let mut first = TcpStream::connect(addr).await.unwrap();
        let mut byte = [0];
        first.read_exact(&mut byte).await.unwrap();
        let mut second = TcpStream::connect(addr).await.unwrap();
        let early = timeout(Duration::from_millis(50), second.read_exact(&mut byte)).await;
        assert!(early.is_err(), "served beyond the limit");
        drop(first);
        second.read_exact(&mut byte).await.unwrap();
    }

    #[tokio::test]
    async fn stop_at_the_limit_refuses_the_next_and_serves_the_queue_later() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let permits = Arc::new(Semaphore::new(1));
        let taken = Arc::clone(&permits).acquire_owned().await.unwrap();
        let hello = |mut stream: TcpStream, _from| async move {
            // Whoever tries until it is refused does not stay to read this.
            drop(stream.write_all(b"x").await);
        };
        let serving = tokio::spawn(serve(listener, permits, stopped, (), hello));
        // One that is accepted and waits for a permit, and one behind it.
        let mut queued =
            [TcpStream::connect(addr).await.unwrap(), TcpStream::connect(addr).await.unwrap()];
        tokio::task::yield_now().await;

        stop.send_replace(true);
        let refused = async {
            while TcpStream::connect(addr).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(5), refused).await.expect("clients queue during a drain");
        assert!(!serving.is_finished(), "two connections wait for a permit");
        drop(taken);
        for client in &mut queued {
            let mut byte = [0];
            client.read_exact(&mut byte).await.unwrap();
        }
        timeout(Duration::from_secs(5), serving).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn listener_without_clients_holds_no_permit() {
        let permits = Arc::new(Semaphore::new(1));
        let (_stop, stopped) = watch::channel(false);
        let hello = |mut stream: TcpStream, _from| async move {
            stream.write_all(b"x").await.unwrap();
        };
        let idle = TcpListener::bind("127.0.0.1:0").await.unwrap();
        tokio::spawn(serve(idle, Arc::clone(&permits), stopped.clone(), (), hello));
        tokio::task::yield_now().await;

        let busy = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = busy.local_addr().unwrap();
        tokio::spawn(serve(busy, permits, stopped, (), hello));
        let mut client = TcpStream::connect(addr).await.unwrap();
        let mut byte = [0];
        let served = timeout(Duration::from_secs(5), client.read_exact(&mut byte)).await;
        served.expect("the idle listener keeps the permit").unwrap();
    }
}
