//! For the fuzz targets (`mesh-agent/fuzz`): parsers that are nobody's but their module's are called
//! by a `fuzzing` module beside them. Each function there takes any bytes, and panics if a promise is
//! broken. Compiled for the fuzzer, and for the tests, which repeat what it began with and has found.

/// Feeds `target` with every seed of the fuzz target `name`.
#[cfg(test)]
pub(crate) fn replay(name: &str, target: impl Fn(&[u8])) {
    let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/");
    let mut fed = 0;
    for seed in std::fs::read_dir(format!("{seeds}{name}")).unwrap() {
        target(&std::fs::read(seed.unwrap().path()).unwrap());
        fed += 1;
    }
    assert!(fed > 0, "{name} has no seeds");
    // What every parser gets sooner or later.
    target(&[]);
    (0..=255).for_each(|byte| target(&[byte; 300]));
}
