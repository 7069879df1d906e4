//! Tests that cannot run here say so, and are counted as skipped.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::thread;

/// Whether this is root. If not, the test is skipped and is to return.
pub(crate) fn unless_root(why: &str) -> bool {
    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    if !is_root {
        skipped(why);
    }
    is_root
}

/// Leaves a line for the reader, and one in the file that `cargo xtask test` counts.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn skipped(why: &str) {
    // Rust's runner names a test's thread after the test.
    let name = thread::current().name().unwrap_or("?").to_owned();
    eprintln!("SKIPPED {name}: {why}");
    if let Some(list) = std::env::var_os("MALLA_SKIPPED") {
        let mut list = OpenOptions::new().append(true).open(list).unwrap();
        writeln!(list, "{name}\t{why}").unwrap();
    }
}
