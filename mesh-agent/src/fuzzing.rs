//! For the fuzz targets (`mesh-agent/fuzz`): parsers that are nobody's but their module's are called
//! by a `fuzzing` module beside them. Each function there takes any bytes, and panics if a promise is
//! broken. Compiled for the fuzzer, and for the tests, which repeat what it began with and has found.

#[cfg(test)]
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Feeds `target` with every seed of the fuzz target `name`, and with what is kept of its runs (`cargo xtask fuzz
/// --keep`): one input after the other, each behind its length.
#[cfg(test)]
pub(crate) fn replay(name: &str, target: impl Fn(&[u8])) {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz");
    let feed = |what: &str, input: &[u8]| {
        let fed = catch_unwind(AssertUnwindSafe(|| target(input)));
        assert!(fed.is_ok(), "{what}: {}", input.escape_ascii());
    };
    let mut fed = 0;
    for seed in std::fs::read_dir(format!("{dir}/seeds/{name}")).unwrap() {
        let seed = seed.unwrap().path();
        feed(&seed.display().to_string(), &std::fs::read(&seed).unwrap());
        fed += 1;
    }
    assert!(fed > 0, "{name} has no seeds");
    let kept = std::fs::read(format!("{dir}/kept/{name}"));
    let kept = kept.unwrap_or_else(|error| {
        panic!("nothing is kept of {name} ({error}): cargo xtask fuzz --keep {name}")
    });
    let (mut rest, mut nth) = (&kept[..], 0);
    while let Some((length, inputs)) = rest.split_first_chunk() {
        let length = u32::from_be_bytes(*length).try_into().unwrap();
        let torn = || panic!("kept/{name} ends within input {nth}");
        let (input, others) = inputs.split_at_checked(length).unwrap_or_else(torn);
        feed(&format!("input {nth} in kept/{name}"), input);
        (rest, nth) = (others, nth + 1);
    }
    assert!(rest.is_empty() && nth > 0, "kept/{name} is torn or empty");
    // What every parser gets sooner or later.
    target(&[]);
    (0..=255).for_each(|byte| target(&[byte; 300]));
}

// What other crates parse, of which they have no files to read.
#[cfg(test)]
#[path = "../fuzz/bodies/cgroup.rs"]
mod cgroup;
#[cfg(test)]
#[path = "../fuzz/bodies/packet.rs"]
mod packet;
#[cfg(test)]
#[path = "../fuzz/bodies/spiffe.rs"]
mod spiffe;
#[cfg(test)]
#[path = "../fuzz/bodies/wire.rs"]
mod wire;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_the_fuzzer_hold() {
        replay("cgroup", cgroup::feed);
        replay("packet", packet::feed);
        replay("spiffe", spiffe::feed);
        replay("wire", wire::feed);
    }
}
