//! `mesh-agent check`: what this machine has, category by category, in the form of `linkerd check`.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;

use clap::Args;
use mesh_core::addr::Cidr;
use serde::ser::SerializeMap as _;
use serde::{Serialize, Serializer};

use super::output::{Format, print_data};
use super::{
    Admin, DEFAULT_BPFFS, DEFAULT_CGROUP, DEFAULT_KUBELET_CGROUP, DEFAULT_METRICS_ADDR,
    DEFAULT_READY_ADDR, DEFAULT_TUNNEL_PORT, Switch,
};

/// `mesh-agent check`. What `run` has too is called there as here, and has the same default.
#[derive(Clone, Debug, Args)]
pub struct Check {
    /// cgroup v2 directory that `run` would attach to. Where v1 is mounted, `unified` in it.
    #[arg(long, env = "MESH_CGROUP", value_name = "DIR", default_value = DEFAULT_CGROUP)]
    pub cgroup: PathBuf,

    /// Directory below a bpf file system that `run` would pin to.
    #[arg(long, env = "MESH_BPFFS", value_name = "DIR", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,

    /// TCP and UDP port where other agents would reach the one of this node.
    #[arg(long, env = "MESH_TUNNEL_PORT", value_name = "PORT", default_value = DEFAULT_TUNNEL_PORT)]
    pub tunnel_port: NonZeroU16,

    /// Where `run` would serve `/metrics`.
    #[arg(long, env = "MESH_METRICS_ADDR", value_name = "ADDR", default_value = DEFAULT_METRICS_ADDR)]
    pub metrics_addr: SocketAddr,

    /// Where `run` would serve `/healthz/ready` and `/healthz/live`.
    #[arg(long, env = "MESH_READY_ADDR", value_name = "ADDR", default_value = DEFAULT_READY_ADDR)]
    pub ready_addr: SocketAddr,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it as help")]
    pub admin: Admin,

    /// What the cgroup of the node's kubelet may be called.
    #[arg(
        long,
        env = "MESH_KUBELET_CGROUP",
        value_name = "NAME,...",
        value_delimiter = ',',
        default_value = DEFAULT_KUBELET_CGROUP
    )]
    pub kubelet_cgroup: Vec<String>,

    /// This node's name, to look in the Kubernetes API whether it says where its pods are. Without it nobody
    /// looks.
    #[arg(long, env = "MESH_NODE", value_name = "NAME")]
    pub node: Option<String>,

    /// Blocks of addresses that `run` would take for those of pods, where Nodes do not say so.
    #[arg(long, env = "MESH_POD_CIDRS", value_name = "LIST", value_delimiter = ',')]
    pub pod_cidrs: Vec<Cidr>,

    /// Warn of what `run --redirect-peer on` would skip.
    #[arg(long, env = "MESH_REDIRECT_PEER", value_enum, default_value_t)]
    pub redirect_peer: Switch,

    /// Directory of manifests that `run` would follow, to look for what it would not enforce. What only a
    /// cluster has is not looked for then.
    #[arg(long, env = "MESH_MANIFESTS", value_name = "DIR")]
    pub manifests: Option<PathBuf>,

    /// How to reach the Kubernetes API that `run` would follow [default: as a pod does].
    #[arg(long, env = "MESH_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// How to print the report.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Format,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Success,
    /// Works, but not as well as it could.
    Warning,
    /// The mesh cannot work like this.
    Error,
}

/// One check.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What is checked.
    pub description: String,
    /// How it ended.
    pub result: Verdict,
    /// What was found; empty if there is nothing to say.
    pub detail: String,
    /// What to do, if it did not succeed.
    pub hint: String,
}

/// In Linkerd's words, for whom what was found is an `error` unless it is as it should be.
impl Serialize for Finding {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let found = if self.result == Verdict::Success { "detail" } else { "error" };
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("description", &self.description)?;
        map.serialize_entry("result", &self.result)?;
        for (key, text) in [(found, &self.detail), ("hint", &self.hint)] {
            if !text.is_empty() {
                map.serialize_entry(key, text)?;
            }
        }
        map.end()
    }
}

/// Checks that belong together.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Category {
    /// Its title.
    pub category_name: &'static str,
    /// Its checks, in order.
    pub checks: Vec<Finding>,
}

/// All checks.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether no check ended with [`Verdict::Error`]; warnings do not count.
    pub success: bool,
    /// The categories, in order.
    pub categories: Vec<Category>,
}

impl Report {
    /// Sums up `categories`.
    pub fn new(categories: Vec<Category>) -> Self {
        let mut checks = categories.iter().flat_map(|category| &category.checks);
        let success = checks.all(|check| check.result != Verdict::Error);
        Self { success, categories }
    }

    /// Prints it.
    ///
    /// # Errors
    ///
    /// If `out` cannot be written.
    pub fn print(&self, out: &mut dyn Write, format: Format) -> io::Result<()> {
        match format {
            Format::Table => self.print_text(out),
            Format::Json | Format::Yaml => print_data(out, format, self),
        }
    }

    fn print_text(&self, out: &mut dyn Write) -> io::Result<()> {
        for category in &self.categories {
            let title = category.category_name;
            writeln!(out, "{title}\n{}", "-".repeat(title.chars().count()))?;
            for check in &category.checks {
                let mark = match check.result {
                    Verdict::Success => '√',
                    Verdict::Warning => '‼',
                    Verdict::Error => '×',
                };
                writeln!(out, "{mark} {}", check.description)?;
                if check.result != Verdict::Success {
                    for line in [&check.detail, &check.hint] {
                        if !line.is_empty() {
                            writeln!(out, "    {line}")?;
                        }
                    }
                }
            }
            writeln!(out)?;
        }
        writeln!(out, "Status check results are {}", if self.success { '√' } else { '×' })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(description: &str, result: Verdict, detail: &str, hint: &str) -> Finding {
        Finding {
            description: description.into(),
            result,
            detail: detail.into(),
            hint: hint.into(),
        }
    }

    fn report(last: Verdict) -> Report {
        Report::new(vec![Category {
            category_name: "kernel",
            checks: vec![
                finding("cgroup/connect4 (4.17)", Verdict::Success, "attached", ""),
                finding("sk_lookup (5.9)", last, "EINVAL", "use a kernel of 5.9 or later"),
            ],
        }])
    }

    fn text(report: &Report, format: Format) -> String {
        let mut out = Vec::new();
        report.print(&mut out, format).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn failure_shows_reason_and_remedy() {
        let expected = "\
kernel
------
√ cgroup/connect4 (4.17)
× sk_lookup (5.9)
    EINVAL
    use a kernel of 5.9 or later

Status check results are ×
";
        assert_eq!(text(&report(Verdict::Error), Format::Table), expected);
    }

    #[test]
    fn warning_does_not_change_the_result() {
        assert!(report(Verdict::Warning).success);
        assert!(!report(Verdict::Error).success);
    }

    #[test]
    fn json_has_the_keys_of_linkerd() {
        let json: serde_json::Value =
            serde_json::from_str(&text(&report(Verdict::Warning), Format::Json)).unwrap();
        assert_eq!(json["success"], true);
        assert_eq!(json["categories"][0]["categoryName"], "kernel");
        assert_eq!(json["categories"][0]["checks"][0]["result"], "success");
        assert_eq!(json["categories"][0]["checks"][1]["result"], "warning");
        assert_eq!(json["categories"][0]["checks"][0]["detail"], "attached");
        assert_eq!(json["categories"][0]["checks"][1]["hint"], "use a kernel of 5.9 or later");
        assert_eq!(json["categories"][0]["checks"][1]["error"], "EINVAL");
    }
}
