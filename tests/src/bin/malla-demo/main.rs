//! Shows the mesh at work on one machine: two nodes with an agent each, an application of four
//! services over both, first without the mesh, then with it, nothing restarted in between.
//!
//! What it claims, it shows: who talked to whom as whom (from the agents' records), how long people
//! waited with and without, and what somebody who taps the link between the nodes can read. It
//! fails when a claim does not hold.

mod load;
mod report;
mod shop;
mod story;
mod text;
mod wire;

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use harness::{Carrier, Interrupt, wait};

use load::Load;
use report::Act;
use shop::{NODES, Shop};
use story::Story;
use wire::Tap;

/// Shows the mesh at work: two nodes, four services, with the mesh and without.
#[derive(Debug, Parser)]
#[command(name = "malla-demo", disable_version_flag = true)]
struct Cli {
    /// What carries the bytes between the nodes.
    #[arg(long, value_enum, default_value_t)]
    carrier: Carry,

    /// Seconds of load, half of them without the mesh.
    #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u64).range(2..=3600))]
    duration: u64,

    /// Leave everything running until Ctrl-C, and print commands to look further.
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Carry {
    /// The agents choose.
    #[default]
    Auto,
    /// TLS over TCP.
    Lane,
    /// QUIC.
    Quic,
}

impl From<Carry> for Carrier {
    fn from(carry: Carry) -> Self {
        match carry {
            Carry::Auto => Self::Auto,
            Carry::Lane => Self::Lane,
            Carry::Quic => Self::Quic,
        }
    }
}

fn main() -> ExitCode {
    match demo(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell if this fails.
            writeln!(io::stderr(), "malla-demo: {error:#}").ok();
            ExitCode::FAILURE
        }
    }
}

fn demo(cli: &Cli) -> Result<()> {
    let interrupt = Interrupt::catch()?;
    if let Some(missing) = harness::missing(&["tcpdump", "nft"]) {
        bail!("{missing}");
    }
    let time = Duration::from_secs(cli.duration) / 2;
    let marker = marker();

    say("starting two nodes, their agents and the shop")?;
    let shop = Shop::open(cli.carrier.into(), &interrupt)?;
    print(&report::stage(&shop))?;

    say(&format!("{} s of load without the mesh", time.as_secs_f32()))?;
    let plain = act(&shop, &marker, time, &interrupt)?;
    say("annotating the namespace with malla.dev/mesh: enabled; nothing is restarted")?;
    shop.enrol()?;
    say(&format!("{} s of load with the mesh", time.as_secs_f32()))?;
    let meshed = act(&shop, &marker, time, &interrupt)?;

    let story = story(&shop, &meshed.load)?;
    print(&report::outcome(&shop, &story, &plain, &meshed, &marker)?)?;
    let promises = report::promises(&story, &plain, &meshed);
    print(&report::verdict(&promises))?;
    if cli.keep {
        keep(&shop, &marker, &interrupt)?;
    } else {
        print("\nLook further: cargo xtask demo --keep\n")?;
    }
    ensure!(report::all_kept(&promises), "a promise was not kept: see what was shown, above");
    Ok(())
}

/// Load for `time`, with the link between the nodes tapped.
fn act(shop: &Shop, marker: &str, time: Duration, interrupt: &Interrupt) -> Result<Act> {
    let tap = Tap::start(|command| shop.on_first_node(command), &shop.link(), marker)?;
    let load = shop.as_people(|| load::run(shop.page(), marker, time, || interrupt.came()))?;
    // Ctrl-C on a terminal has ended `tcpdump` too.
    ensure!(!interrupt.came(), "interrupted");
    let seen = tap.stop()?;
    Ok(Act { load, seen })
}

/// What the agents recorded, once they have written of every page at least.
fn story(shop: &Shop, load: &Load) -> Result<Story> {
    let read = || {
        let mut story = Story::default();
        for node in NODES {
            for record in shop.mesh().agent(node).access_log() {
                story.add(&record);
            }
        }
        story
    };
    // A page is four connections or three (no stars); a record may come a moment after its end.
    let expected = load.pages as u64 * 3;
    wait::until_some(wait::SOON, "the agents' records of the load", || {
        Some(read()).filter(|story| story.connections().0 >= expected)
    })
    .with_context(|| format!("{} pages were served", load.pages))
}

/// Says how to look, and keeps a light load going so that there is something to see.
fn keep(shop: &Shop, marker: &str, interrupt: &Interrupt) -> Result<()> {
    print(&report::look_further(shop)?)?;
    say("running until Ctrl-C")?;
    let forever = Duration::MAX;
    shop.as_people(|| load::run(shop.page(), marker, forever, || interrupt.came()))?;
    say("cleaning up")
}

/// Something that occurs nowhere else.
fn marker() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("malla-marker-{:x}", since.as_nanos())
}

fn say(line: &str) -> Result<()> {
    print(&format!("==> {line}\n"))
}

fn print(text: &str) -> Result<()> {
    let mut out = io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("write to standard output")
}
