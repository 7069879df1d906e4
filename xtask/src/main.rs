//! Build, run and test automation: `cargo xtask --help`. CI runs these and nothing else.
#![forbid(unsafe_code)]

mod build;
mod check;
mod clean;
mod cluster;
mod fuzz;
mod image;
mod kernel;
mod layers;
mod licences;
mod packages;
mod privilege;
mod process;
mod setup;
mod test;
mod toolchain;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, Parser};

/// Builds, runs and tests Malla.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Install what building and testing need: the eBPF toolchain, and the programs that tests run.
    ///
    /// Done in under a second when nothing is missing; every other task calls it. As another user
    /// than root it prints the commands that root has to run.
    Setup(setup::Setup),
    /// Build the agent (with its eBPF programs) and the programs of the tests.
    Build(build::Build),
    /// Format, lints, layers, licences: everything that needs no privileges and runs no program.
    Check,
    /// Everything: setup, check, unit tests, end-to-end tests. The last line is
    /// `N passed, N failed, N skipped`.
    Test,
    /// The end-to-end tests alone, as root because they make namespaces and load eBPF.
    E2e(test::E2e),
    /// Plain TCP and the mesh between the same pods, measured in one run.
    Bench(Program),
    /// What single stages cost, without a mesh: decisions, sealing, the relay's loop.
    Micro(Program),
    /// Feed the parsers of what peers send with random input for a while.
    Fuzz(fuzz::Fuzz),
    /// Two nodes, four services, a load, and the proof that it crossed the wire encrypted.
    Demo(Program),
    /// A real Kubernetes cluster on this machine, for tests and to look at.
    #[command(subcommand)]
    Cluster(cluster::Task),
    /// Write the agent's image, or that of a program of the tests, as an OCI archive.
    Image(image::Image),
    /// What depends on the kernel, on another one than this machine's, in an emulator.
    Kernel(kernel::Kernel),
    /// Remove what a killed test, demo or cluster left on this machine: namespaces, links, cgroups,
    /// pins.
    Clean(clean::Clean),
}

/// Arguments for the program that does the work; `-- --help` lists them.
#[derive(Debug, Args)]
struct Program {
    /// Passed on unchanged, for example `--duration 20 --keep`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

fn main() -> ExitCode {
    let well = |()| ExitCode::SUCCESS;
    let done = match Task::parse() {
        Task::Setup(setup) => setup.run().map(well),
        Task::Build(build) => build.run().map(well),
        Task::Check => check::run().map(well),
        Task::Test => Ok(test::everything()),
        Task::E2e(e2e) => e2e.run(),
        Task::Bench(program) => build::run_program("malla-bench", &program.args).map(well),
        Task::Micro(program) => build::micro(&program.args).map(well),
        Task::Fuzz(fuzz) => fuzz.run().map(well),
        Task::Demo(program) => build::run_program("malla-demo", &program.args).map(well),
        Task::Cluster(task) => task.run().map(well),
        Task::Image(image) => image.run().map(well),
        Task::Kernel(kernel) => kernel.run().map(well),
        Task::Clean(clean) => clean.run().map(well),
    };
    done.unwrap_or_else(|error| {
        say(&format!("error: {error:#}"));
        ExitCode::FAILURE
    })
}

/// Tells the user something: the one place of xtask that prints.
#[expect(clippy::print_stdout, reason = "a command-line tool's output")]
fn say(text: &str) {
    println!("{text}");
}

/// This program. While tests are built, cargo puts a new one in its place.
fn this() -> Result<PathBuf> {
    let path = std::env::current_exe().context("find xtask")?;
    let text = path.to_string_lossy();
    // proc_pid_exe(5).
    Ok(text.strip_suffix(" (deleted)").map_or_else(|| path.clone(), PathBuf::from))
}

/// The top of the checkout.
fn root() -> Result<PathBuf> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent().map(PathBuf::from).context("xtask lies in the checkout")
}
