//! The commands that ask a running agent.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;

use super::output::{Format, Table, Tabular, print, print_data};
use super::{Admin, Ask, AskAgent, Log, Question};
use crate::admin::view::{
    CertificateView, ConnectionView, ServiceView, StatusView, TunnelView, WorkloadView,
};
use crate::admin::{self, ClientError};
use crate::capture::Capture;
use crate::telemetry::chain;

/// Why a question was not answered.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AskError {
    /// The agent did not answer as asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The answer has other keys than this program knows.
    #[error("the agent's answer is not understood: it is of another version than this program")]
    Answer(#[from] serde_json::Error),
    /// The answer could not be printed.
    #[error("print the answer")]
    Print(#[from] io::Error),
}

impl AskError {
    /// Whether there was no agent to ask: exit code 3.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Client(error) if error.is_unreachable())
    }
}

/// Why nothing may be detached.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DetachError {
    /// An agent runs.
    #[error(
        "an agent answers at {path}: nothing is removed while it runs; stop it first, in a cluster by \
         deleting its DaemonSet"
    )]
    Runs {
        /// Its socket.
        path: PathBuf,
    },
    /// An agent runs that this socket is not of.
    #[error(
        "nothing is removed: nobody is at {path}, and an agent tells the programs in {bpffs} that it lives; \
         stop it first, or name its --admin-socket"
    )]
    Beats {
        /// The socket that was asked.
        path: PathBuf,
        /// Where its programs are pinned.
        bpffs: PathBuf,
    },
    /// One may run.
    #[error(
        "nothing is removed: whether an agent runs at {path} cannot be told; run this as root, and with the agent's --admin-socket"
    )]
    Unknown {
        /// Its socket.
        path: PathBuf,
        /// Why.
        source: ClientError,
    },
}

/// What was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered {
    /// All is well.
    Ok,
    /// The agent told of a problem: exit code 1.
    Problem,
}

/// A view that belongs to a namespace, or to several.
trait Scoped {
    fn is_in(&self, namespace: &str) -> bool;
}

impl Scoped for WorkloadView {
    fn is_in(&self, namespace: &str) -> bool {
        self.namespace == namespace
    }
}

impl Scoped for ServiceView {
    fn is_in(&self, namespace: &str) -> bool {
        self.namespace == namespace
    }
}

impl Scoped for ConnectionView {
    fn is_in(&self, namespace: &str) -> bool {
        self.namespace == namespace
    }
}

impl Scoped for CertificateView {
    fn is_in(&self, namespace: &str) -> bool {
        is_identity_in(&self.name, namespace)
    }
}

impl Scoped for TunnelView {
    fn is_in(&self, namespace: &str) -> bool {
        [&self.from, &self.to].into_iter().any(|identity| is_identity_in(identity, namespace))
    }
}

fn is_identity_in(identity: &str, namespace: &str) -> bool {
    identity.split_once("/ns/").is_some_and(|(_, rest)| {
        rest.strip_prefix(namespace).is_some_and(|rest| rest.starts_with('/'))
    })
}

/// Asks the agent and prints what it answers.
///
/// # Errors
///
/// If it does not answer, or refuses.
pub async fn answer(question: &Question, out: &mut dyn Write) -> Result<Answered, AskError> {
    match question {
        Question::Status(ask) => return status(ask, out).await,
        Question::Workloads(ask) => list::<WorkloadView>(ask, "/workloads", out).await?,
        Question::Services(ask) => list::<ServiceView>(ask, "/services", out).await?,
        Question::Certs(ask) => list::<CertificateView>(ask, "/certs", out).await?,
        Question::Connections(ask) => list::<ConnectionView>(ask, "/connections", out).await?,
        Question::Tunnels(ask) => list::<TunnelView>(ask, "/tunnels", out).await?,
        Question::Dump(ask) => {
            print_data(out, ask.output, &read(&ask.admin, "/config_dump").await?)?;
        }
        Question::Log(asked) => log(asked, out).await?,
        Question::Version(ask) => version(ask, out).await?,
    }
    Ok(Answered::Ok)
}

/// Makes sure that `detach` takes nothing from an agent that runs: without its programs that would go on,
/// ready, and carry nothing.
///
/// # Errors
///
/// If an agent answers at `socket`, or it cannot be told whether one is there.
pub async fn must_not_run(socket: &Path) -> Result<(), DetachError> {
    match admin::ask(socket, "/version").await {
        // An agent of another version may refuse the question, but it runs.
        Ok(_) | Err(ClientError::Refused { .. }) => Err(DetachError::Runs { path: socket.into() }),
        Err(error) if error.is_nobody() => Ok(()),
        Err(source) => Err(DetachError::Unknown { path: socket.into(), source }),
    }
}

/// Makes sure of the same where nobody is at `socket`, which may be another one than the agent's: by what a living
/// agent writes under `bpffs`.
///
/// # Errors
///
/// If one does.
pub fn must_not_beat(socket: &Path, bpffs: &Path) -> Result<(), DetachError> {
    // What cannot be read there cannot be removed either, which then says why.
    if Capture::is_beating(bpffs).unwrap_or_default() {
        return Err(DetachError::Beats { path: socket.into(), bpffs: bpffs.into() });
    }
    Ok(())
}

async fn status(ask: &AskAgent, out: &mut dyn Write) -> Result<Answered, AskError> {
    let status: StatusView = serde_json::from_value(read(&ask.admin, "/status").await?)?;
    print(out, ask.output, &status)?;
    let is_well = status.ready && status.problems.is_empty();
    Ok(if is_well { Answered::Ok } else { Answered::Problem })
}

async fn log(log: &Log, out: &mut dyn Write) -> Result<(), AskError> {
    let socket = &log.admin.socket;
    let answer = match &log.level {
        // Checked when it was parsed: it holds nothing that a URI may not.
        Some(level) => admin::ask_to_change(socket, &format!("/log?level={level}")).await?,
        None => admin::ask(socket, "/log").await?,
    };
    match log.output {
        Format::Table => {
            let level = answer.get("level").and_then(Value::as_str).unwrap_or_default();
            writeln!(out, "{level}")?;
        }
        Format::Json | Format::Yaml => print_data(out, log.output, &answer)?,
    }
    Ok(())
}

/// An agent that does not run is no error here, nor is one that does not answer.
async fn version(ask: &AskAgent, out: &mut dyn Write) -> Result<(), AskError> {
    let (agent, problem) = match read(&ask.admin, "/version").await {
        Ok(answer) => match answer.get("version").and_then(Value::as_str) {
            Some(version) => (Some(version.to_owned()), None),
            None => (None, Some("what it says is not understood".to_owned())),
        },
        Err(error) if error.is_nobody() => (None, None),
        // The rest of its text asks whether the agent runs.
        Err(ClientError::Unreachable { source, .. }) => (None, Some(source.to_string())),
        Err(error) => (None, Some(chain(&error))),
    };
    let versions = Versions { program: env!("CARGO_PKG_VERSION").into(), agent, problem };
    Ok(print(out, ask.output, &versions)?)
}

#[derive(Debug, Serialize)]
struct Versions {
    program: String,
    agent: Option<String>,
    /// Why an agent that may run has not told its version.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

impl Tabular for Versions {
    fn table(&self) -> Table {
        let mut table = Table::new(["PROGRAM", "AGENT"]);
        let agent = match (&self.agent, &self.problem) {
            (Some(version), _) => version.clone(),
            (None, Some(why)) => format!("no answer: {why}"),
            (None, None) => "not running".into(),
        };
        table.row([self.program.clone(), agent]);
        table
    }
}

async fn list<V>(ask: &Ask, path: &str, out: &mut dyn Write) -> Result<(), AskError>
where
    V: DeserializeOwned + Scoped,
    Vec<V>: Tabular,
{
    let mut views: Vec<V> = serde_json::from_value(read(&ask.admin, path).await?)?;
    if let Some(namespace) = &ask.namespace {
        views.retain(|view| view.is_in(namespace));
    }
    Ok(print(out, ask.output, &views)?)
}

async fn read(admin: &Admin, path: &str) -> Result<Value, ClientError> {
    admin::ask(&admin.socket, path).await
}
