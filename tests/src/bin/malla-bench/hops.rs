//! Two hops of user space between the pods and nothing else: what an ordinary proxy on both nodes costs
//! on this machine, without encryption, identity, balance or telemetry. A yardstick and no lower bound:
//! each hop is one thread that copies with buffers of 64 KiB and sleeps whenever it has nothing to do.
//!
//! Captured as a mesh captures: the first hop listens inside the client's pod, and the last one
//! connects inside the server's.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result};
use harness::Netns;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// What one read takes at most, and so what one write does.
const BUFFER_BYTES: usize = 64 * 1024;

/// One hop. Dropping it cuts what it carries.
#[derive(Debug)]
pub(crate) struct Hop {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Hop {
    /// Listens at `ports` inside `from`, and connects to the same port of `to` from inside `through`.
    ///
    /// # Errors
    ///
    /// Fails when a port is taken.
    pub(crate) fn start(from: &Netns, ports: &[u16], through: &Netns, to: IpAddr) -> Result<Self> {
        let listeners = from.run(|| {
            ports.iter().map(|port| listen(*port).with_context(|| format!("port {port}"))).collect()
        });
        let listeners: Vec<_> = listeners?;
        let (stop, stopped) = oneshot::channel();
        // A thread begins in the namespace of the one that starts it, and stays there.
        let thread = through.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let name = "hop".to_owned();
            let run = move || runtime.block_on(carry(listeners, to, stopped));
            thread::Builder::new().name(name).spawn(run).context("start a thread")
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Hop {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of it has failed the client that it carried.
            thread.join().ok();
        }
    }
}

fn listen(port: u16) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(("::", port))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

async fn carry(listeners: Vec<TcpListener>, to: IpAddr, stopped: oneshot::Receiver<()>) {
    let mut carried = JoinSet::new();
    for listener in listeners {
        carried.spawn(async move {
            let Ok(port) = listener.local_addr().map(|address| address.port()) else { return };
            let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                // A connection that breaks is its client's to report.
                connections.spawn(connection(client, SocketAddr::new(to, port)));
                while connections.try_join_next().is_some() {}
            }
        });
    }
    // Also when the sender is gone.
    stopped.await.ok();
}

async fn connection(mut client: TcpStream, to: SocketAddr) -> io::Result<()> {
    let mut server = TcpStream::connect(to).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    copy_bidirectional_with_sizes(&mut client, &mut server, BUFFER_BYTES, BUFFER_BYTES).await?;
    Ok(())
}
