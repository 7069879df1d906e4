//! What the harness promises itself: a test that is killed leaves nothing on the machine.

use std::io::{Read as _, stdin};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use anyhow::{Context as _, Result};
use harness::{Cgroup, Mesh, wait};

/// The test runs itself once more, as the process that is killed.
#[test]
fn killed_test_leaves_nothing_behind() -> Result<()> {
    const KILLED: &str = "MALLA_TEST_TO_BE_KILLED";
    harness::require!();
    if env::var_os(KILLED).is_some() {
        let _mesh = Mesh::two_nodes()?;
        // Until it is killed, or whoever should do that is gone.
        stdin().read_to_end(&mut Vec::new())?;
        return Ok(());
    }
    let mut killed = Command::new(env::current_exe()?);
    killed.args(["--exact", "killed_test_leaves_nothing_behind"]).env(KILLED, "");
    let mut killed = killed.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    let ours = format!("malla-{}-", killed.id());
    let cgroup = Cgroup::join()?;
    let cgroups = cgroup.path().parent().context("the cgroup has a parent")?;
    let places = [Path::new("/run/netns"), cgroups, &env::temp_dir()].map(Path::to_owned);
    let left = |place: &PathBuf| {
        let names = fs::read_dir(place).into_iter().flatten().flatten();
        names.filter(|entry| entry.file_name().to_string_lossy().starts_with(&ours)).count()
    };
    // An agent that pinned its programs is as far as a mesh gets.
    let pinned = places[2].join(format!("{ours}0/node-b/bpf/malla"));
    // A mesh waits that long for each of its agents.
    let made = wait::until(wait::SOON * 2, "a mesh to be killed", || {
        places.iter().all(|place| left(place) > 0)
            && fs::read_dir(&pinned).is_ok_and(|dir| dir.count() > 0)
    });
    killed.kill()?;
    killed.wait()?;
    made?;
    wait::until(wait::SOON, "everything to be removed", || {
        places.iter().all(|place| left(place) == 0)
    })
}
