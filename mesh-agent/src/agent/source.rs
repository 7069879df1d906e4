//! Where the state of the mesh comes from: a directory of manifests, or the Kubernetes API. Nothing of
//! the one that is not asked for is started.

use std::sync::Arc;

use anyhow::Result;
use mesh_core::snapshot::Snapshot;
use tokio::sync::watch;
use tokio::time::Instant;

use super::namespaces::Namespaces;
use crate::cli::Run;
use crate::discovery::Problem;
use crate::discovery::client::client;
use crate::discovery::cluster::ClusterSource;
use crate::discovery::file::{FileSource, Settings};

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
                let (source, snapshots) = ClusterSource::new(client, settings);
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

    /// How many NetworkPolicies there are; `None` if they are not looked at.
    pub(super) fn network_policies(&self) -> Option<watch::Receiver<usize>> {
        match self {
            Self::Manifests(source) => Some(source.network_policies()),
            Self::Cluster(_) => None,
        }
    }

    /// Follows it, for ever.
    pub(super) async fn run(self) {
        match self {
            Self::Manifests(source) => source.run().await,
            Self::Cluster(source) => source.run().await,
        }
    }
}
