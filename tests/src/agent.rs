//! The real agent, on one node: started, asked, stopped.

mod answers;

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

pub use self::answers::Cli;
pub(crate) use self::answers::http_get;
use crate::netns::Netns;
use crate::sys;
use crate::topology::Builder;
use crate::wait;

/// Loading the programs takes a second on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// Where an agent finds its things.
#[derive(Debug)]
pub(crate) struct AgentFiles {
    pub(crate) dir: PathBuf,
    pub(crate) manifests: PathBuf,
    pub(crate) ca_dir: PathBuf,
    pub(crate) trust_domain: String,
    pub(crate) cgroup: PathBuf,
}

/// A `mesh-agent run` in a node's network namespace, with a bpf file system of its own.
#[derive(Debug)]
pub struct Agent {
    node: String,
    netns: Arc<Netns>,
    files: AgentFiles,
    flags: Vec<String>,
    /// What starts it: a program and its arguments, or nothing.
    through: Vec<String>,
    child: Option<Child>,
    /// What `/metrics` said last.
    last_metrics: Mutex<String>,
    _bpffs: BpfMount,
}

impl Agent {
    pub(crate) fn start(
        node: &str,
        netns: Arc<Netns>,
        files: AgentFiles,
        builder: &Builder,
    ) -> Result<Self> {
        fs::create_dir_all(&files.dir).context("create the agent's directory")?;
        let bpffs = BpfMount::new(files.dir.join("bpf"))?;
        let mut flags = vec![
            format!("--carrier={}", builder.carrier.as_str()),
            format!("--cert-lifetime-s={}", builder.cert_lifetime.as_secs()),
            "--access-log=json".to_owned(),
            "--log=info,mesh_agent=debug".to_owned(),
        ];
        for flag in &builder.flags {
            replace_flag(&mut flags, flag);
        }
        let mut this = Self {
            node: node.to_owned(),
            netns,
            files,
            flags,
            through: Vec::new(),
            child: None,
            last_metrics: Mutex::default(),
            _bpffs: bpffs,
        };
        this.spawn()?;
        Ok(this)
    }

    /// Starts the agent, which must not run, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// Fails if it does not become ready.
    pub fn restart(&mut self) -> Result<()> {
        self.start_again()?;
        self.wait_until_ready()
    }

    /// Starts the agent, which must not run, and does not wait for it.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be started.
    pub fn start_again(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "the agent of {} runs already", self.node);
        self.spawn()
    }

    /// Starts another one beside the agent that runs, and returns the latter. From now on this value is
    /// about the new one; both write one log.
    ///
    /// # Errors
    ///
    /// Fails if none runs, or the new one cannot be started.
    pub fn start_beside(&mut self) -> Result<Predecessor> {
        let old = Predecessor(self.child.take().context("the agent does not run")?);
        self.spawn()?;
        Ok(old)
    }

    /// From the next start on, the agent has this flag, given as one argument: `--carrier=quic`. It
    /// replaces one of the same name.
    pub fn set_flag(&mut self, flag: &str) {
        replace_flag(&mut self.flags, flag);
    }

    /// From the next start on, this program starts the agent, and becomes it: `unshare --time`.
    pub fn start_through(&mut self, program: &[&str]) {
        self.through = program.iter().map(|word| (*word).to_owned()).collect();
    }

    /// The process id; 0 while it does not run.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Its name is its node's.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Ends it with SIGKILL: no drain, no clean-up.
    ///
    /// # Errors
    ///
    /// Fails if it does not run.
    pub fn kill(&mut self) -> Result<()> {
        let mut child = self.child.take().context("the agent does not run")?;
        child.kill().context("kill the agent")?;
        child.wait().context("wait for the agent")?;
        Ok(())
    }

    /// Sends SIGTERM: it drains, and ends within `--drain-s`.
    ///
    /// # Errors
    ///
    /// Fails if it does not run.
    pub fn terminate(&mut self) -> Result<()> {
        self.signal(libc::SIGTERM)
    }

    /// Sends any signal, and after SIGSTOP returns when nothing of it runs any more: the kernel stops a
    /// process when one of its threads gets round to the signal, and until then the others go on.
    ///
    /// # Errors
    ///
    /// Fails if it does not run, or does not stop.
    pub fn signal(&mut self, signal: i32) -> Result<()> {
        let child = self.child.as_ref().context("the agent does not run")?;
        sys::kill(child.id(), signal).context("signal the agent")?;
        if signal == libc::SIGSTOP {
            let pid = child.id();
            wait::until(wait::SOON, "the agent to stop", || has_stopped(pid).unwrap_or(false))?;
        }
        Ok(())
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    ///
    /// Fails if that takes longer than `limit`.
    pub fn wait_until_gone(&mut self, limit: Duration) -> Result<ExitStatus> {
        let child = self.child.as_mut().context("the agent does not run")?;
        let status =
            wait::until_some(limit, "the agent to end", || child.try_wait().ok().flatten())?;
        self.child = None;
        Ok(status)
    }

    /// What `--bpffs` means.
    pub fn bpffs(&self) -> PathBuf {
        self.files.dir.join("bpf/malla")
    }

    /// What `--ca-dir` means.
    pub fn ca_dir(&self) -> &Path {
        &self.files.ca_dir
    }

    /// What `--admin-socket` means.
    pub fn admin_socket(&self) -> PathBuf {
        let given = self.flags.iter().find_map(|flag| flag.strip_prefix("--admin-socket="));
        given.map_or_else(|| self.files.dir.join("admin.sock"), PathBuf::from)
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    ///
    /// Fails with the end of its log if it ends, or does not become ready.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let mut ended = None;
        let waited = wait::until(READY_LIMIT, "the agent to be ready", || {
            ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            ended.is_some() || self.is_ready()
        });
        if let Some(status) = ended {
            self.child = None;
            bail!("the agent of node {} ended: {status}\n{}", self.node, self.log_tail());
        }
        waited.with_context(|| format!("node {}:\n{}", self.node, self.log_tail()))
    }

    fn spawn(&mut self) -> Result<()> {
        let binary = binary()?;
        let mut command = match self.through.split_first() {
            None => Command::new(binary),
            Some((program, args)) => {
                let mut command = Command::new(program);
                command.args(args).arg(binary);
                command
            }
        };
        command.arg("run").args(["--node", &self.node]);
        command.arg("--manifests").arg(&self.files.manifests);
        command.arg("--ca-dir").arg(&self.files.ca_dir);
        command.arg("--trust-domain").arg(&self.files.trust_domain);
        command.arg("--cgroup").arg(&self.files.cgroup);
        command.arg("--bpffs").arg(self.bpffs());
        command.arg("--admin-socket").arg(self.admin_socket());
        let flags = self.flags.iter().filter(|flag| !flag.starts_with("--admin-socket="));
        command.args(flags).stdin(Stdio::null());
        command.stdout(append(&self.files.dir.join("access.log"))?);
        command.stderr(append(&self.files.dir.join("agent.log"))?);
        // Ctrl-C on the terminal is for the program that uses this harness: it ends agents itself.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        self.child = Some(self.netns.spawn(&mut command)?);
        Ok(())
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill().ok();
        }
        // Captured by a test runner, shown when the test failed.
        if thread::panicking() {
            #[expect(clippy::print_stderr, reason = "a test runner's output")]
            {
                eprintln!("--- the agent of node {} logged:\n{}", self.node, self.log_tail());
            }
        }
    }
}

/// An agent beside which another one was started. Killed when dropped.
#[derive(Debug)]
pub struct Predecessor(Child);

impl Predecessor {
    /// Sends SIGTERM.
    ///
    /// # Errors
    ///
    /// Fails if it does not run.
    pub fn terminate(&self) -> Result<()> {
        sys::kill(self.0.id(), libc::SIGTERM).context("signal the agent")
    }

    /// Whether it has not ended.
    ///
    /// # Errors
    ///
    /// Fails if the system does not say.
    pub fn runs(&mut self) -> Result<bool> {
        Ok(self.0.try_wait().context("look at the agent")?.is_none())
    }
}

impl Drop for Predecessor {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A bpf file system of its own, so that agents of several tests never meet.
#[derive(Debug)]
struct BpfMount(PathBuf);

impl BpfMount {
    fn new(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path).context("create the bpf mount point")?;
        sys::mount_bpffs(&path).with_context(|| format!("mount bpffs on {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for BpfMount {
    fn drop(&mut self) {
        sys::unmount(&self.0).ok();
    }
}

/// Whether every thread of the process is stopped (proc_pid_stat(5): the state follows the name, which
/// may hold anything but ends with the last parenthesis).
pub(crate) fn has_stopped(pid: u32) -> std::io::Result<bool> {
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = fs::read_to_string(thread?.path().join("stat"))?;
        if !stat.rsplit_once(") ").is_some_and(|(_name, rest)| rest.starts_with('T')) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The agent's program: `$MALLA_AGENT`, or what lies beside this one.
///
/// # Errors
///
/// Fails if it was not built.
pub(crate) fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("MALLA_AGENT") {
        return Ok(path.into());
    }
    let this = std::env::current_exe().context("find this program")?;
    // Tests lie in target/debug/deps, programs in target/debug.
    let mut beside = this.ancestors().skip(1).take(2).map(|dir| dir.join("mesh-agent"));
    beside.find(|path| path.is_file()).context("mesh-agent is not built: run `cargo xtask build`")
}

fn append(path: &Path) -> Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.with_context(|| format!("open {}", path.display()))
}

/// The last one of a name counts: the command line refuses two.
fn replace_flag(flags: &mut Vec<String>, flag: &str) {
    let name = |flag: &str| flag.split('=').next().map(str::to_owned);
    flags.retain(|known| name(known) != name(flag));
    flags.push(flag.to_owned());
}
