//! A pod: a network namespace with addresses, in which tests and programs act.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::netns::{Netns, sysctl};
use crate::serve::{Serve, Server};
use crate::topology::{Family, PodSpec};
use crate::wait;

/// No exchange of a test takes longer; what hangs fails.
const IO_LIMIT: Duration = Duration::from_secs(30);
const CONNECT_LIMIT: Duration = Duration::from_secs(15);

/// Numbers the UIDs of this process.
static NEXT_UID: AtomicU32 = AtomicU32::new(1);

/// A pod.
#[derive(Debug)]
pub struct Pod {
    spec: Mutex<PodSpec>,
    name: String,
    namespace: String,
    node: String,
    uid: String,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    netns: Arc<Netns>,
}

/// A program in a pod, killed when dropped.
#[derive(Debug)]
pub struct Process(Child);

impl Pod {
    pub(crate) fn new(spec: PodSpec, v4: Ipv4Addr, v6: Ipv6Addr, netns: Arc<Netns>) -> Self {
        let number = NEXT_UID.fetch_add(1, Ordering::Relaxed);
        Self {
            name: spec.name.clone(),
            namespace: spec.namespace.clone(),
            node: spec.node.clone(),
            uid: format!("{:08x}-0000-4000-8000-{number:012x}", std::process::id()),
            spec: Mutex::new(spec),
            v4,
            v6,
            netns,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The node it runs on.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// `metadata.uid`.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// Who it is to others in the trust domain `cluster.local`.
    pub fn identity(&self) -> String {
        let account = self.spec().service_account;
        format!("spiffe://cluster.local/ns/{}/sa/{account}", self.namespace)
    }

    /// Its IPv4 address.
    pub fn v4_ip(&self) -> Ipv4Addr {
        self.v4
    }

    /// Its IPv6 address.
    pub fn v6_ip(&self) -> Ipv6Addr {
        self.v6
    }

    /// Its address of this family.
    pub fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// Its address of this family with a port.
    pub fn addr(&self, family: Family, port: u16) -> SocketAddr {
        (self.ip(family), port).into()
    }

    /// Its IPv4 address with a port.
    pub fn v4(&self, port: u16) -> SocketAddr {
        self.addr(Family::V4, port)
    }

    /// Its IPv6 address with a port.
    pub fn v6(&self, port: u16) -> SocketAddr {
        self.addr(Family::V6, port)
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// As it is described at the moment.
    pub(crate) fn spec(&self) -> PodSpec {
        self.spec.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps an annotation for the next time its manifest is written.
    pub(crate) fn remember(&self, key: &str, value: &str) {
        let mut spec = self.spec.lock().unwrap_or_else(PoisonError::into_inner);
        *spec = spec.clone().annotation(key, value);
    }

    /// Runs `f` as a program in the pod would run. A socket that it makes stays in the pod.
    ///
    /// # Errors
    ///
    /// Fails if the pod cannot be entered, or with the error of `f`.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.netns.run(f)
    }

    /// Writes a setting of its network namespace, such as `net/ipv4/tcp_tw_reuse`.
    ///
    /// # Errors
    ///
    /// Fails if there is no such setting, or no such value of it.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| sysctl(key, value))
    }

    /// Connects to `to`, like any program. Reads and writes give up after 30 seconds.
    ///
    /// # Errors
    ///
    /// Fails if the connection is refused or does not come about.
    pub fn connect(&self, to: SocketAddr) -> Result<TcpStream> {
        let stream = self.try_connect(to).with_context(|| format!("{} to {to}", self.name))?;
        Ok(stream)
    }

    /// As [`Pod::connect`], with the plain error of `connect()`.
    ///
    /// # Errors
    ///
    /// Fails if the connection is refused or does not come about.
    pub fn try_connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let connected = self.run(|| {
            Ok(TcpStream::connect_timeout(&to, CONNECT_LIMIT).and_then(|stream| {
                stream.set_nodelay(true)?;
                limit_io(&stream)?;
                Ok(stream)
            }))
        });
        connected.unwrap_or_else(|error| Err(io::Error::other(format!("{error:#}"))))
    }

    /// Connects to `to` and expects to be refused: by `connect()`, or by a reset before any byte came.
    /// Returns how long that took.
    ///
    /// # Errors
    ///
    /// Fails if bytes come, if the connection ends cleanly, or if nothing happens.
    pub fn refused(&self, to: SocketAddr) -> Result<Duration> {
        let started = Instant::now();
        let mut stream = match self.try_connect(to) {
            Ok(stream) => stream,
            Err(error) if is_refusal(&error) => return Ok(started.elapsed()),
            Err(error) => return Err(error).with_context(|| format!("{} to {to}", self.name)),
        };
        match stream.read(&mut [0]) {
            Err(error) if is_refusal(&error) => Ok(started.elapsed()),
            Err(error) => Err(error).with_context(|| format!("{} reads from {to}", self.name)),
            Ok(0) => bail!("{} to {to}: ended cleanly instead of being refused", self.name),
            Ok(_) => bail!("{} to {to}: was served instead of being refused", self.name),
        }
    }

    /// Listens at `port` on both families.
    ///
    /// # Errors
    ///
    /// Fails if the port is taken.
    pub fn listen(&self, port: u16) -> Result<TcpListener> {
        self.run(|| {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
            socket.set_only_v6(false)?;
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
            socket.listen(1024)?;
            Ok(socket.into())
        })
        .with_context(|| format!("{} listens at {port}", self.name))
    }

    /// Serves at `port` on both families until the [`Server`] is dropped.
    ///
    /// # Errors
    ///
    /// Fails if the port is taken.
    pub fn serve(&self, port: u16, serve: Serve) -> Result<Server> {
        Server::start(self.listen(port)?, serve)
    }

    /// Starts a program in the pod; its output is kept from the terminal.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be started.
    pub fn spawn(&self, program: impl AsRef<OsStr>, args: &[&str]) -> Result<Process> {
        let mut command = Command::new(program);
        command.args(args);
        self.spawn_command(&mut command)
    }

    /// Starts a prepared command in the pod; its output is kept from the terminal unless it goes
    /// somewhere already.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be started.
    pub fn spawn_command(&self, command: &mut Command) -> Result<Process> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Process(self.netns.spawn(command)?))
    }

    /// Runs a program in the pod to its end.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be started.
    pub fn output(&self, program: impl AsRef<OsStr>, args: &[&str]) -> Result<Output> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.netns.spawn(&mut command)?.wait_with_output().context("wait for a program")
    }

    /// Runs a program in the pod to its end, and returns what it printed.
    ///
    /// # Errors
    ///
    /// Fails, with what it said, unless it succeeds.
    pub fn succeed(&self, program: &str, args: &[&str]) -> Result<String> {
        let output = self.output(program, args)?;
        let (said, printed) =
            (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
        ensure!(output.status.success(), "{program} in {}: {said}{printed}", self.name);
        Ok(printed.into_owned())
    }

    /// Waits until something listens at `port`.
    ///
    /// # Errors
    ///
    /// Fails if nothing does.
    pub fn wait_for_port(&self, port: u16) -> Result<()> {
        // Through loopback, which no agent captures.
        let addr = (Ipv4Addr::LOCALHOST, port).into();
        wait::until(wait::SOON, &format!("{} to listen at {port}", self.name), || {
            let tried = || Ok(TcpStream::connect_timeout(&addr, Duration::from_secs(1))?);
            self.run(tried).is_ok()
        })
    }

    /// Waits until a TCP socket listens at `port`, without connecting to it: some programs serve one
    /// client and end.
    ///
    /// # Errors
    ///
    /// Fails if none does.
    pub fn wait_for_listener(&self, port: u16) -> Result<()> {
        // `sl local_address rem_address st`, in hex; 0A is TCP_LISTEN.
        let listens = |table: &str| {
            table.lines().any(|line| {
                let mut words = line.split_whitespace().skip(1);
                let local = words.next().and_then(|local| local.rsplit(':').next());
                local == Some(&format!("{port:04X}")) && words.nth(1) == Some("0A")
            })
        };
        wait::until(wait::SOON, &format!("{} to listen at {port}", self.name), || {
            let tables = || {
                let [v4, v6] = ["tcp", "tcp6"]
                    .map(|of| fs::read_to_string(format!("/proc/thread-self/net/{of}")));
                Ok(v4? + &v6.unwrap_or_default())
            };
            self.run(tables).is_ok_and(|tables| listens(&tables))
        })
    }
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be waited for.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.0.wait().context("wait for a program")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// What `connect()` and `read()` say when the other side wants nothing.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset)
}

/// Keeps a test that would wait for ever from doing so.
pub(crate) fn limit_io(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_read_timeout(Some(IO_LIMIT))?;
    socket.set_write_timeout(Some(IO_LIMIT))
}
