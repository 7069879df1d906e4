//! The server in its pod: echoes and swallows. It lives as long as its standard input, so that it
//! never outlives the bench, however that ends.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;

/// Echoes with a blocking thread per connection: the least that an exchange can cost a server.
pub(crate) const ECHO_ONE: u16 = 7001;
/// Echoes all connections from one event loop, which scales where threads would trample.
pub(crate) const ECHO_MANY: u16 = 7002;
/// Swallows; after the client's end of stream it answers how many bytes came.
pub(crate) const SINK: u16 = 7003;
/// The same as [`ECHO_MANY`], for new connections and idle ones, which take turns: [`crate::ports`] says why
/// it is so many.
pub(crate) const NEW: [u16; 6] = [7011, 7012, 7013, 7014, 7015, 7016];

/// All that clients dial.
pub(crate) fn ports() -> Vec<u16> {
    [ECHO_ONE, ECHO_MANY, SINK].into_iter().chain(NEW).collect()
}

/// What the server writes on its standard output once all ports listen.
pub(crate) const READY: &str = "ready";

/// Bytes that one read of the sink may take.
const SINK_READ_BYTES: usize = 256 * 1024;
/// More than the largest burst of new connections here.
const ECHO_BYTES: usize = 4096;

/// Serves until standard input ends.
///
/// # Errors
///
/// Fails when a port is taken.
pub(crate) fn run() -> Result<()> {
    let many = [ECHO_MANY].into_iter().chain(NEW);
    let many: Vec<_> = many.map(listen).collect::<Result<_>>()?;
    many.iter().try_for_each(|listener| listener.set_nonblocking(true))?;
    let one = listen(ECHO_ONE)?;
    let sink = listen(SINK)?;
    spawn("echo-many", move || echo_many(many))?;
    spawn("echo-one", move || each(&one, echo))?;
    spawn("sink", move || each(&sink, swallow))?;

    let mut out = io::stdout();
    writeln!(out, "{READY}")?;
    out.flush()?;
    io::copy(&mut io::stdin(), &mut io::sink()).context("read standard input")?;
    Ok(())
}

fn listen(port: u16) -> Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_no_ipv6| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
        .with_context(|| format!("listen on port {port}"))
}

fn spawn(name: &str, serve: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    // Not joined: the process ends with standard input, whatever connections are open.
    thread::Builder::new().name(name.to_owned()).spawn(serve).map(drop)
}

/// A thread for each connection.
fn each(listener: &TcpListener, handle: fn(TcpStream) -> io::Result<()>) -> io::Result<()> {
    for stream in listener.incoming() {
        let stream = stream?;
        // A connection that breaks is the client's to report.
        spawn("connection", move || handle(stream))?;
    }
    Ok(())
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; ECHO_BYTES];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}

fn swallow(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; SINK_READ_BYTES];
    let mut total = 0_u64;
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.write_all(&total.to_be_bytes()),
            length => total += length as u64,
        }
    }
}

fn echo_many(listeners: Vec<TcpListener>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(accept_all(listeners))
}

async fn accept_all(listeners: Vec<TcpListener>) -> io::Result<()> {
    let mut accepting = JoinSet::new();
    for listener in listeners {
        accepting.spawn(accept(tokio::net::TcpListener::from_std(listener)?));
    }
    // Each accepts until it fails.
    while let Some(ended) = accepting.join_next().await {
        ended??;
    }
    Ok(())
}

async fn accept(listener: tokio::net::TcpListener) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        // Ends with its client; the process does not wait for it.
        tokio::spawn(echo_async(stream));
    }
}

async fn echo_async(mut stream: tokio::net::TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; ECHO_BYTES];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length]).await?,
        }
    }
}
