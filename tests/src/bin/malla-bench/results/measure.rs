//! What is measured, and on which side.

use clap::ValueEnum;

use crate::stages::Stage;
use crate::usage::Part;

/// What carries the bytes between the two pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Side {
    /// TCP as without a mesh: no agent runs and no program is attached.
    Plain,
    /// Two hops of user space, one on each node, that copy and do nothing else: a yardstick.
    Hops,
    /// The mesh over lanes.
    Lane,
    /// The mesh over QUIC.
    Quic,
    /// As plain, on the same node.
    Near,
    /// The mesh on the same node: from pod to pod, without the agent.
    Direct,
    /// As direct, with `--redirect-peer on`: past the node's netfilter.
    Redirect,
}

/// Where the two pods are. What is compared with each other is of one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// On two nodes.
    Across,
    /// On one.
    SameNode,
}

impl Place {
    /// Both, in the order of the tables.
    pub(crate) const BOTH: [Self; 2] = [Self::Across, Self::SameNode];

    /// The side that others are compared with.
    pub(super) fn baseline(self) -> Side {
        match self {
            Self::Across => Side::Plain,
            Self::SameNode => Side::Near,
        }
    }
}

impl Side {
    /// Its name, of a carrier also the agent's value of `--carrier`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Hops => "hops",
            Self::Lane => "lane",
            Self::Quic => "quic",
            Self::Near => "near",
            Self::Direct => "direct",
            Self::Redirect => "redirect",
        }
    }

    /// Where its pods are.
    pub(crate) fn place(self) -> Place {
        match self {
            Self::Plain | Self::Hops | Self::Lane | Self::Quic => Place::Across,
            Self::Near | Self::Direct | Self::Redirect => Place::SameNode,
        }
    }

    /// Whether agents run.
    pub(crate) fn is_mesh(self) -> bool {
        !matches!(self, Self::Plain | Self::Hops | Self::Near)
    }

    /// Whether the kernel connects pod to pod, and no agent carries a byte.
    pub(crate) fn is_direct(self) -> bool {
        matches!(self, Self::Direct | Self::Redirect)
    }

    /// Its side in the JSON, and what the names of its measures begin with: whoever reads `plain`
    /// there finds plain TCP, and in no row that of another place.
    pub(super) fn in_json(self) -> (&'static str, &'static str) {
        match self {
            Self::Plain | Self::Hops | Self::Lane | Self::Quic => (self.name(), ""),
            Self::Near => (Self::Plain.name(), "same_node_"),
            Self::Direct | Self::Redirect => (self.name(), "same_node_"),
        }
    }
}

/// Everything that is measured, in the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Measure {
    P50Of1,
    P99Of1,
    RateOf1,
    P50Of16,
    P99Of16,
    RateOf16,
    P50Of64,
    P99Of64,
    RateOf64,
    Bulk1,
    CpuPerGb1(Part),
    Bulk8,
    CpuPerGb8(Part),
    BesideP50,
    BesideP99,
    BesideBulk,
    NewBy1,
    NewDecayBy1,
    CpuPerNew(Part),
    MeanOf(Stage),
    NewBy16,
    NewDecayBy16,
    NewFailed,
    RssIdle,
    RssPerIdleClient,
    RssPerIdleServer,
    RssPerIdleNode,
}

use Measure::{
    BesideBulk, BesideP50, BesideP99, Bulk1, Bulk8, CpuPerGb1, CpuPerGb8, CpuPerNew, MeanOf,
    NewBy1, NewBy16, NewDecayBy1, NewDecayBy16, NewFailed, P50Of1, P50Of16, P50Of64, P99Of1,
    P99Of16, P99Of64, RateOf1, RateOf16, RateOf64, RssIdle, RssPerIdleClient, RssPerIdleNode,
    RssPerIdleServer,
};

impl Measure {
    /// Its name in the JSON, what the table calls it, and the unit. Names are an interface.
    pub(crate) fn spec(self) -> (String, &'static str, &'static str) {
        let (name, label, unit) = self.of_the_whole();
        match self {
            // The whole machine's row comes first, and says of what.
            CpuPerGb1(part) | CpuPerGb8(part) | CpuPerNew(part) if part != Part::Machine => {
                let (suffix, label) = part.spec();
                (format!("{name}_{suffix}"), label, unit)
            }
            _ => (name.to_owned(), label, unit),
        }
    }

    /// The same, of the CPU of a part that of the whole machine.
    fn of_the_whole(self) -> (&'static str, &'static str, &'static str) {
        match self {
            P50Of1 => ("p50_64b", "64 B exchange, 1 connection: p50", "us"),
            P99Of1 => ("p99_64b", "64 B exchange, 1 connection: p99", "us"),
            RateOf1 => ("rate_1", "64 B exchanges, 1 connection", "1/s"),
            P50Of16 => ("p50_64b_16", "64 B exchange, 16 connections: p50", "us"),
            P99Of16 => ("p99_64b_16", "64 B exchange, 16 connections: p99", "us"),
            RateOf16 => ("rate_16", "64 B exchanges, 16 connections", "1/s"),
            P50Of64 => ("p50_64b_64", "64 B exchange, 64 connections: p50", "us"),
            P99Of64 => ("p99_64b_64", "64 B exchange, 64 connections: p99", "us"),
            RateOf64 => ("rate_64", "64 B exchanges, 64 connections", "1/s"),
            Bulk1 => ("bulk_1", "throughput, 1 connection", "Gbit/s"),
            CpuPerGb1(_) => ("cpu_per_gb", "CPU, 1 connection: whole machine", "s/GB"),
            Bulk8 => ("bulk_8", "throughput, 8 connections", "Gbit/s"),
            CpuPerGb8(_) => ("cpu_per_gb_8", "CPU, 8 connections: whole machine", "s/GB"),
            BesideP50 => ("small_beside_bulk_ms", "64 B exchange beside 8 bulk flows: p50", "ms"),
            BesideP99 => {
                ("small_beside_bulk_p99_ms", "64 B exchange beside 8 bulk flows: p99", "ms")
            }
            BesideBulk => ("bulk_beside_small", "... those bulk flows", "Gbit/s"),
            NewBy1 => ("new_conns_1", "new connections, 1 client", "1/s"),
            NewDecayBy1 => ("new_conns_1_decay", "... last quarter \u{f7} first", "x"),
            CpuPerNew(_) => ("cpu_per_conn_us", "CPU per new connection: whole machine", "us"),
            MeanOf(stage) => {
                let (name, label) = stage.spec();
                (name, label, "us")
            }
            NewBy16 => ("new_conns_16", "new connections, 16 clients", "1/s"),
            NewDecayBy16 => ("new_conns_16_decay", "... last quarter \u{f7} first", "x"),
            NewFailed => ("new_conns_failed", "... that failed, 1 and 16 clients", "count"),
            RssIdle => ("rss_idle_mb", "agent's memory, idle", "MB"),
            RssPerIdleClient => {
                ("rss_per_idle_conn_kb_client", "... per idle connection, client's agent", "KB")
            }
            RssPerIdleServer => {
                ("rss_per_idle_conn_kb_server", "... per idle connection, server's agent", "KB")
            }
            RssPerIdleNode => {
                ("rss_per_idle_conn_kb_node", "... per idle connection, the node's agent", "KB")
            }
        }
    }
}
