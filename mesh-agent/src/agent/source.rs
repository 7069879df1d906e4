//! Where the state of the mesh comes from: a directory of manifests, or the Kubernetes API. Nothing of
//! the one that is not asked for is started.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use mesh_core::snapshot::Snapshot;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};

use super::namespaces::Namespaces;
use crate::cli::Run;
use crate::discovery::client::client;
use crate::discovery::cluster::ClusterSource;
use crate::discovery::file::{FileSource, Settings};
use crate::discovery::owner::Owner;
use crate::discovery::{Demand, Outcomes, Problem};
use crate::node::Worker;

/// How often it is told which pods of other nodes connections use.
const TELL_USED: Duration = Duration::from_secs(60);

/// Tells a source which pods of other nodes are used, also of those that the kernel leaves alone, for ever.
pub(super) async fn tell_used(workers: Vec<Arc<Worker>>, demands: mpsc::Sender<Demand>) {
    loop {
        sleep(TELL_USED).await;
        let used: HashSet<_> = workers.iter().flat_map(|worker| worker.take_used()).collect();
        let addresses = workers.first().map(|worker| worker.node.capture.take_used());
        let (pods, addresses) = (used.into_iter().collect(), addresses.unwrap_or_default());
        let told = demands.send(Demand::Used { pods, addresses }).await;
        if told.is_err() {
            return; // The source has ended, and with it the agent.
        }
    }
}

/// What is followed.
pub(super) enum Source {
    Manifests(Box<FileSource>),
    Cluster(Box<ClusterSource>),
}

impl Source {
    /// Opens what `options` name. Of the API nothing is asked yet, and the first snapshot is empty, with
    /// the generation 0.
    pub(super) async fn open(options: &Run) -> Result<(Self, watch::Receiver<Arc<Snapshot>>)> {
        let settings = Settings {
            node: options.node.as_str().into(),
            trust_domain: options.trust_domain.clone(),
            tunnel_port: options.tunnel_port.get(),
        };
        Ok(match &options.manifests {
            Some(dir) => {
                let (source, snapshots) = FileSource::open(dir, settings)?;
                (Self::Manifests(Box::new(source)), snapshots)
            }
            None => {
                let client = client(options.kubeconfig.as_deref()).await?;
                let (source, snapshots) =
                    ClusterSource::new(client, settings, options.pod_cidrs.clone());
                (Self::Cluster(Box::new(source)), snapshots)
            }
        })
    }

    /// How the pods of this source are found on this node.
    pub(super) fn namespaces(&self, options: &Run) -> Result<Namespaces> {
        match self {
            Self::Manifests(_) => Ok(Namespaces::Named),
            Self::Cluster(_) => Namespaces::of_processes(&options.cgroup),
        }
    }

    pub(super) fn problems(&self) -> watch::Receiver<Arc<[Problem]>> {
        match self {
            Self::Manifests(source) => source.problems(),
            Self::Cluster(source) => source.problems(),
        }
    }

    /// Until when it is certain that the snapshot is what the source says; `None` if that is certain at
    /// any moment, as it is of files.
    pub(super) fn confirmed(&self) -> Option<watch::Receiver<Option<Instant>>> {
        match self {
            Self::Manifests(_) => None,
            Self::Cluster(source) => Some(source.confirmed()),
        }
    }

    /// Where to say what connections need to know, if that is not all known anyway.
    pub(super) fn demands(&self) -> Option<mpsc::Sender<Demand>> {
        match self {
            Self::Manifests(_) => None,
            Self::Cluster(source) => Some(source.demands()),
        }
    }

    /// The DaemonSet that this agent belongs to, if it was told.
    pub(super) fn owner(&self, options: &Run) -> Option<Owner> {
        match self {
            Self::Manifests(_) => None,
            Self::Cluster(source) => Some(Owner::new(source.client(), options.daemonset.clone()?)),
        }
    }

    /// How many NetworkPolicies there are, as far as it is known.
    pub(super) fn network_policies(&self) -> watch::Receiver<usize> {
        match self {
            Self::Manifests(source) => source.network_policies(),
            Self::Cluster(source) => source.network_policies(),
        }
    }

    /// Whether what was written into the API of this node's pods is taken back, which it is where there is to be no
    /// agent any more.
    pub(super) fn taken_back(&self) -> Option<watch::Receiver<bool>> {
        match self {
            Self::Manifests(_) => None,
            Self::Cluster(source) => Some(source.taken_back()),
        }
    }

    /// Follows it, for ever, and writes into the API what became of this node's pods.
    pub(super) async fn run(
        self,
        outcomes: watch::Receiver<Arc<Outcomes>>,
        owner: Option<Arc<Owner>>,
    ) {
        match self {
            Self::Manifests(source) => source.run().await,
            Self::Cluster(source) => source.run(outcomes, owner).await,
        }
    }
}
