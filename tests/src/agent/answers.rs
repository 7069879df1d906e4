//! What an agent says of itself: probes, metrics, the command line, logs.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Agent, binary};
use crate::access_log::Record;
use crate::metrics::Metrics;
use crate::pod::Pod;
use crate::wait;

/// `--metrics-addr` and `--ready-addr` as they are if nothing is said.
const METRICS_PORT: u16 = 15020;
const READY_PORT: u16 = 15021;

const HTTP_LIMIT: Duration = Duration::from_secs(5);

/// What one call of the command line printed.
#[derive(Clone, Debug)]
pub struct Cli {
    /// The exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Agent {
    /// Whether `/healthz/ready` says so.
    pub fn is_ready(&self) -> bool {
        self.http(READY_PORT, "/healthz/ready").is_ok_and(|(status, _)| status == 200)
    }

    /// One scrape, of now: an agent answers from one text for a while, and each that it makes is another one, if
    /// only by the age of its snapshot.
    ///
    /// # Errors
    ///
    /// Fails if nothing answers.
    pub fn metrics(&self) -> Result<Metrics> {
        let mut last = self.last_metrics.lock().unwrap_or_else(PoisonError::into_inner);
        let (status, text) = wait::until_some(wait::SOON, "other metrics than the last", || {
            let answer = self.http(METRICS_PORT, "/metrics");
            let is_the_last = answer.as_ref().is_ok_and(|(_status, text)| *text == *last);
            (!is_the_last).then_some(answer)
        })??;
        ensure!(status == 200, "/metrics: {status}");
        let metrics = Metrics::parse(&text);
        *last = text;
        Ok(metrics)
    }

    /// The sum of the series of a family that carry these labels, now.
    ///
    /// # Errors
    ///
    /// Fails if nothing answers.
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(self.metrics()?.sum(name, labels))
    }

    /// Waits until the sum of these series is `value` or more.
    ///
    /// # Errors
    ///
    /// Fails, and says what it is, if that takes too long.
    pub fn wait_for_metric(&self, name: &str, labels: &[(&str, &str)], value: f64) -> Result<()> {
        let mut last = 0.0;
        wait::until(wait::SOON, "", || {
            last = self.metric(name, labels).unwrap_or_default();
            last >= value
        })
        .with_context(|| format!("{name} {labels:?} of node {} is {last}, not {value}", self.node))
    }

    /// An answer of one of the agent's HTTP ports: status and body.
    ///
    /// # Errors
    ///
    /// Fails if nothing answers.
    pub fn http(&self, port: u16, path: &str) -> Result<(u16, String)> {
        let addr = (Ipv4Addr::LOCALHOST, port).into();
        let stream = self.netns.run(|| Ok(TcpStream::connect_timeout(&addr, HTTP_LIMIT)?))?;
        http_get(stream, path)
    }

    /// Runs `mesh-agent <args>` against this agent.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be run; what it answers is the caller's to judge.
    pub fn cli(&self, args: &[&str]) -> Result<Cli> {
        self.cli_by(Command::new(binary()?), args)
    }

    /// The same in a container of a node that is a process namespace of its own, so that process 1 is the node's. The
    /// container's own files are these and read-only, and it has each first one of `mounts`, a directory of the node,
    /// mounted at the second one.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be run.
    pub fn cli_in_container(
        &self,
        files: &Path,
        mounts: [(&Path, &Path); 2],
        args: &[&str],
    ) -> Result<Cli> {
        const NODE: &str = r#"unshare --mount -- sh -c "$0" "$@"; exit $?"#;
        const CONTAINER: &str = r#"
            mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" &&
            mount --bind "$1" "$2" && mount --bind "$3" "$4" && shift 4 && exec "$@""#;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
        command.args(["sh", "-c", NODE, CONTAINER]).arg(files);
        command.args(mounts.iter().flat_map(|(from, to)| [from, to])).arg(binary()?);
        self.cli_by(command, args)
    }

    fn cli_by(&self, mut command: Command, args: &[&str]) -> Result<Cli> {
        command.args(args).env("MESH_ADMIN_SOCKET", self.admin_socket());
        command.env("MESH_BPFFS", self.bpffs()).env("MESH_CGROUP", &self.files.cgroup);
        let child = self.netns.spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
        let output = child.wait_with_output().context("wait for the command line")?;
        Ok(Cli {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs `mesh-agent <args> -o json` against this agent.
    ///
    /// # Errors
    ///
    /// Fails unless it exits with 0 and prints JSON.
    pub fn ask(&self, args: &[&str]) -> Result<Value> {
        let cli = self.cli(&[args, &["-o", "json"]].concat())?;
        ensure!(cli.code == 0, "mesh-agent {args:?}: code {}: {}", cli.code, cli.stderr.trim());
        serde_json::from_str(&cli.stdout).with_context(|| format!("mesh-agent {args:?}"))
    }

    /// Whether the agent takes this pod for enrolled; `None` if it does not know it.
    pub fn is_enrolled(&self, pod: &Pod) -> Option<bool> {
        let workloads = self.ask(&["workloads"]).ok()?;
        let found = workloads.as_array()?.iter().find(|one| one["uid"] == pod.uid())?;
        found["enrolled"].as_bool()
    }

    /// What it logged since its first start.
    pub fn log(&self) -> String {
        fs::read_to_string(self.files.dir.join("agent.log")).unwrap_or_default()
    }

    /// When it logged a line with this text, the first one behind the first `known` bytes of its log.
    ///
    /// # Errors
    ///
    /// Fails if none comes.
    pub fn logged_at(&self, known: usize, text: &str) -> Result<SystemTime> {
        let line = wait::until_some(wait::SOON, &format!("\"{text}\" in the log"), || {
            let log = self.log();
            let line = log.get(known..)?.lines().find(|line| line.contains(text))?;
            Some(line.to_owned())
        })?;
        let time = line.split_whitespace().next().context("an empty line")?;
        let time = OffsetDateTime::parse(time, &Rfc3339).with_context(|| line.clone())?;
        Ok(time.into())
    }

    /// Its access log since its first start.
    pub fn access_log(&self) -> Vec<Record> {
        self.output().lines().filter_map(Record::parse).collect()
    }

    /// What it wrote to standard output since its first start.
    pub fn output(&self) -> String {
        fs::read_to_string(self.files.dir.join("access.log")).unwrap_or_default()
    }

    /// Waits for an access-log record with these texts.
    ///
    /// # Errors
    ///
    /// Fails, and shows the last records, if none comes.
    pub fn wait_for_record(&self, texts: &[(&str, &str)]) -> Result<Record> {
        wait::until_some(wait::SOON, "", || {
            self.access_log().into_iter().rev().find(|record| record.has(texts))
        })
        .with_context(|| {
            let records = self.access_log();
            let last: Vec<_> = records.iter().rev().take(3).collect();
            format!("no access-log record {texts:?} on node {}; the last: {last:#?}", self.node)
        })
    }

    /// Memory that it occupies, in bytes.
    ///
    /// # Errors
    ///
    /// Fails if it does not run.
    pub fn rss_bytes(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|text| text.split_whitespace().next()).context("no VmRSS")?;
        Ok(kib.parse::<u64>()? * 1024)
    }
}

impl Cli {
    /// The output as JSON.
    ///
    /// # Errors
    ///
    /// Fails if it is none.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("no JSON: {}", self.stdout))
    }
}

/// Asks for `path`, and returns status and body.
pub(crate) fn http_get(mut stream: TcpStream, path: &str) -> Result<(u16, String)> {
    stream.set_read_timeout(Some(HTTP_LIMIT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8(answer).context("an answer that is no text")?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    let status = head.split(' ').nth(1).context("no HTTP status")?.parse()?;
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Ok((status, if chunked { unchunk(body) } else { body.to_owned() }))
}

/// Undoes `Transfer-Encoding: chunked` (RFC 9112 section 7.1).
fn unchunk(body: &str) -> String {
    let mut out = String::new();
    let mut rest = body;
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or_default();
        let Some(chunk) = after.get(..size).filter(|chunk| !chunk.is_empty()) else {
            break;
        };
        out.push_str(chunk);
        rest = after[size..].trim_start_matches("\r\n");
    }
    out
}
