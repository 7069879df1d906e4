//! Servers that tests run in pods.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result};
use socket2::SockRef;

use crate::pod::limit_io;
use crate::traffic::{Pattern, exchange_patterns, linger_zero, send_pattern};

type Handler = dyn Fn(TcpStream) -> Result<()> + Send + Sync;

/// What a server does with a connection.
#[derive(Clone)]
pub enum Serve {
    /// Sends back what comes, and closes when the client does.
    Echo,
    /// Speaks first, then echoes.
    Greet(&'static str),
    /// Answers the client's end of sending with the number of bytes that came, as text.
    Count,
    /// Sends this many bytes of [`Pattern`] and expects as many, both at once.
    Exchange(u64),
    /// Sends this many bytes of [`Pattern`], then closes.
    Source(u64),
    /// Reads this many bytes, then resets the connection.
    ResetAfter(u64),
    /// Whatever the test says.
    Custom(Arc<Handler>),
}

impl Serve {
    /// Whatever `handler` does.
    pub fn custom(handler: impl Fn(TcpStream) -> Result<()> + Send + Sync + 'static) -> Self {
        Self::Custom(Arc::new(handler))
    }
}

impl fmt::Debug for Serve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Echo => "Echo",
            Self::Greet(_) => "Greet",
            Self::Count => "Count",
            Self::Exchange(_) => "Exchange",
            Self::Source(_) => "Source",
            Self::ResetAfter(_) => "ResetAfter",
            Self::Custom(_) => "Custom",
        })
    }
}

/// A server in a pod; stops accepting when dropped.
#[derive(Debug)]
pub struct Server {
    listener: Arc<TcpListener>,
    seen: Arc<Mutex<Seen>>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Seen {
    clients: Vec<SocketAddr>,
    locals: Vec<SocketAddr>,
    outcomes: Vec<Result<(), String>>,
}

impl Server {
    pub(crate) fn start(listener: TcpListener, serve: Serve) -> Result<Self> {
        let listener = Arc::new(listener);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let accepting = thread::Builder::new()
            .name("server".into())
            .spawn({
                let (listener, seen) = (Arc::clone(&listener), Arc::clone(&seen));
                move || accept(&listener, &seen, &serve)
            })
            .context("start a server's thread")?;
        Ok(Self { listener, seen, accepting: Some(accepting) })
    }

    /// Who connected, as `getpeername()` tells the server, canonical, in order.
    pub fn clients(&self) -> Vec<SocketAddr> {
        self.lock().clients.clone()
    }

    /// Where clients connected to, as `getsockname()` tells the server, canonical, in order.
    pub fn locals(&self) -> Vec<SocketAddr> {
        self.lock().locals.clone()
    }

    /// How connections ended that have ended, in that order.
    pub fn outcomes(&self) -> Vec<Result<(), String>> {
        self.lock().outcomes.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // On Linux this wakes whoever waits in accept(2), with EINVAL.
        SockRef::from(&*self.listener).shutdown(Shutdown::Both).ok();
        if let Some(accepting) = self.accepting.take() {
            accepting.join().ok();
        }
    }
}

fn accept(listener: &TcpListener, seen: &Arc<Mutex<Seen>>, serve: &Serve) {
    while let Ok((stream, client)) = listener.accept() {
        {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.clients.push(canonical(client));
            seen.locals.extend(stream.local_addr().map(canonical));
        }
        let (serve, seen) = (serve.clone(), Arc::clone(seen));
        // Ends with its connection, which a client or IO_LIMIT ends.
        thread::spawn(move || {
            let done = handle(stream, &serve).map_err(|error| format!("{error:#}"));
            seen.lock().unwrap_or_else(PoisonError::into_inner).outcomes.push(done);
        });
    }
}

fn handle(mut stream: TcpStream, serve: &Serve) -> Result<()> {
    stream.set_nodelay(true)?;
    limit_io(&stream)?;
    match serve {
        Serve::Echo => echo(&mut stream),
        Serve::Greet(greeting) => {
            stream.write_all(greeting.as_bytes()).context("greet")?;
            echo(&mut stream)
        }
        Serve::Count => {
            let count = io::copy(&mut stream, &mut io::sink()).context("count")?;
            stream.write_all(count.to_string().as_bytes()).context("tell the count")
        }
        Serve::Exchange(bytes) => {
            exchange_patterns(&stream, *bytes, Pattern::SERVER, Pattern::CLIENT)
        }
        Serve::Source(bytes) => send_pattern(&mut stream, *bytes, Pattern::SERVER),
        Serve::ResetAfter(bytes) => {
            io::copy(&mut (&mut stream).take(*bytes), &mut io::sink()).context("read")?;
            linger_zero(&stream)
        }
        Serve::Custom(handler) => handler(stream),
    }
}

fn echo(stream: &mut TcpStream) -> Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut buffer).context("echo: read")? {
            0 => return Ok(()),
            n => stream.write_all(&buffer[..n]).context("echo: write")?,
        }
    }
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
