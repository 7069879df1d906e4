//! Plain TCP and the mesh between the same two pods, on two nodes of this machine and then on one,
//! in one run.
//!
//! Sides take turns in every round, every other round in the opposite order, so that whatever else the
//! machine does falls on all of them; medians and the spread of the rounds are told. Clients and the server are
//! processes of this same executable inside the pods, agents are processes, and the hops run in this one, which
//! waits meanwhile: the CPU of each is counted apart. On the plain side no agent runs and no program of ours is
//! attached.

mod client;
mod direct;
mod hops;
mod machine;
mod ports;
mod results;
mod run;
mod server;
mod stages;
mod stats;
mod usage;
mod world;

use std::fs;
use std::io::{Write as _, stderr, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, Subcommand};
use harness::Interrupt;

use machine::Machine;
use results::{Place, Results, Side};
use run::{Group, Plan, Round, start_server};
use usage::Part;
use world::{Dial, World};

/// Measures plain TCP and the mesh between the same pods, of two nodes and of one.
#[derive(Debug, Parser)]
#[command(name = "malla-bench", disable_version_flag = true)]
struct Cli {
    #[command(subcommand)]
    role: Option<Role>,

    /// One short round: shows that all works, measures little.
    #[arg(long)]
    quick: bool,

    /// Rounds; every side runs once in each.
    #[arg(long, default_value_t = 3)]
    rounds: usize,

    /// What to compare: across nodes `plain`, `hops`, `lane` and `quic`, on the same node `near`, `direct` and
    /// `redirect`.
    #[arg(
        long,
        value_delimiter = ',',
        default_values = ["plain", "hops", "lane", "quic", "near", "direct", "redirect"]
    )]
    sides: Vec<Side>,

    /// What clients on the same node dial.
    #[arg(long, value_enum, default_value_t = Dial::Service)]
    dial: Dial,

    /// What to measure.
    #[arg(
        long,
        value_delimiter = ',',
        default_values = ["memory", "exchange", "bulk", "beside", "connect"]
    )]
    only: Vec<Group>,

    /// Seconds of each measure but new connections.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,

    /// Seconds of new connections, once with 1 client and once with 16; their decay needs time.
    #[arg(long, default_value_t = 30.0)]
    connect_seconds: f64,

    /// Connections held open for the memory of an idle one; fewer where the limit of open files is lower.
    #[arg(long, default_value_t = 10_000)]
    idle: usize,

    /// Seconds until the memory of idle agents and of idle connections is looked at; between two measures it is
    /// 0.3 of that. Too short and a measure pays for what the one before has left behind.
    #[arg(long, default_value_t = 1.0)]
    pause_seconds: f64,

    /// Hold agents, clients and server to these cores, as `0` or `0,1`.
    #[arg(long, value_name = "CORES")]
    pin: Option<String>,

    /// Also write the results there, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The parts that this executable plays when it has started itself.
#[derive(Debug, Subcommand)]
enum Role {
    /// The server in its pod.
    #[command(hide = true)]
    Serve,
    /// A client in its pod.
    #[command(hide = true)]
    Client(client::Order),
}

fn main() -> ExitCode {
    match part(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell if this fails.
            say(&format!("malla-bench: {error:#}")).ok();
            ExitCode::FAILURE
        }
    }
}

fn part(cli: &Cli) -> Result<()> {
    match &cli.role {
        Some(Role::Serve) => {
            world::many_descriptors()?;
            server::run()
        }
        Some(Role::Client(order)) => {
            world::many_descriptors()?;
            client::run(order)
        }
        None => bench(cli),
    }
}

fn bench(cli: &Cli) -> Result<()> {
    let interrupt = Interrupt::catch()?;
    if let Some(missing) = harness::missing(&["taskset", "prlimit", "nft"]) {
        bail!("{missing}");
    }
    let (rounds, mut plan) = plan(cli)?;
    plan.idle = plan.idle.min(world::most_idle()?);
    ensure!(rounds > 0 && plan.idle > 0, "nothing to measure: --rounds and --idle begin at 1");
    let machine = Machine::new(cli.pin.clone())?;
    say(&format!("{machine}. {}.", ports::SETTINGS))?;

    let mut results = Results::default();
    for place in Place::BOTH {
        let sides: Vec<_> =
            cli.sides.iter().copied().filter(|side| side.place() == place).collect();
        if sides.is_empty() {
            continue;
        }
        let mut world = World::new(place, cli.dial, &sides)?;
        let measured =
            measure(&mut world, &sides, rounds, (plan, &cli.only), &interrupt, &mut results);
        // Ctrl-C on a terminal has ended the clients too, and their error is not the reason.
        ensure!(!interrupt.came(), "interrupted");
        measured?;
    }
    let table = results.markdown();
    let has_same_node = cli.sides.iter().any(|side| side.place() == Place::SameNode);
    let conditions = format!(
        "{machine}. Rounds: {rounds}, of {} s a measure ({} s for new connections, {} idle \
         connections): median (least..most). {}.{}",
        plan.seconds,
        plan.connect_seconds,
        plan.idle,
        ports::SETTINGS,
        if has_same_node { cli.dial.told() } else { "" },
    );
    writeln!(stdout(), "{table}\n{conditions}").context("write the table")?;
    if let Some(path) = &cli.json {
        let text = serde_json::to_string_pretty(&results.json(&machine.json()))?;
        fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn plan(cli: &Cli) -> Result<(usize, Plan)> {
    let Cli { rounds, seconds, connect_seconds, idle, pause_seconds, .. } = *cli;
    let pause = Duration::try_from_secs_f64(pause_seconds).context("--pause-seconds")?;
    Ok(if cli.quick {
        (1, Plan { seconds: 0.5, connect_seconds: 2.0, idle: idle.min(200), pause })
    } else {
        (rounds, Plan { seconds, connect_seconds, idle, pause })
    })
}

fn measure(
    world: &mut World,
    sides: &[Side],
    rounds: usize,
    (plan, groups): (Plan, &[Group]),
    interrupt: &Interrupt,
    results: &mut Results,
) -> Result<()> {
    let mut sides = sides.to_vec();
    for round in 1..=rounds {
        for side in &sides {
            let started = Instant::now();
            let mut processes =
                world.take(*side).with_context(|| format!("set up {}", side.name()))?;
            // A server of its own for each side: none has connections left of the one before.
            let server = start_server(&|command| world.start_in_server(command))?;
            processes.push((Part::ServerProgram, server.pid()));
            let before = world.warm_up(*side)?;
            let opened = Round {
                client: &|command| {
                    ensure!(!interrupt.came(), "interrupted");
                    world.start_in_client(command)
                },
                server: world.server_address(),
                processes: &processes,
                carries: &|connections| world.carries(*side, connections),
                stages: &|| world.stages(*side),
                plan,
                groups,
                found: &mut |measure, value| results.add(*side, measure, value),
                opened: 0,
            }
            .measure()
            .with_context(|| format!("round {round} of {}", side.name()))?;
            if let Some(before) = before {
                world.went_direct(*side, before, opened)?;
            }
            drop(server);
            let took = started.elapsed().as_secs();
            say(&format!("round {round}/{rounds}: {} ({took} s)", side.name()))?;
        }
        // What one side leaves to the next (tracked connections, a warm machine) falls on each.
        sides.reverse();
    }
    Ok(())
}

/// Progress goes to standard error: standard output is the table and nothing else.
fn say(line: &str) -> Result<()> {
    writeln!(stderr(), "{line}").context("write to standard error")
}
