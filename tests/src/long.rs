//! How long a torture lasts: seconds in the suite, minutes with `cargo xtask e2e --long`.

use std::time::{Duration, SystemTime};

/// Whether this is the long form.
pub fn is_long() -> bool {
    std::env::var_os("MALLA_LONG").is_some()
}

/// `short` in the suite, `long` in the long form: times, numbers, sizes.
pub fn either<T>(short: T, long: T) -> T {
    if is_long() { long } else { short }
}

/// What a test's randomness begins with: `MALLA_SEED`, or the clock. Says it, for whoever wants the
/// same again.
pub fn seed() -> u64 {
    let given = std::env::var("MALLA_SEED").ok().and_then(|text| text.parse().ok());
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seed = given.unwrap_or_else(|| u64::from(now.subsec_nanos()));
    report(&format!("MALLA_SEED={seed}"));
    seed
}

/// Says what a test has found out: shown after the long form, and when the test fails.
#[expect(clippy::print_stderr, reason = "a test runner's output")]
pub fn report(text: &str) {
    let thread = std::thread::current();
    eprintln!("long: {}: {text}", thread.name().unwrap_or("?"));
}
