//! The cluster that tests run against: one that is up already, one that lives as long as the tests,
//! or somebody else's.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::cluster::state::Cluster;
use crate::cluster::{Bound, WHICH, kubeconfig, tools};
use crate::{image, root, this};

/// What the harness is told (`tests/src/cluster.rs` reads it).
#[derive(Debug)]
pub(crate) struct Tested {
    /// For the environment of the tests.
    pub(crate) environment: Vec<(&'static str, OsString)>,
    bound: Option<Bound>,
}

impl Tested {
    /// The one cluster that there is to test on: somebody else's, or one that is up already; or none, where there
    /// can be none: the tests are told why, and skip themselves. Nothing if clusters can be made for the tests.
    ///
    /// # Errors
    ///
    /// Fails if the agent's image cannot be made.
    pub(crate) fn given(
        theirs: Option<&Path>,
        load: Option<&str>,
        profile: &str,
    ) -> Result<Option<Self>> {
        if let Some(file) = theirs {
            let file = file.canonicalize().with_context(|| format!("find {}", file.display()))?;
            let mut environment = vec![xtask()?];
            environment.push(("MALLA_KUBECONFIG", file.into()));
            environment.push(("MALLA_KUBECTL", "kubectl".into()));
            environment.extend(load.map(|load| ("MALLA_LOAD_IMAGE", load.into())));
            environment.extend(agent(profile)?);
            return Ok(Some(Self { environment, bound: None }));
        }
        if let Some(missing) = tools::missing() {
            let environment = vec![xtask()?, ("MALLA_NO_CLUSTER", missing.into())];
            return Ok(Some(Self { environment, bound: None }));
        }
        if Cluster::of_this_checkout(None)?.is_none() {
            return Ok(None);
        }
        Ok(Some(Self { environment: ours(None, &agent(profile)?)?, bound: None }))
    }

    /// Starts a cluster, `which` of this checkout's.
    ///
    /// # Errors
    ///
    /// Fails if it does not become ready.
    pub(crate) fn start(which: Option<&str>, agent: &Image) -> Result<Self> {
        let bound = Some(Bound::start(which)?);
        Ok(Self { environment: ours(which, agent)?, bound })
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

/// Of a cluster that was made here.
fn ours(which: Option<&str>, agent: &Image) -> Result<Vec<(&'static str, OsString)>> {
    let mut environment = vec![xtask()?];
    environment.push((WHICH, which.unwrap_or_default().into()));
    environment.push(("MALLA_KUBECONFIG", kubeconfig(which)?.into()));
    environment.push(("MALLA_KUBECTL", tools::KUBERNETES.program("kubectl")?.into()));
    let load = format!("{} cluster load", this()?.display());
    environment.push(("MALLA_LOAD_IMAGE", load.into()));
    environment.push(("MALLA_OWN_CLUSTER", "1".into()));
    environment.extend(agent.clone());
    Ok(environment)
}

fn xtask() -> Result<(&'static str, OsString)> {
    Ok(("MALLA_XTASK", this()?.into_os_string()))
}

/// The agent's image: where it is, and what it is called.
pub(crate) type Image = [(&'static str, OsString); 2];

/// Makes what every cluster needs, before one takes its share of the machine: the agent's image is built in this
/// profile of cargo.
///
/// # Errors
///
/// Fails with what the programs say that make it.
pub(crate) fn prepare(profile: &str) -> Result<Image> {
    tools::ready()?;
    agent(profile)
}

fn agent(profile: &str) -> Result<Image> {
    let archive = root()?.join("target/cluster/mesh-agent.tar");
    let dir = archive.parent().context("the file is in a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let name = image::agent(&archive, profile)?;
    Ok([("MALLA_IMAGE", archive.into()), ("MALLA_IMAGE_NAME", name.into())])
}
