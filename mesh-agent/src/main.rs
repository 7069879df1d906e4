//! `mesh-agent`: the command line, and its exit codes.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};
use mesh_agent::agent;
use mesh_agent::capture::{Capture, Detached};
use mesh_agent::cli::ask::{Answered, AskError, DetachError};
use mesh_agent::cli::check::{Category, Report};
use mesh_agent::cli::output::{self, Format};
use mesh_agent::cli::{Ca, Check, Cli, Command, Question, Run, ask, cgroup2, node, parts};
use tokio::runtime::{Builder, Runtime};

/// A problem was found.
const PROBLEM: u8 = 1;
/// Wrong usage; clap uses the same.
const USAGE: u8 = 2;
/// No agent answered.
const UNREACHABLE: u8 = 3;

fn main() -> ExitCode {
    let Cli { command } = Cli::parse();
    let out = &mut io::stdout();
    match dispatch(command, out) {
        Ok(code) => code,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            tell(format_args!("error: {error:#}"));
            let asked = error.downcast_ref::<AskError>();
            let is_unreachable = asked.is_some_and(AskError::is_unreachable);
            ExitCode::from(if is_unreachable { UNREACHABLE } else { PROBLEM })
        }
    }
}

fn dispatch(command: Command, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(run) => return start(*run),
        Command::Check(check) => return report(&check, out),
        Command::Detach(detach) => {
            small_runtime()?.block_on(ask::must_not_run(&detach.admin.socket))?;
            ask::must_not_beat(&detach.admin.socket, &detach.bpffs)?;
            let mut report = Capture::detach(&detach.bpffs)?;
            report.removed.extend(agent::remove_files(&detach.admin.socket)?);
            return detached(&report, detach.output, out);
        }
        Command::Ca(ca) => authority(ca, out)?,
        Command::Completion { shell } => {
            // Into memory first: the generator panics when its output is closed.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "mesh-agent", &mut script);
            out.write_all(&script)?;
        }
        Command::Question(question) => return answer(&question, out),
    }
    Ok(ExitCode::SUCCESS)
}

/// Says what was removed; something left in place is a problem.
fn detached(report: &Detached, format: Format, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    match format {
        Format::Table => tell_detached(report, out)?,
        Format::Json | Format::Yaml => output::print_data(out, format, report)?,
    }
    Ok(if report.left.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(PROBLEM) })
}

fn tell_detached(report: &Detached, out: &mut dyn Write) -> io::Result<()> {
    for path in &report.removed {
        writeln!(out, "√ removed {}", path.display())?;
    }
    for path in &report.namespaces {
        writeln!(out, "√ removed the routes for client addresses in {}", path.display())?;
    }
    if report.removed.is_empty() && report.namespaces.is_empty() {
        writeln!(out, "√ nothing was attached")?;
    }
    for path in &report.left {
        writeln!(out, "‼ left {}: not ours", path.display())?;
    }
    Ok(())
}

/// Starts the agent, unless a flag cannot work.
fn start(mut run: Run) -> anyhow::Result<ExitCode> {
    run.cgroup = cgroup2(&run.cgroup);
    let problems = run.problems();
    if problems.is_empty() {
        agent::run(run)?;
        return Ok(ExitCode::SUCCESS);
    }
    for problem in problems {
        tell(format_args!("error: {problem}"));
    }
    Ok(ExitCode::from(USAGE))
}

fn report(check: &Check, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    let (cgroup, runtime) = (cgroup2(&check.cgroup), small_runtime()?);
    let checks = parts::kernel_features(&cgroup, &check.bpffs);
    let mut categories = vec![Category { category_name: "kernel", checks }];
    let checks = runtime.block_on(node::findings(check, &cgroup));
    categories.push(Category { category_name: "node", checks });
    let (manifests, kubeconfig) = (check.manifests.as_deref(), check.kubeconfig.as_deref());
    let skips_the_node = check.redirect_peer.is_on();
    let policies = parts::policies(manifests, kubeconfig, skips_the_node);
    if let Some(policies) = runtime.block_on(policies) {
        let category_name = if skips_the_node { "redirect" } else { "policies" };
        categories.push(Category { category_name, checks: vec![policies] });
    }
    let report = Report::new(categories);
    report.print(out, check.output)?;
    Ok(if report.success { ExitCode::SUCCESS } else { ExitCode::from(PROBLEM) })
}

fn authority(ca: Ca, out: &mut dyn Write) -> anyhow::Result<()> {
    let (report, format) = match ca {
        Ca::Init { dir, trust_domain } => (parts::ca_init(&dir, &trust_domain), Format::Table),
        Ca::Show { dir, output } => (parts::ca_show(&dir), output),
        Ca::Run(run) => return agent::run_ca(*run),
    };
    output::print(out, format, &report?)?;
    Ok(())
}

/// One connection, so one thread.
fn small_runtime() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("start a runtime")
}

/// The commands that ask a running agent.
fn answer(question: &Question, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    let answered = small_runtime()?.block_on(ask::answer(question, out))?;
    Ok(match answered {
        Answered::Ok => ExitCode::SUCCESS,
        Answered::Problem => ExitCode::from(PROBLEM),
    })
}

/// `mesh-agent workloads | head` is no failure. An agent that hangs up on `detach` is one.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    !error.is::<DetachError>()
        && error
            .chain()
            .filter_map(|cause| cause.downcast_ref::<io::Error>())
            .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Writes a line to standard error; that nobody reads it is no further error.
fn tell(line: std::fmt::Arguments<'_>) {
    writeln!(io::stderr(), "{line}").ok();
}
