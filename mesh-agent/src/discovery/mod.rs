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
//! | `problems` | what is told of that |
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
mod problems;
mod services;
pub mod translate;

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_core::snapshot::{Snapshot, WorkloadUid};
use mesh_core::spiffe::SpiffeId;
use tokio::sync::oneshot;
use tracing::info;

pub use directory::network_policies;
pub use problems::Problem;
use problems::{Problems, Report, shown, shown_long};

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
    /// The agent of this pod's node says that it is not there, or is another one.
    Doubt {
        /// By UID.
        pod: WorkloadUid,
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
