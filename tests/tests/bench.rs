//! The bench, for real and as short as it goes: every figure that it promises is there, in the table and in the
//! JSON. How large they are, nobody asks here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::{env, fs, process};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

/// What `--redirect-peer on` is done with.
const TCX: (&str, (u32, u32)) = ("TCX", (6, 6));

/// Without `quic`, which differs from `lane` by a flag of the agents and takes as long again.
const SIDES: &str = "plain,hops,lane,near,direct,redirect";

/// The `ratios` of the JSON, which is an interface; all of them are of these sides.
const RATIOS: [&str; 13] = [
    "bulk_1",
    "cpu_per_gb",
    "direct_bulk_1",
    "direct_new_conns_1",
    "direct_p50_64b",
    "new_conns_1",
    "p50_64b",
    "rate_64",
    "redirect_peer_bulk_1",
    "redirect_peer_p50_64b",
    "rss_idle_mb",
    "rss_per_idle_conn_kb",
    "small_beside_bulk_ms",
];

/// What is counted by process.
const CPU: [&str; 3] = ["cpu_per_gb", "cpu_per_gb_8", "cpu_per_conn_us"];

/// Who may be counted, beside the whole machine.
const PARTS: [&str; 6] =
    ["client_program", "server_program", "hops", "client_agent", "server_agent", "node_agent"];

/// A side as the JSON has it: what its measures begin with, its name, who carries it or decides about it,
/// and the ends of the names of what an idle connection takes there.
type Counted = (&'static str, &'static str, &'static [&'static str], &'static [&'static str]);

const COUNTED: [Counted; 6] = [
    ("", "plain", &[], &[]),
    ("", "hops", &["hops"], &[]),
    ("", "lane", &["client_agent", "server_agent"], &["client", "server"]),
    ("same_node_", "plain", &[], &[]),
    ("same_node_", "direct", &["node_agent"], &["node"]),
    ("same_node_", "redirect", &["node_agent"], &["node"]),
];

/// The JSON, as it is documented and nothing else.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Told {
    machine: BTreeMap<String, Value>,
    rows: Vec<Row>,
    ratios: BTreeMap<String, Option<f64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    measure: String,
    side: String,
    unit: String,
    median: f64,
    min: f64,
    max: f64,
    runs: u64,
}

impl Told {
    fn row(&self, measure: &str, side: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.measure == measure && row.side == side)
    }
}

/// Where the bench leaves its JSON, removed when dropped.
struct File(PathBuf);

impl Drop for File {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

/// Runs it: what it printed, and what it wrote.
fn bench() -> Result<(String, Told)> {
    let file = File(env::temp_dir().join(format!("malla-{}-bench.json", process::id())));
    let mut command = Command::new(env!("CARGO_BIN_EXE_malla-bench"));
    command.args(["--rounds", "1", "--seconds", "0.1", "--connect-seconds", "0.2"]);
    // So many that what they take of an agent is more than what moves there anyway.
    command.args(["--pause-seconds", "0.1", "--idle", "400", "--sides", SIDES]);
    command.arg("--json").arg(&file.0);
    let output = command.stdin(Stdio::null()).output().context("start the bench")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}:\n{said}", output.status);
    let printed = String::from_utf8(output.stdout).context("what it printed")?;
    let written = fs::read(&file.0).context("read the JSON")?;
    let told: Told = serde_json::from_slice(&written)
        .with_context(|| String::from_utf8_lossy(&written).into_owned())?;
    Ok((printed, told))
}

#[test]
fn bench_measures_every_side_and_tells_it_as_tables_and_as_json() -> Result<()> {
    harness::require!("taskset", "prlimit", "nft");
    harness::require_kernel!(TCX);
    let (printed, told) = bench()?;
    for key in ["kernel", "processor", "cores", "pinned"] {
        assert!(told.machine.contains_key(key), "{key} of the machine: {told:?}");
    }
    rows_are_medians_of_one_run(&told)?;
    ratios_are_figures(&told)?;
    each_process_is_counted(&told)?;
    both_tables_are_whole(&printed)
}

fn rows_are_medians_of_one_run(told: &Told) -> Result<()> {
    let mut seen = BTreeSet::new();
    for row in &told.rows {
        let is_ordered = row.min <= row.median && row.median <= row.max;
        ensure!(is_ordered && row.runs == 1 && !row.unit.is_empty(), "{row:?}");
        ensure!(seen.insert((&row.measure, &row.side)), "twice: {row:?}");
    }
    for (prefix, side, ..) in COUNTED {
        let failed = told.row(&format!("{prefix}new_conns_failed"), side);
        let failed = failed.with_context(|| format!("{prefix}{side}: no new connections"))?;
        ensure!(failed.median == 0.0, "{failed:?}");
        for measure in ["p50_64b", "rate_64", "bulk_1", "bulk_8", "new_conns_1", "new_conns_16"] {
            let row = told.row(&format!("{prefix}{measure}"), side);
            let row = row.with_context(|| format!("{prefix}{side}: no {measure}"))?;
            ensure!(row.median > 0.0, "{row:?}");
        }
    }
    Ok(())
}

fn ratios_are_figures(told: &Told) -> Result<()> {
    let keys: Vec<_> = told.ratios.keys().map(String::as_str).collect();
    ensure!(keys == RATIOS, "{keys:?}");
    for (key, ratio) in &told.ratios {
        let is_figure = ratio.is_some_and(|ratio| ratio.is_finite() && ratio > 0.0);
        ensure!(is_figure, "{key} is {ratio:?}");
    }
    Ok(())
}

fn each_process_is_counted(told: &Told) -> Result<()> {
    for (prefix, side, carriers, idle) in COUNTED {
        for cpu in CPU {
            ensure!(told.row(&format!("{prefix}{cpu}"), side).is_some(), "{prefix}{side}: {cpu}");
            for part in PARTS {
                let is_there = told.row(&format!("{prefix}{cpu}_{part}"), side).is_some();
                let is_due = part.ends_with("_program") || carriers.contains(&part);
                ensure!(is_there == is_due, "{prefix}{side}: {cpu} of {part}: {is_there}");
            }
        }
        for end in ["client", "server", "node"] {
            let measure = format!("{prefix}rss_per_idle_conn_kb_{end}");
            let is_there = told.row(&measure, side).is_some();
            ensure!(is_there == idle.contains(&end), "{prefix}{side}: {measure}: {is_there}");
        }
        let agent = told.row(&format!("{prefix}rss_idle_mb"), side);
        ensure!(agent.is_some() != idle.is_empty(), "{prefix}{side}: {agent:?}");
    }
    Ok(())
}

fn both_tables_are_whole(printed: &str) -> Result<()> {
    let (across, rest) = printed.split_once("\nSame node\n\n").context("one table")?;
    let (same_node, conditions) = rest.split_once("\n\n").context("no conditions")?;
    for (table, sides) in [(across, "plain | hops | lane"), (same_node, "near | direct | redirect")]
    {
        let head = table.lines().next().unwrap_or_default();
        ensure!(head.starts_with(&format!("| measure | unit | {sides} |")), "{printed}");
        let columns = |line: &str| line.matches('|').count();
        ensure!(table.lines().all(|line| columns(line) == columns(head)), "{printed}");
        for label in
            ["... client's program |", "... server's program |", "new connections, 1 client"]
        {
            ensure!(table.contains(label), "no {label}: {printed}");
        }
    }
    ensure!(conditions.contains("Rounds: 1, of 0.1 s a measure"), "{conditions}");
    Ok(())
}
