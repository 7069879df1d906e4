//! `mesh-agent ca run` on this machine, with the rights that the deployment gives it.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};

use super::{Deployment, User};
use crate::agent::{binary, http_get};
use crate::metrics::Metrics;
use crate::{sys, wait};

/// A signer. Killed when dropped.
#[derive(Debug)]
pub struct SignerProcess {
    name: String,
    child: Child,
    metrics: SocketAddr,
    log: PathBuf,
    _user: User,
}

impl SignerProcess {
    /// Starts one that is called `name`, for a deployment that was applied.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be started.
    pub fn start(deployment: &Deployment, name: &str, signer: &str, spread_s: u64) -> Result<Self> {
        let system = deployment.system();
        let user = system.user(name, &system.token("malla-ca", None)?)?;
        let (metrics, ready) = (free_address()?, free_address()?);
        let file = format!("malla-{}-{}-{name}.log", std::process::id(), system.name());
        let log = env::temp_dir().join(file);
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(binary()?).args(["ca", "run"]);
        command.args(["--namespace", system.name(), "--name", name, "--signer", signer]);
        command.arg("--kubeconfig").arg(user.kubeconfig());
        command.args(["--bundle-spread-s", &spread_s.to_string()]);
        command.args(["--metrics-addr", &metrics.to_string()]);
        command.args(["--ready-addr", &ready.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(&log).context("create a log")?);
        sys::unblock_interrupts(&mut command);
        let child = command.spawn().context("start a signer")?;
        Ok(Self { name: name.to_owned(), child, metrics, log, _user: user })
    }

    /// Whether it is the one that answers.
    pub fn leads(&self) -> bool {
        self.metrics().is_ok_and(|metrics| metrics.sum("mesh_ca_leads", &[]) > 0.0)
    }

    /// What it counts.
    ///
    /// # Errors
    ///
    /// Fails if it does not answer.
    pub fn metrics(&self) -> Result<Metrics> {
        let stream = TcpStream::connect(self.metrics).context("connect to a signer")?;
        Ok(Metrics::parse(&http_get(stream, "/metrics")?.1))
    }

    /// Waits until it is the one that answers.
    ///
    /// # Errors
    ///
    /// Fails, with its log, if it does not become so.
    pub fn wait_until_it_leads(&self, limit: Duration) -> Result<()> {
        let what = format!("{} to lead", self.name);
        wait::until(limit, &what, || self.leads()).with_context(|| self.log())
    }

    /// What it has written.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks it to end, and waits until it has.
    ///
    /// # Errors
    ///
    /// Fails if it does not end well.
    pub fn terminate(&mut self) -> Result<()> {
        sys::kill(self.child.id(), libc::SIGTERM)?;
        let status = self.child.wait().context("wait for a signer")?;
        ensure!(status.success(), "{status}\n{}", self.log());
        Ok(())
    }

    /// Ends it without a word.
    ///
    /// # Errors
    ///
    /// Fails if it has ended.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("kill a signer")?;
        self.child.wait().context("wait for a signer").map(drop)
    }
}

impl Drop for SignerProcess {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        // Captured by a test runner, shown when the test failed.
        if std::thread::panicking() {
            #[expect(clippy::print_stderr, reason = "a test runner's output")]
            {
                eprintln!("--- signer {} logged:\n{}", self.name, self.log());
            }
        }
        fs::remove_file(&self.log).ok();
    }
}

/// One that nobody has: the kernel gives the same one to nobody else for a while.
fn free_address() -> Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr().context("no address")
}
