//! The command line of the certificate authorities: in a directory, and of a cluster.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use mesh_core::spiffe::TrustDomain;

use super::output::Format;
use super::seconds;
use crate::identity::kubernetes::SIGNER;
use crate::telemetry::{LogFormat, parse_level};

/// `mesh-agent ca`.
#[derive(Clone, Debug, Subcommand)]
pub enum Ca {
    /// Make a root certificate and its key. Never overwrites one.
    Init {
        /// Where to.
        #[arg(long, env = "MESH_CA_DIR", value_name = "DIR")]
        dir: PathBuf,
        /// Which trust domain the root is for.
        #[arg(
            long,
            env = "MESH_TRUST_DOMAIN",
            value_name = "NAME",
            default_value = "cluster.local"
        )]
        trust_domain: TrustDomain,
    },
    /// Show the root certificate and the trusted bundle.
    Show {
        /// Where from.
        #[arg(long, env = "MESH_CA_DIR", value_name = "DIR")]
        dir: PathBuf,
        /// How to print it.
        #[arg(long, short, value_enum, default_value_t)]
        output: Format,
    },
    /// Answer certificate requests of a cluster's agents until SIGTERM: with a certificate for
    /// workloads that run on the agent's node, and with a reason otherwise.
    Run(Box<CaRun>),
}

/// `mesh-agent ca run`. Every flag can be set in the environment.
#[derive(Clone, Debug, Args)]
pub struct CaRun {
    /// Namespace of the Secret `malla-ca`, the ConfigMap `malla-trust`, the Lease `malla-ca`, and of
    /// the agents.
    #[arg(long, env = "MESH_NAMESPACE", value_name = "NAME")]
    pub namespace: String,

    /// What this one is called in the Lease. Two with one name would both answer.
    #[arg(long, env = "MESH_NAME", value_name = "NAME")]
    pub name: String,

    /// Which requests to answer.
    #[arg(long, env = "MESH_SIGNER", value_name = "NAME", default_value = SIGNER)]
    pub signer: String,

    /// Service account of the agents, in the same namespace. Nobody else's request is signed.
    #[arg(
        long,
        env = "MESH_AGENT_SERVICE_ACCOUNT",
        value_name = "NAME",
        default_value = "malla-agent"
    )]
    pub agent_service_account: String,

    /// Trust domain of every identity. That of the agents.
    #[arg(long, env = "MESH_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: TrustDomain,

    /// Seconds that a new root is published before it signs. The kubelets must have brought the
    /// ConfigMap to every agent by then (`syncFrequency` and what they remember, two minutes unless
    /// set otherwise): too few, and peers refuse each other while the root is replaced.
    #[arg(long = "bundle-spread-s", env = "MESH_BUNDLE_SPREAD_S", value_name = "SECONDS", default_value = "180", value_parser = seconds)]
    pub bundle_spread: Duration,

    /// How to reach the API server; without it, as a pod does.
    #[arg(long, env = "MESH_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// Serves `/metrics`.
    #[arg(long, env = "MESH_METRICS_ADDR", value_name = "ADDR", default_value = "[::]:15020")]
    pub metrics_addr: SocketAddr,

    /// Serves `/healthz/ready` and `/healthz/live`.
    #[arg(long, env = "MESH_READY_ADDR", value_name = "ADDR", default_value = "[::]:15021")]
    pub ready_addr: SocketAddr,

    /// How the log is written, on standard error.
    #[arg(long, env = "MESH_LOG_FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,

    /// off, error, warn, info, debug or trace, also for one module.
    #[arg(long, env = "MESH_LOG", value_name = "LEVEL", default_value = "info", value_parser = parse_level)]
    pub log: String,
}
