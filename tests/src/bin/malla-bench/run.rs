//! One round of one side: starts the clients, one kind of work after the other, and accounts what
//! the machine and each process used meanwhile.

use std::io::{BufRead as _, BufReader};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use crate::client::{Order, Outcome, Work};
use crate::results::Measure;
use crate::server;
use crate::stages::Taken;
use crate::usage::{Part, Used, resident_kib};

/// The bulk flows of [`Work::Beside`], and of the second throughput.
const BULK_FLOWS: usize = 8;

/// A group of measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Group {
    /// Resident memory of the agents, idle and by idle connection.
    Memory,
    /// Small exchanges over 1, 16 and 64 connections.
    Exchange,
    /// Throughput and CPU of 1 and 8 connections.
    Bulk,
    /// A small exchange beside bulk.
    Beside,
    /// New connections by 1 and 16 clients.
    Connect,
}

/// How long and how much.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Plan {
    /// Of each measure but new connections.
    pub(crate) seconds: f64,
    /// Of new connections, once by 1 client and once by 16.
    pub(crate) connect_seconds: f64,
    /// Connections held open.
    pub(crate) idle: usize,
    /// From the last exchange until an agent's memory is that of an idle one.
    pub(crate) pause: Duration,
}

impl Plan {
    fn cool_down(&self) {
        thread::sleep(self.pause);
    }

    /// Between two kinds of work: what the first one left behind (closing connections) settles.
    fn settle(&self) {
        thread::sleep(self.pause.mul_f64(0.3));
    }
}

/// Starts a process in a pod.
pub(crate) type Place<'a> = &'a dyn Fn(&mut Command) -> Result<Child>;

/// This executable: it plays all the parts, so that each is a process with its own account.
fn ourselves() -> Result<Command> {
    Ok(Command::new(env::current_exe().context("find this executable")?))
}

/// A process of ours in a pod that lives until its standard input ends.
#[derive(Debug)]
pub(crate) struct Held {
    child: Child,
}

impl Held {
    /// Starts `command` and waits for its first line.
    ///
    /// # Errors
    ///
    /// Fails when it ends without one.
    pub(crate) fn start(place: Place<'_>, command: &mut Command) -> Result<(Self, String)> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // From here on the process ends with `held`, whatever fails.
        let mut held = Self { child: place(command)? };
        let out = held.child.stdout.take().context("no pipe from the process")?;
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        ensure!(!line.is_empty(), "{command:?} ended: its reason is above");
        Ok((held, line.trim_end().to_owned()))
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // The end of its input ends it; a process that is gone already needs neither.
        drop(self.child.stdin.take());
        self.child.wait().ok();
    }
}

/// Starts the server in its pod.
///
/// # Errors
///
/// Fails when it does not come up.
pub(crate) fn start_server(place: Place<'_>) -> Result<Held> {
    let (held, line) = Held::start(place, ourselves()?.arg("serve"))?;
    ensure!(line == server::READY, "the server said {line:?}");
    Ok(held)
}

/// One round of one side.
pub(crate) struct Round<'a> {
    /// The client's pod.
    pub(crate) client: Place<'a>,
    /// The server's pod.
    pub(crate) server: IpAddr,
    /// Whose CPU is counted beside the machine's and the clients', and whose memory if they are agents.
    pub(crate) processes: &'a [(Part, u32)],
    /// Fails unless so many connections are open and carried as this side is to carry them.
    pub(crate) carries: &'a dyn Fn(usize) -> Result<()>,
    /// What the stages of the agents have taken until now, `None` where no agent carries.
    pub(crate) stages: &'a dyn Fn() -> Result<Option<Taken>>,
    /// How long and how much.
    pub(crate) plan: Plan,
    /// What is measured.
    pub(crate) groups: &'a [Group],
    /// Takes what is measured.
    pub(crate) found: &'a mut dyn FnMut(Measure, f64),
    /// Connections that clients opened.
    pub(crate) opened: u64,
}

impl Round<'_> {
    /// Measures what is wanted once, and says how many connections clients opened for it. Memory
    /// first, while the agents are fresh.
    ///
    /// # Errors
    ///
    /// Fails when a client does, other than by new connections that fail: those are counted.
    pub(crate) fn measure(mut self) -> Result<u64> {
        let wanted = |group| self.groups.contains(&group);
        let [memory, exchange, bulk, beside, connect] =
            [Group::Memory, Group::Exchange, Group::Bulk, Group::Beside, Group::Connect]
                .map(wanted);
        if memory {
            self.memory()?;
        }
        if exchange {
            self.exchanges()?;
        }
        if bulk {
            self.bulk(1, Measure::Bulk1, Measure::CpuPerGb1)?;
            self.bulk(BULK_FLOWS, Measure::Bulk8, Measure::CpuPerGb8)?;
        }
        if beside {
            let (beside, _) = self.work(Work::Beside, BULK_FLOWS, self.plan.seconds)?;
            (self.found)(Measure::BesideP50, beside.p50_us / 1e3);
            (self.found)(Measure::BesideP99, beside.p99_us / 1e3);
            (self.found)(Measure::BesideBulk, beside.gbit_per_s());
        }
        if connect {
            self.new_connections()?;
        }
        Ok(self.opened)
    }

    /// Nothing where no agent runs.
    fn memory(&mut self) -> Result<()> {
        let agents = self.processes.iter().filter_map(|(part, pid)| Some((per_idle(*part)?, *pid)));
        let agents: Vec<_> = agents.collect();
        if agents.is_empty() {
            return Ok(());
        }
        // One exchange, so that an idle agent is one that has worked.
        self.work(Work::Exchange, 1, 0.1)?;
        self.plan.cool_down();
        let resident =
            || agents.iter().map(|(_, pid)| resident_kib(*pid)).collect::<Result<Vec<_>>>();
        let before = resident()?;
        let most = before.iter().copied().fold(0.0, f64::max);
        (self.found)(Measure::RssIdle, most * 1024.0 / 1e6);

        let idle = self.plan.idle;
        let (held, line) = Held::start(self.client, &mut self.order(Work::Hold, idle, 0.0)?)?;
        let outcome: Outcome = serde_json::from_str(&line).context("read what is held")?;
        ensure!(outcome.count == idle as u64, "{} connections are held", outcome.count);
        self.opened += opened(Work::Hold, idle, &outcome);
        (self.carries)(idle)?;
        self.plan.cool_down();
        let now = resident()?;
        drop(held);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53 connections")]
        let each = |grown_kib: f64| grown_kib * 1.024 / idle as f64;
        for (((measure, _), now_kib), before_kib) in agents.iter().zip(now).zip(before) {
            (self.found)(*measure, each(now_kib - before_kib));
        }
        self.plan.settle();
        Ok(())
    }

    fn exchanges(&mut self) -> Result<()> {
        for (connections, p50, p99, rate) in [
            (1, Measure::P50Of1, Measure::P99Of1, Measure::RateOf1),
            (16, Measure::P50Of16, Measure::P99Of16, Measure::RateOf16),
            (64, Measure::P50Of64, Measure::P99Of64, Measure::RateOf64),
        ] {
            let (outcome, _) = self.work(Work::Exchange, connections, self.plan.seconds)?;
            (self.found)(p50, outcome.p50_us);
            (self.found)(p99, outcome.p99_us);
            (self.found)(rate, outcome.rate);
        }
        Ok(())
    }

    fn bulk(
        &mut self,
        flows: usize,
        throughput: Measure,
        cpu_per_gb: fn(Part) -> Measure,
    ) -> Result<()> {
        let (outcome, used) = self.work(Work::Bulk, flows, self.plan.seconds)?;
        (self.found)(throughput, outcome.gbit_per_s());
        for (part, used_s) in used.by_part() {
            (self.found)(cpu_per_gb(part), used_s / outcome.gigabytes());
        }
        Ok(())
    }

    fn new_connections(&mut self) -> Result<()> {
        let before = (self.stages)()?;
        let (one, used) = self.work(Work::Connect, 1, self.plan.connect_seconds)?;
        if let Some((before, now)) = before.zip((self.stages)()?) {
            for (stage, mean_us) in now.means_us_since(before) {
                (self.found)(Measure::MeanOf(stage), mean_us);
            }
        }
        (self.found)(Measure::NewBy1, one.rate);
        (self.found)(Measure::NewDecayBy1, one.decay);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53 connections")]
        let each_us = |used_s: f64| used_s * 1e6 / one.count.max(1) as f64;
        for (part, used_s) in used.by_part() {
            (self.found)(Measure::CpuPerNew(part), each_us(used_s));
        }
        let (many, _) = self.work(Work::Connect, 16, self.plan.connect_seconds)?;
        (self.found)(Measure::NewBy16, many.rate);
        (self.found)(Measure::NewDecayBy16, many.decay);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53 connections")]
        let failed = (one.errors + many.errors) as f64;
        (self.found)(Measure::NewFailed, failed);
        Ok(())
    }

    /// Runs a client to its end: what came of it, and what the machine and each process used meanwhile.
    fn work(&mut self, work: Work, connections: usize, seconds: f64) -> Result<(Outcome, Used)> {
        let mut command = self.order(work, connections, seconds)?;
        let before = Used::so_far(self.processes)?;
        let client = (self.client)(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        let done = client.wait_with_output().context("wait for a client")?;
        let used = Used::so_far(self.processes)?.since(&before);
        ensure!(done.status.success(), "{work:?} over {connections}: the reason is above");
        let outcome: Outcome =
            serde_json::from_slice(&done.stdout).context("read a client's outcome")?;
        self.opened += opened(work, connections, &outcome);
        self.plan.settle();
        let used = used.with(Part::ClientProgram, outcome.cpu_s);
        Ok((outcome, used))
    }

    fn order(&self, work: Work, connections: usize, seconds: f64) -> Result<Command> {
        let order = Order { work, server: self.server, connections, seconds };
        let mut command = ourselves()?;
        command.args(order.args());
        Ok(command)
    }
}

/// What the memory that a connection takes of an agent is called; `None` of what is no agent.
fn per_idle(part: Part) -> Option<Measure> {
    match part {
        Part::ClientAgent => Some(Measure::RssPerIdleClient),
        Part::ServerAgent => Some(Measure::RssPerIdleServer),
        Part::NodeAgent => Some(Measure::RssPerIdleNode),
        Part::Machine | Part::ClientProgram | Part::ServerProgram | Part::Hops => None,
    }
}

/// Connections that a client opened; of those that it opens one after the other the ones that
/// worked.
fn opened(work: Work, connections: usize, outcome: &Outcome) -> u64 {
    match work {
        Work::Bulk | Work::Exchange | Work::Hold => connections as u64,
        Work::Beside => connections as u64 + 1,
        Work::Connect => outcome.count,
    }
}

impl Order {
    /// The arguments that [`crate::Role::Client`] reads back into this.
    pub(crate) fn args(&self) -> [String; 8] {
        let work = self.work.to_possible_value().map(|name| name.get_name().to_owned());
        [
            "client".to_owned(),
            work.unwrap_or_default(),
            "--server".to_owned(),
            self.server.to_string(),
            "--connections".to_owned(),
            self.connections.to_string(),
            "--seconds".to_owned(),
            self.seconds.to_string(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::{Cli, Role};

    #[test]
    fn a_client_reads_its_order_as_it_was_given() {
        for work in Work::value_variants() {
            let server = "fd00::1".parse().unwrap();
            let given = Order { work: *work, server, connections: 16, seconds: 1.5 };
            let read = Cli::parse_from([&["malla-bench".to_owned()], &given.args()[..]].concat());
            let Some(Role::Client(read)) = read.role else { panic!("{:?}", read.role) };
            assert_eq!((read.work, read.server), (given.work, given.server));
            assert_eq!((read.connections, read.seconds), (16, 1.5));
        }
    }

    #[test]
    fn every_connection_of_a_client_is_counted() {
        let outcome = Outcome { count: 500, ..Outcome::default() };
        assert_eq!(opened(Work::Exchange, 16, &outcome), 16, "exchanges are no connections");
        assert_eq!(opened(Work::Beside, 8, &outcome), 9);
        assert_eq!(opened(Work::Connect, 16, &outcome), 500);
    }

    #[test]
    fn a_process_without_a_first_line_is_an_error_and_is_reaped() {
        let here = |command: &mut Command| Ok(command.spawn()?);
        assert!(Held::start(&here, &mut Command::new("true")).is_err());
        let mut lasting = Command::new("sh");
        lasting.args(["-c", "echo here; cat >/dev/null"]);
        let (held, line) = Held::start(&here, &mut lasting).unwrap();
        assert_eq!(line, "here");
        assert!(std::path::Path::new(&format!("/proc/{}/stat", held.pid())).exists());
        drop(held);
    }
}
