//! For the fuzz targets (`mesh-agent/fuzz`): parsers that are nobody's but their module's are called
//! by a `fuzzing` module beside them. Each function there takes any bytes, and panics if a promise is
//! broken. Compiled for the fuzzer, and for the tests, which repeat what it began with and has found.

/// Feeds `target` with every seed of the fuzz target `name`, and with what is kept of its runs (`cargo xtask fuzz
/// --keep`): one input after the other, each behind its length.
#[cfg(test)]
pub(crate) fn replay(name: &str, target: impl Fn(&[u8])) {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz");
    let mut fed = 0;
    for seed in std::fs::read_dir(format!("{dir}/seeds/{name}")).unwrap() {
        target(&std::fs::read(seed.unwrap().path()).unwrap());
        fed += 1;
    }
    assert!(fed > 0, "{name} has no seeds");
    let kept = std::fs::read(format!("{dir}/kept/{name}")).unwrap();
    let mut rest = &kept[..];
    while !rest.is_empty() {
        let (length, inputs) = rest.split_first_chunk().unwrap();
        let (input, others) = inputs.split_at(u32::from_be_bytes(*length).try_into().unwrap());
        target(input);
        rest = others;
    }
    assert!(!kept.is_empty(), "nothing is kept of {name}");
    // What every parser gets sooner or later.
    target(&[]);
    (0..=255).for_each(|byte| target(&[byte; 300]));
}
