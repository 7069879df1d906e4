//! `cargo xtask check`: what can be said about the code without running it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::process::{cargo, must};
use crate::toolchain::Toolchain;
use crate::{layers, licences, root, say, setup};

/// Lints compile everything once more.
const LIMIT: Duration = Duration::from_secs(3600);

const LINTS: &str = "clippy --workspace --all-targets --features mesh-agent/bench -- -Dwarnings";

/// One thing to check.
pub(crate) struct Step {
    /// What it is called in the output.
    pub(crate) name: &'static str,
    /// Does it.
    pub(crate) run: fn(&Toolchain) -> Result<()>,
}

/// Everything that is checked, quickest first.
pub(crate) const STEPS: &[Step] = &[
    Step { name: "layers", run: |_| layers::check(&root()?) },
    Step { name: "licences", run: |_| licences::check(&root()?) },
    Step { name: "format", run: |_| cargo_passes("format", "fmt --all --check") },
    Step { name: "format of the eBPF programs", run: format_ebpf },
    Step { name: "lints", run: |_| cargo_passes("lints", LINTS) },
    Step { name: "lints of the eBPF programs", run: lint_ebpf },
];

/// Runs all steps, and fails if one does.
pub(crate) fn run() -> Result<()> {
    let toolchain = setup::toolchain()?;
    let mut failed = 0;
    for step in STEPS {
        match (step.run)(&toolchain) {
            Ok(()) => say(&format!("ok      {}", step.name)),
            Err(error) => {
                failed += 1;
                say(&format!("FAILED  {}: {error:#}", step.name));
            }
        }
    }
    if failed > 0 {
        bail!("{failed} of {} checks failed", STEPS.len());
    }
    Ok(())
}

fn cargo_passes(what: &str, args: &str) -> Result<()> {
    must(what, cargo(args)?, LIMIT).map(drop)
}

fn format_ebpf(_toolchain: &Toolchain) -> Result<()> {
    cargo_passes("format of the eBPF programs", "fmt --manifest-path mesh-ebpf/Cargo.toml --check")
}

/// The lints run with the compiler that builds the programs, since another one has no `core` for BPF.
/// Where it comes without clippy (Debian's), what the compiler itself warns of is refused.
fn lint_ebpf(toolchain: &Toolchain) -> Result<()> {
    let clippy = Path::new(&toolchain.rustc).with_file_name("cargo-clippy");
    let mut lint = toolchain.cargo(if clippy.is_file() { "clippy" } else { "rustc" });
    lint.args(["--release", "--target", "bpfel-unknown-none"]);
    lint.args(toolchain.build_args.split_whitespace()).args(["--", "-Dwarnings"]);
    lint.current_dir(root()?.join("mesh-ebpf"));
    must("lints of the eBPF programs", lint, LIMIT).map(drop)
}
