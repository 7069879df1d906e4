//! Where this node's certificates come from, and whom it trusts.

use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail};
use tokio::task::JoinSet;
use tracing::error;

use crate::cli::Run;
use crate::discovery::client;
use crate::identity::bundle;
use crate::identity::ca::DirectoryCa;
use crate::identity::kubernetes::requests::SigningRequests;
use crate::identity::store::{Identities, Issuer, Lifetimes};

/// Starts to follow the bundle, and to issue what is wanted: at once if another agent of the node waits for this one
/// (`is_awaited`), of which there are few in a cluster at a time.
pub(super) async fn start(
    options: &Run,
    is_awaited: bool,
    control: &mut JoinSet<()>,
) -> Result<Arc<Identities>> {
    let issuer = match &options.ca_dir {
        Some(dir) => {
            let root = DirectoryCa::open(dir)?;
            if *root.trust_domain() != options.trust_domain {
                bail!(
                    "the CA in {} is for trust domain {}, not {}: set --trust-domain, or make another CA",
                    dir.display(),
                    root.trust_domain(),
                    options.trust_domain
                );
            }
            Issuer::Directory(root)
        }
        None => {
            let client = client::client(options.kubeconfig.as_deref()).await;
            let client =
                client.context("without --ca-dir certificates are asked for in a cluster")?;
            let draw = f64::from(fastrand::u32(..)) / f64::from(u32::MAX);
            let draw = if is_awaited { 0.0 } else { draw };
            Issuer::Kubernetes(Box::new(SigningRequests::new(client, &options.signer, draw)))
        }
    };
    let path = options.bundle();
    let bundles = bundle::TrustBundles::load(&path, &options.trust_domain)?;
    let identities = Arc::new(Identities::new(bundles));
    let lifetimes = Lifetimes { lifetime: options.cert_lifetime, ..Lifetimes::default() };
    control.spawn(Arc::clone(&identities).maintain(issuer, lifetimes, SystemTime::now));
    let following = bundle::follow(Arc::clone(&identities), path, options.trust_domain.clone());
    control.spawn(async move {
        if let Err(error) = following.await {
            error!(%error, stage = "tunnel", "the trust bundle is not followed");
        }
    });
    Ok(identities)
}
