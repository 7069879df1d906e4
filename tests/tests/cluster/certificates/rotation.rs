//! The root is replaced by deleting it: both are trusted, and the new one signs when it is everywhere.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::{Cluster, certificates, is_believed, wait};

use super::world::{Answer, Asked, World};

/// Enough for the signer to see that a Secret is another, and to wait until its root may sign.
const ROTATION: Duration = Duration::from_secs(40);

fn signed(world: &World) -> Result<String> {
    match world.ask(&world.agents[0], &Asked::web(world))? {
        Answer::Signed(chain) => Ok(chain),
        other => anyhow::bail!("{other:?}"),
    }
}

#[test]
fn new_root_signs_when_it_is_everywhere_and_the_old_one_is_trusted_on() -> Result<()> {
    require_cluster!();
    const SPREAD: Duration = Duration::from_secs(15);
    let world = World::new("rotates")?;
    let mut signer = world.signer("one", SPREAD.as_secs())?;
    // The first one signs at once: nobody is there who trusts less.
    let first = signed(&world)?;
    let old = world.bundle()?;
    ensure!(is_believed(&first, &old)?);

    world.system().kubectl(&["delete", "secret", "malla-ca"])?;
    let both = wait::until_some(wait::SOON, "both roots", || {
        world.bundle().ok().filter(|bundle| certificates(bundle).len() == 2)
    })?;
    let published = Instant::now();
    let chain = signed(&world)?;
    ensure!(published.elapsed() < SPREAD, "too slow to tell");
    ensure!(is_believed(&chain, &old)?, "who has only the old one does not believe this");
    // Put back as it was: both roots, and the new one is not taken for one that was always there.
    world.system().kubectl(&["delete", "configmap", "malla-trust"])?;
    wait::until(wait::SOON, "the bundle again", || world.bundle().is_ok_and(|now| now == both))?;

    let new = certificates(&both).into_iter().find(|root| !old.contains(root.trim()));
    let new = new.context("no new root")?;
    let by_new = || signed(&world).ok().filter(|chain| is_believed(chain, &new).unwrap_or(false));
    let chain = wait::until_some(ROTATION, "the new root to sign", by_new)?;
    // The moment of publication is known to a second, and the test saw it a moment later.
    ensure!(published.elapsed() + Duration::from_secs(2) > SPREAD, "{:?}", published.elapsed());
    ensure!(!is_believed(&chain, &old)? && is_believed(&chain, &both)?);

    // Another signer knows as much: what the old one has signed still lives.
    signer.terminate()?;
    let _second = world.signer("two", SPREAD.as_secs())?;
    ensure!(is_believed(&signed(&world)?, &new)?);
    assert_eq!(world.bundle()?, both);
    ensure!(is_believed(&first, &world.bundle()?)?);
    Ok(())
}
