//! Four small HTTP services that behave, seen from the network, like Istio's Bookinfo sample:
//! `productpage` asks `details` and `reviews`, and `reviews` (v2 and v3) asks `ratings`.
//!
//! Ports, paths, JSON shapes, time limits, retries, error texts, the login session and the headers
//! handed on are those of the sample, so routes and assertions written for it hold here. Text and
//! pages are our own. Every call to a backend opens a connection of its own, as in the sample:
//! that is what a mesh carries.

mod backend;
mod call;
mod details;
mod headers;
mod page;
mod productpage;
mod ratings;
mod reviews;
mod serve;
#[cfg(test)]
mod together;

use std::io::{Write as _, stderr};
use std::{env, fs};

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use backend::{Backend, Limits};
use productpage::Productpage;
use ratings::Ratings;
use reviews::{Reviews, Version};
use serve::App;

/// One of the four services of a small bookshop, for trying a mesh on.
///
/// The others are found by DETAILS_HOSTNAME, RATINGS_HOSTNAME and REVIEWS_HOSTNAME (default: the
/// service's name), each with an optional ..._SERVICE_PORT (9080), in SERVICES_DOMAIN if that is
/// set. HOSTNAME and CLUSTER_NAME show in the reviews.
#[derive(Debug, Parser)]
#[command(name = "malla-bookinfo", disable_version_flag = true)]
struct Cli {
    /// Which service to be.
    service: Service,

    /// Version to behave as: reviews v1 show no stars, v2 black ones, v3 red ones.
    #[arg(long, default_value = "v1")]
    version: Version,

    /// Port to listen on, both IP families; 0 takes any.
    #[arg(long, default_value_t = 9080)]
    port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Service {
    Productpage,
    Details,
    Reviews,
    Ratings,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    let limits = Limits::default();
    let app = match cli.service {
        Service::Productpage => App::Productpage(Productpage::new(
            backend("details")?,
            backend("reviews")?,
            backend("ratings")?,
            limits,
        )),
        Service::Details => App::Details,
        Service::Reviews => App::Reviews(Reviews {
            version: cli.version,
            pod: pod_name(),
            cluster: env::var("CLUSTER_NAME").ok(),
            ratings: backend("ratings")?,
            limits,
        }),
        Service::Ratings => App::Ratings(Ratings::default()),
    };

    let listener = serve::listen(cli.port).with_context(|| format!("listen on {}", cli.port))?;
    // Whoever started us may wait for this line; that nobody reads it must not end the service.
    let _unread = writeln!(stderr(), "{:?} listens on {}", cli.service, listener.local_addr()?);

    let mut terminate = signal(SignalKind::terminate()).context("handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("handle SIGINT")?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    serve::serve(listener, app, stop).await;
    Ok(())
}

/// Where the environment says that `service` is.
fn backend(service: &'static str) -> Result<Backend> {
    Backend::from_env(service, |name| env::var(name).ok())
}

/// The pod's name as Kubernetes gives it to a container, else the machine's.
fn pod_name() -> String {
    env::var("HOSTNAME")
        .or_else(|_unset| fs::read_to_string("/proc/sys/kernel/hostname"))
        .map_or_else(|_unreadable| "unknown".to_owned(), |name| name.trim().to_owned())
}
