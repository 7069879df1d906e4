//! The cluster that tests run against: one that is up already, one that lives as long as the tests,
//! or somebody else's.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::cluster::state::Cluster;
use crate::cluster::{Bound, kubeconfig, tools};
use crate::{image, root, this};

/// What the harness is told (`tests/src/cluster.rs` reads it).
#[derive(Debug)]
pub(crate) struct Tested {
    /// For the environment of the tests.
    pub(crate) environment: Vec<(&'static str, OsString)>,
    bound: Option<Bound>,
}

impl Tested {
    /// Finds or starts a cluster. Where there can be none the tests are told why, and skip themselves.
    ///
    /// # Errors
    ///
    /// Fails if one should start here and does not.
    pub(crate) fn prepare(theirs: Option<&Path>, load: Option<&str>) -> Result<Self> {
        let xtask = this()?;
        let mut environment = vec![("MALLA_XTASK", xtask.clone().into_os_string())];
        if let Some(file) = theirs {
            let file = file.canonicalize().with_context(|| format!("find {}", file.display()))?;
            environment.push(("MALLA_KUBECONFIG", file.into()));
            environment.push(("MALLA_KUBECTL", "kubectl".into()));
            environment.extend(load.map(|load| ("MALLA_LOAD_IMAGE", load.into())));
            environment.extend(agent()?);
            return Ok(Self { environment, bound: None });
        }
        if let Some(missing) = tools::missing() {
            environment.push(("MALLA_NO_CLUSTER", missing.into()));
            return Ok(Self { environment, bound: None });
        }
        // Before a cluster takes its share of the machine.
        environment.extend(agent()?);
        let is_up = Cluster::of_this_checkout()?.is_some();
        let bound = if is_up { None } else { Some(Bound::start()?) };
        environment.push(("MALLA_KUBECONFIG", kubeconfig()?.into()));
        environment.push(("MALLA_KUBECTL", tools::KUBERNETES.program("kubectl")?.into()));
        let load = format!("{} cluster load", xtask.display());
        environment.push(("MALLA_LOAD_IMAGE", load.into()));
        environment.push(("MALLA_OWN_CLUSTER", "1".into()));
        Ok(Self { environment, bound })
    }

    /// Ends the cluster, if it was started for the tests.
    ///
    /// # Errors
    ///
    /// Fails if something of it is left.
    pub(crate) fn end(self) -> Result<()> {
        self.bound.map_or(Ok(()), Bound::end)
    }
}

/// Makes the agent's image: where it is, and what it is called.
fn agent() -> Result<[(&'static str, OsString); 2]> {
    let archive = root()?.join("target/cluster/mesh-agent.tar");
    let dir = archive.parent().context("the file is in a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let name = image::tested(&archive)?;
    Ok([("MALLA_IMAGE", archive.into()), ("MALLA_IMAGE_NAME", name.into())])
}
