//! `mesh-agent`: the command line.
fn main() {}
