//! The process that keeps a cluster: it starts everything, says when it is ready, and stays.
//!
//! Whatever it started dies with it, however it dies: the kernel sends SIGKILL (`setpriv
//! --pdeathsig`), and a node's first process takes the whole node along. So there is nothing to be
//! asked to stop, and a cluster is ended by killing this process and removing what has a name.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{Read as _, Write as _, stdin};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde_json::json;

use crate::cluster::certificates::Pki;
use crate::cluster::outage::{API_SERVER, Outage};
use crate::cluster::state::Cluster;
use crate::cluster::tools::KUBERNETES;
use crate::cluster::{READY, control, net, node};
use crate::process::answer;
use crate::{image, say, this};

/// For each step of the start, on a machine that is busy with other things.
const LIMIT: Duration = Duration::from_secs(120);

const PAUSE: Duration = Duration::from_millis(50);

/// How long the API server may take to end when it is asked to.
const GRACE: Duration = Duration::from_secs(3);

/// The end of a program's log that is worth showing.
const TAIL: usize = 25;

#[derive(Debug, Args)]
pub(crate) struct Keep {
    #[arg(long)]
    nodes: usize,

    /// Whose cluster it is. Without it `down`, `status` and `load` do not take it for theirs.
    #[arg(long)]
    checkout: Option<PathBuf>,

    /// Which of the checkout's it is.
    #[arg(long)]
    which: Option<String>,

    /// End when standard input does, and so with whoever holds its other end.
    #[arg(long)]
    bound: bool,
}

impl Keep {
    /// Keeps a cluster until it is killed or, if it is bound, until the end of standard input.
    ///
    /// # Errors
    ///
    /// Fails if the cluster does not become ready, or something of it is left at the end.
    pub(crate) fn run(&self) -> Result<()> {
        let ended = Arc::new(AtomicBool::new(false));
        if self.bound {
            let ended = Arc::clone(&ended);
            thread::spawn(move || {
                // Nothing is ever written there: only its end is waited for.
                drop(stdin().read_to_end(&mut Vec::new()));
                ended.store(true, Ordering::Release);
            });
        }
        let cluster = Cluster::begin(self.nodes, self.checkout.clone(), self.which.clone())?;
        let mut running = Running { cluster: cluster.clone(), processes: Vec::new(), ended };
        let kept = running.start().and_then(|pki| {
            say(READY);
            running.stay(&pki)
        });
        running.end();
        let removed = cluster.remove_own();
        kept.and(removed)
    }
}

/// A process of the cluster.
struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

struct Running {
    cluster: Cluster,
    processes: Vec<Process>,
    /// Whether whoever wanted this cluster is gone.
    ended: Arc<AtomicBool>,
}

impl Running {
    fn start(&mut self) -> Result<Pki> {
        let cluster = self.cluster.clone();
        net::build(&cluster)?;
        let pki = Pki::create(&cluster)?;
        self.spawn("etcd", net::CONTROL_NETNS, control::etcd(&cluster)?, Stdio::null())?;
        self.api_server(&pki)?;
        self.forward(&pki)?;
        // A node takes its images in while the API server starts.
        let mut nodes = Vec::new();
        for number in 1..=cluster.nodes {
            let name = format!("node-{number}");
            let node = node::prepare(&cluster, &pki, number)?;
            nodes.push(self.spawn(&name, &name, node, Stdio::piped())?.context("no stdin")?);
        }
        self.until("the API server", |this| {
            Ok(this.kubectl(&["get", "--raw", "/readyz"]).output()?.status.success())
        })?;
        for name in ["kube-controller-manager", "kube-scheduler"] {
            let config = cluster.dir.join(format!("{name}.conf"));
            pki.kubeconfig(&config, name, "https://127.0.0.1:6443")?;
        }
        let manager = control::controller_manager(&cluster, &pki)?;
        self.spawn("kube-controller-manager", net::CONTROL_NETNS, manager, Stdio::null())?;
        let scheduler = control::scheduler(&cluster)?;
        self.spawn("kube-scheduler", net::CONTROL_NETNS, scheduler, Stdio::null())?;
        for node in &mut nodes {
            writeln!(node).context("tell a node to start its kubelet")?;
        }
        say("cluster: the API server is ready, the nodes are starting");
        self.name_server()?;
        self.until("all nodes to be ready", |this| {
            let path = r#"jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}"#;
            let output = this.kubectl(&["get", "nodes", "-o", path]).output()?;
            let ready = String::from_utf8_lossy(&output.stdout);
            Ok(ready.split(' ').filter(|status| *status == "True").count() == this.cluster.nodes)
        })?;
        self.pod_networks()?;
        self.ask()?;
        Ok(pki)
    }

    fn api_server(&mut self, pki: &Pki) -> Result<()> {
        let command = control::api_server(&self.cluster, pki)?;
        self.spawn(API_SERVER, net::CONTROL_NETNS, command, Stdio::null()).map(drop)
    }

    /// Takes the API server away, or brings it back, if that is asked for. It is asked to end and, as
    /// it waits for watches, soon killed: a kubelet does the same to a static pod's.
    fn heed(&mut self, outage: &mut Outage, pki: &Pki) -> Result<()> {
        let mut processes = self.processes.iter_mut();
        let runs = processes.find(|process| process.name == API_SERVER);
        match (outage.is_wanted(), runs) {
            (true, Some(process)) => match outage.since() {
                None => {
                    outage.begin();
                    answer("kill", &["-TERM", &process.child.id().to_string()]);
                }
                Some(since) if since.elapsed() > GRACE => {
                    process.child.kill().context("kill the API server")?;
                }
                Some(_) => {}
            },
            (true, None) => outage.now()?,
            (false, None) if outage.is_now() => {
                outage.end()?;
                self.api_server(pki)?;
            }
            (false, _) => {}
        }
        Ok(())
    }

    /// Has each Node say which addresses its pods have, as the controller that gives them out does.
    fn pod_networks(&self) -> Result<()> {
        for number in 1..=self.cluster.nodes {
            let cidrs = [net::pods(number), net::pods_6(number)];
            let spec = json!({"spec": {"podCIDR": &cidrs[0], "podCIDRs": &cidrs}}).to_string();
            let name = format!("node-{number}");
            let output = self.kubectl(&["patch", "node", &name, "--patch", &spec]).output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "tell {name} its pods' addresses: {}", said.trim());
        }
        Ok(())
    }

    /// Applies what makes the name server.
    fn name_server(&self) -> Result<()> {
        let manifest = include_str!("coredns.yaml")
            .replace("DNS_SERVICE", &net::DNS_SERVICE.to_string())
            .replace("COREDNS_IMAGE", &image::COREDNS.name()?);
        let mut apply = self.kubectl(&["apply", "--filename", "-"]);
        apply.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut apply = apply.spawn().context("start kubectl")?;
        let mut input = apply.stdin.take().context("no stdin")?;
        input.write_all(manifest.as_bytes()).context("write to kubectl")?;
        drop(input);
        let output = apply.wait_with_output().context("wait for kubectl")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "apply the name server: {}", said.trim());
        Ok(())
    }

    /// Asks the name server, through its Service and from a node, until it answers.
    fn ask(&mut self) -> Result<()> {
        let xtask = this()?;
        let server = format!("{}:53", net::DNS_SERVICE);
        for number in 1..=self.cluster.nodes {
            let netns = self.cluster.netns(&format!("node-{number}"));
            let mut command = net::enter(&netns);
            command.arg(&xtask).args(["cluster", "ask", &server]);
            command.args(["kubernetes.default.svc.cluster.local", &LIMIT.as_secs().to_string()]);
            command.stdout(Stdio::piped());
            let mut asking = command.spawn().context("start nsenter")?;
            let answered = self.until("the name server to answer", |_| {
                Ok(asking.try_wait().context("wait for xtask")?.is_some_and(|end| end.success()))
            });
            drop(asking.kill());
            asking.wait().context("wait for xtask")?;
            answered?;
        }
        Ok(())
    }

    /// Carries the API server's port to the machine's loopback.
    fn forward(&mut self, pki: &Pki) -> Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen")?;
        let port = listener.local_addr().context("listen")?.port();
        let server = format!("https://127.0.0.1:{port}");
        pki.kubeconfig(&self.cluster.kubeconfig(), "admin", &server)?;
        let mut command = Command::new(this()?);
        command.args(["cluster", "forward", "127.0.0.1:6443"]);
        let listener = Stdio::from(std::os::fd::OwnedFd::from(listener));
        self.spawn("forward", net::CONTROL_NETNS, command, listener).map(drop)
    }

    /// Starts `command` in one of the cluster's namespaces, to die with this process. From the main
    /// thread only: the end of the thread that starts it counts, prctl(2).
    fn spawn(
        &mut self,
        name: &str,
        netns: &str,
        command: Command,
        input: Stdio,
    ) -> Result<Option<ChildStdin>> {
        let log = self.cluster.dir.join(format!("{name}.log"));
        // Of a process that is started again, both lives.
        let output = File::options().create(true).append(true).open(&log);
        let output = output.with_context(|| format!("create {}", log.display()))?;
        let errors = output.try_clone().context("duplicate a descriptor")?;
        let mut wrapped = Command::new("setpriv");
        wrapped.args(["--pdeathsig", "KILL", "--", "nsenter"]);
        wrapped.arg(format!("--net={}", self.cluster.netns(netns).display())).arg("--");
        wrapped.arg(command.get_program()).args(command.get_args());
        // All of them are written in Go, and collect what a day of use would leave: a few minutes leave less than
        // the collecting costs.
        wrapped.env("GOGC", "400");
        for (key, value) in command.get_envs() {
            if let Some(value) = value {
                wrapped.env(key, value);
            }
        }
        let mut child = wrapped
            .stdin(input)
            .stdout(output)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        let input = child.stdin.take();
        self.processes.push(Process { name: name.to_owned(), child, log });
        Ok(input)
    }

    fn kubectl(&self, args: &[&str]) -> Command {
        kubectl(&self.cluster, args)
    }

    /// Asks until `holds` says yes.
    fn until(
        &mut self,
        what: &str,
        mut holds: impl FnMut(&mut Self) -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while !holds(self)? {
            self.look()?;
            if Instant::now() > deadline {
                let logs = self.processes.iter().map(|process| tail(&process.log));
                let logs: Vec<String> = logs.collect();
                bail!("waited {} s for {what}\n{}", LIMIT.as_secs(), logs.concat());
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Fails if the cluster is not wanted any more, or a process of it has ended.
    fn look(&mut self) -> Result<()> {
        ensure!(!self.ended.load(Ordering::Acquire), "nobody waits for the cluster any more");
        for process in &mut self.processes {
            if let Some(status) = process.child.try_wait().context("wait for a process")? {
                bail!("{} ended: {status}\n{}", process.name, tail(&process.log));
            }
        }
        Ok(())
    }

    /// Stays until this process is killed or not wanted any more. What ends meanwhile is only told
    /// in the log: whoever breaks a cluster on purpose wants to see what the rest does.
    fn stay(&mut self, pki: &Pki) -> Result<()> {
        let mut outage = Outage::of(&self.cluster);
        let mut log = File::create(self.cluster.dir.join("keep.log")).context("create the log")?;
        while !self.ended.load(Ordering::Acquire) {
            let mut ended = Vec::new();
            for (at, process) in self.processes.iter_mut().enumerate() {
                if let Some(status) = process.child.try_wait().context("wait for a process")? {
                    writeln!(log, "{} ended: {status}", process.name).context("write the log")?;
                    ended.push(at);
                }
            }
            for at in ended.into_iter().rev() {
                self.processes.remove(at);
            }
            self.heed(&mut outage, pki)?;
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn end(&mut self) {
        for process in &mut self.processes {
            // It may be gone already, and that is what is wanted.
            drop(process.child.kill());
            drop(process.child.wait());
        }
    }
}

/// `kubectl` for the administrator, with nothing kept in anybody's home.
pub(crate) fn kubectl(cluster: &Cluster, args: &[&str]) -> Command {
    let program = KUBERNETES.program("kubectl").unwrap_or_else(|_| "kubectl".into());
    let mut command = Command::new(program);
    command.arg("--kubeconfig").arg(cluster.kubeconfig());
    command.arg("--cache-dir").arg(cluster.dir.join("kubectl")).args(args);
    command
}

/// The last lines of a log, indented.
fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut last = VecDeque::with_capacity(TAIL);
    for line in text.lines() {
        if last.len() == TAIL {
            last.pop_front();
        }
        last.push_back(format!("    {line}\n"));
    }
    format!("  {}:\n{}", log.display(), last.into_iter().collect::<String>())
}
