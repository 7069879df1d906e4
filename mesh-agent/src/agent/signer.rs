//! `mesh-agent ca run`: the cluster's CA, a process of its own that carries no traffic.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::info;

use super::listeners::listen;
use super::warn_of_unknown_variables;
use crate::cli::CaRun;
use crate::discovery::client;
use crate::identity::kubernetes::election::Candidate;
use crate::identity::kubernetes::signer::{Settings, Signer};
use crate::telemetry::{self, CaTelemetry};

/// Answers requests for certificates until SIGTERM or SIGINT.
///
/// # Errors
///
/// What keeps it from starting.
pub fn run_ca(options: CaRun) -> Result<()> {
    telemetry::init_logging(options.log_format, &options.log).context("start logging")?;
    warn_of_unknown_variables();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run(options))
}

async fn run(options: CaRun) -> Result<()> {
    let client = client::client(options.kubeconfig.as_deref()).await?;
    let metrics = listen(options.metrics_addr).await.context("--metrics-addr")?;
    let probes = listen(options.ready_addr).await.context("--ready-addr")?;
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut tasks = JoinSet::new();

    let telemetry = CaTelemetry::new();
    let candidate = Candidate::new(client.clone(), &options.namespace, options.name.clone());
    let leads = candidate.leads();
    let settings = Settings {
        signer: options.signer,
        namespace: options.namespace,
        agent: options.agent_service_account,
        trust_domain: options.trust_domain,
        spread: options.bundle_spread,
    };
    let signer = Signer::new(client, settings, telemetry.clone());
    let problem = signer.problem();
    let readiness: telemetry::Readiness =
        Arc::new(move || problem.borrow().clone().map_or(Ok(()), Err));
    tasks.spawn(async move {
        match telemetry::serve_metrics(metrics, move || telemetry.exposition()).await {}
    });
    tasks.spawn(async move { match telemetry::serve_probes(probes, readiness).await {} });
    tasks.spawn(signer.run(leads));
    let end = watch::Sender::new(false);
    let competing = tokio::spawn(candidate.compete(end.subscribe()));
    info!(name = options.name, version = env!("CARGO_PKG_VERSION"), "started");

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    end.send_replace(true);
    // It gives the lease up, so that the next one need not wait for it to run out.
    competing.await.context("give up the lease")?;
    tasks.shutdown().await;
    info!("ended");
    Ok(())
}
