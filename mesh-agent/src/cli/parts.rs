//! What the one-shot commands need of the other modules, in the form in which it is printed.

use std::path::Path;
use std::time::SystemTime;

use mesh_core::spiffe::TrustDomain;
use serde::Serialize;
use tokio::time::timeout;

use super::check::{Finding, Verdict};
use super::node::ANSWER_TIME;
use super::output::{Table, Tabular};
use crate::admin::view::{self, CertificateView};
use crate::capture::probe::{self, Feature, FeatureState};
use crate::discovery;
use crate::discovery::client::{ClientError, client};
use crate::discovery::cluster::network_policies;
use crate::identity::ca::{self, CaError, CaView};
use crate::telemetry::chain;

/// What `ca init` and `ca show` print.
#[derive(Clone, Debug, Serialize)]
pub struct CaReport {
    /// The trust domain that the CA issues for.
    pub trust_domain: String,
    /// The root that signs, and then every trusted root.
    pub roots: Vec<CertificateView>,
}

impl Tabular for CaReport {
    fn table(&self) -> Table {
        self.roots.table()
    }
}

impl From<CaView> for CaReport {
    fn from(ca: CaView) -> Self {
        let now = SystemTime::now();
        let roots = std::iter::once(&ca.root).chain(ca.bundle.iter().filter(|r| **r != ca.root));
        Self {
            trust_domain: ca.trust_domain.to_string(),
            roots: roots.map(|root| view::root(root, now)).collect(),
        }
    }
}

/// What the kernel has of what the mesh needs.
pub fn kernel_features(cgroup: &Path, bpffs: &Path) -> Vec<Finding> {
    let features = probe::run(cgroup, bpffs);
    features.into_iter().map(finding).collect()
}

/// NetworkPolicies that hold for no connection between pods of the mesh, or where a setting skips the node for none between
/// pods of one node: those among the manifests in a directory, or else those of the cluster. Nothing where there is none,
/// and nobody asks for it by a setting.
pub async fn policies(
    manifests: Option<&Path>,
    kubeconfig: Option<&Path>,
    skips_the_node: bool,
) -> Option<Finding> {
    let description = match skips_the_node {
        true => "NetworkPolicies that --redirect-peer on skips",
        false => "NetworkPolicies between pods of the mesh",
    };
    let description = description.to_owned();
    let (place, counted) = match manifests {
        Some(dir) => {
            (dir.display().to_string(), discovery::network_policies(dir).map_err(|e| chain(&e)))
        }
        None => {
            let counted = match policies_of_cluster(kubeconfig).await {
                None if skips_the_node => Err("there is none, or this is no pod of it".to_owned()),
                counted => counted?,
            };
            ("the cluster".to_owned(), counted)
        }
    };
    let (result, detail, hint) = match counted {
        Ok(0) => (Verdict::Success, String::new(), String::new()),
        Ok(count) if !skips_the_node => (
            Verdict::Warning,
            format!("{count} in {place}: they are not enforced on TCP between pods of the mesh"),
            "leave pods out of the mesh that only a NetworkPolicy protects (malla.dev/mesh: disabled)"
                .into(),
        ),
        Ok(count) => (
            Verdict::Warning,
            format!(
                "{count} in {place}: where the CNI enforces them on the node, they do not hold \
                     between enrolled pods of one node"
            ),
            "--redirect-peer off, the default, or make sure that no policy is about such pods"
                .into(),
        ),
        Err(error) => (
            Verdict::Warning,
            format!("{place}: {error}"),
            "name the directory of manifests with --manifests, or a cluster with --kubeconfig"
                .into(),
        ),
    };
    Some(Finding { description, result, detail, hint })
}

/// `None` outside of a cluster.
async fn policies_of_cluster(kubeconfig: Option<&Path>) -> Option<Result<usize, String>> {
    let client = match client(kubeconfig).await {
        Ok(client) => client,
        Err(ClientError::NotInPod(_)) => return None,
        Err(error) => return Some(Err(chain(&error))),
    };
    let answered = timeout(ANSWER_TIME, network_policies(&client)).await;
    Some(match answered {
        Ok(counted) => counted.map_err(|error| chain(&error)),
        Err(_elapsed) => Err("no answer in time".to_owned()),
    })
}

fn finding(feature: Feature) -> Finding {
    Finding {
        description: format!("{} ({})", feature.name, feature.since),
        result: match feature.state {
            FeatureState::Ok => Verdict::Success,
            FeatureState::Warning => Verdict::Warning,
            FeatureState::Missing => Verdict::Error,
        },
        detail: feature.detail,
        hint: feature.remedy.to_owned(),
    }
}

/// Makes a CA in `dir`.
///
/// # Errors
///
/// If there is one, or it cannot be written.
pub fn ca_init(dir: &Path, trust_domain: &TrustDomain) -> Result<CaReport, CaError> {
    ca::init(dir, trust_domain, SystemTime::now()).map(CaReport::from)
}

/// Reads the CA in `dir`.
///
/// # Errors
///
/// If there is none, or it cannot be read.
pub fn ca_show(dir: &Path) -> Result<CaReport, CaError> {
    ca::show(dir).map(CaReport::from)
}
