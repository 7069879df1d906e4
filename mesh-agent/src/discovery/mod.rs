//! Discovery: what there is in the mesh, from ordinary Kubernetes objects.
//!
//! ```text
//! *.yaml ──► manifest ──► Objects ──► translate ──► Snapshot ──► watch channel
//!  file       parse        typed       pure          immutable    every reader
//! ```
//!
//! | file | what it does |
//! |---|---|
//! | [`manifest`] | YAML or JSON text into typed objects; the errors name document, line and field |
//! | [`kube`] | the parts of those objects that are read |
//! | [`objects`] | the set of objects that a snapshot is made from |
//! | [`enrol`] | who takes part, and how: the `malla.dev/…` annotations |
//! | [`translate`] | objects into a snapshot, and what is wrong with them |
//! | `directory` | a directory of manifests, file by file, and the snapshot that follows from it |
//! | [`mod@file`] | such a directory, followed |
//! | [`client`] | how the Kubernetes API is reached |
//! | [`cluster`] | that API, followed |
//!
//! # Guarantees
//!
//! - A state that is wrong never becomes a snapshot: a file that does not parse leaves its last good
//!   objects in force, a value of `malla.dev/…` that is not understood counts as the narrowest one.
//! - Nothing is wrong in silence: each problem names the object, the field and what to do.
//! - [`translate`] reads no clock, file or socket, and does not care in which order objects came: any
//!   source may feed it.

pub mod client;
pub mod cluster;
mod directory;
pub mod enrol;
pub mod file;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
pub mod kube;
pub mod manifest;
mod networks;
pub mod objects;
pub mod owner;
mod pods;
mod policies;
mod services;
pub mod translate;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use mesh_core::snapshot::{Snapshot, WorkloadUid};
use mesh_core::spiffe::SpiffeId;
use tokio::sync::oneshot;
use tracing::info;

pub use directory::network_policies;

/// Logs that there is another snapshot.
fn tell_of(snapshot: &Snapshot) {
    info!(
        generation = snapshot.generation,
        workloads = snapshot.workloads().count(),
        services = snapshot.services().count(),
        nodes = snapshot.nodes().count(),
        "new snapshot"
    );
}

/// What carries connections says what it needs to know, or still uses: a source that reads the pods of
/// other nodes only then is told by this.
#[derive(Debug)]
pub enum Demand {
    /// Whether something of the mesh is at this address, and what.
    Know {
        /// Which.
        ip: IpAddr,
        /// As whom a pod there has called, if one has.
        caller: Option<SpiffeId>,
        /// Told, when as much as can be known is, from which generation of snapshots on.
        done: oneshot::Sender<u64>,
    },
    /// Connections to or from these pods of other nodes, or to whoever is at these addresses, began since
    /// this was last said.
    Used {
        /// By UID, of those that this agent has carried to or from.
        pods: Vec<WorkloadUid>,
        /// What the kernel has left alone.
        addresses: Vec<IpAddr>,
    },
    /// A pod of this node has these addresses. They count until the source tells some.
    Seen {
        /// Which.
        uid: String,
        /// Those in its namespace.
        ips: Vec<IpAddr>,
    },
}

/// What became of a pod of this node that takes part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Its traffic is carried.
    Enrolled,
    /// It could not be enrolled, for this reason, and is tried again.
    Failing(String),
}

/// What became of the pods of this node that take part.
pub type Outcomes = BTreeMap<WorkloadUid, Outcome>;

/// Problems that are told of one object: an object with more has one mistake many times, or is to fill the memory
/// of every agent.
const MOST_OF_ONE: usize = 16;
/// Problems that are told in all.
const MOST_PROBLEMS: usize = 1000;

/// Something in a manifest that does not mean what its author wanted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where it was read: file and document. Empty if the source has no files.
    pub at: String,
    /// `Pod default/web`; empty if the text did not get as far as being an object.
    pub object: String,
    /// The path of the field, as `kubectl explain` writes it.
    pub field: String,
    /// What is wrong, and what holds instead.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in [&self.at, &self.object, &self.field] {
            if !part.is_empty() {
                write!(f, "{part}: ")?;
            }
        }
        write!(f, "{}; {}", self.message, self.remedy)
    }
}

/// Collects the problems of one object: the first few of them, and how many more there are.
#[derive(Debug)]
struct Report<'a> {
    object: String,
    problems: &'a mut Vec<Problem>,
    said: usize,
}

impl<'a> Report<'a> {
    fn of(object: String, problems: &'a mut Vec<Problem>) -> Self {
        Self { object, problems, said: 0 }
    }

    fn say(
        &mut self,
        field: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.said += 1;
        if self.said > MOST_OF_ONE {
            return;
        }
        self.problems.push(Problem {
            at: String::new(),
            object: self.object.clone(),
            field: field.into(),
            message: message.into(),
            remedy: remedy.into(),
        });
    }
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        let more = self.said.saturating_sub(MOST_OF_ONE);
        if more > 0 {
            self.problems.push(Problem {
                at: String::new(),
                object: std::mem::take(&mut self.object),
                // Comes behind the others in every order.
                field: "…".into(),
                message: format!("and {more} more"),
                remedy: "correct those that are told, and others are told in their place".into(),
            });
        }
    }
}

/// The first of `problems`, which are sorted, and how many more there are.
fn bounded(mut problems: Vec<Problem>) -> Vec<Problem> {
    let more = problems.len().saturating_sub(MOST_PROBLEMS);
    if more > 0 {
        problems.truncate(MOST_PROBLEMS);
        problems.push(Problem {
            at: String::new(),
            object: String::new(),
            field: String::new(),
            message: format!("and {more} more, of any objects"),
            remedy: "correct those that are told, and others are told in their place".into(),
        });
    }
    problems
}

/// At most the first 64 characters: what an annotation says may be 256 KiB long.
fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

/// At most the first 300 characters: a parser may quote what it read.
fn shown_long(text: &str) -> String {
    text.chars().take(300).collect()
}
