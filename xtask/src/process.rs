//! Runs other programs: quietly, with a sign of life while they take long, and with their output
//! when they fail.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::say;

/// How long a program may be silent on the terminal before a line says that it is still at work.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);

/// How long a program may take to end after SIGTERM.
const TERM_TIME: Duration = Duration::from_secs(10);

/// The end of a failed program's output that is worth showing.
const TAIL_LINES: usize = 60;

/// What a program left behind.
pub(crate) struct Finished {
    /// Whether it ended with code 0.
    pub(crate) success: bool,
    /// What ended it, for humans: `exit code 101`, `signal 9`, `no end after 900 s`.
    pub(crate) how: String,
    /// Everything it printed, both streams, in the order it came.
    pub(crate) lines: Vec<String>,
    /// How long it ran.
    pub(crate) took: Duration,
}

impl Finished {
    /// The last lines of the output, indented, to be shown under an error.
    pub(crate) fn tail(&self) -> String {
        let skipped = self.lines.len().saturating_sub(TAIL_LINES);
        self.lines[skipped..].iter().map(|line| format!("    {line}\n")).collect()
    }
}

/// Runs `command` to its end and shows nothing of it but a line every ten seconds: time and its
/// last line. Ends it after `limit`.
///
/// # Errors
///
/// Fails if the program cannot be started.
pub(crate) fn watch(what: &str, mut command: Command, limit: Duration) -> Result<Finished> {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", shown(&command)))?;
    let output = lines_of(&mut child);

    let mut lines = Vec::new();
    let mut next_sign = started + SIGN_OF_LIFE;
    let mut timed_out = false;
    loop {
        match output.recv_timeout(next_sign.saturating_duration_since(Instant::now())) {
            Ok(line) => lines.push(line),
            // Both pipes are closed: the program is at its end.
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                // Cargo's messages for programs are no progress for people.
                let is_shown = |line: &&String| !line.trim().is_empty() && !line.starts_with('{');
                let last = lines.iter().rev().find(is_shown);
                let last = last.map_or("", |line| line.trim());
                let shown: String = last.chars().take(90).collect();
                say(&format!("    {what}: {} s, {shown}", started.elapsed().as_secs()));
                next_sign += SIGN_OF_LIFE;
            }
        }
        if started.elapsed() > limit {
            timed_out = true;
            end(&mut child)?;
            // What it said at its end. Bounded, since its children may have its pipes and go on.
            let last = Instant::now() + Duration::from_secs(1);
            let rest = || output.recv_timeout(last.saturating_duration_since(Instant::now())).ok();
            lines.extend(std::iter::from_fn(rest));
            break;
        }
    }
    let status = child.wait().context("wait for a program")?;
    let how = match (timed_out, status.code(), status.signal()) {
        (true, ..) => format!("no end after {} s", limit.as_secs()),
        (_, Some(code), _) => format!("exit code {code}"),
        (_, _, Some(signal)) => format!("signal {signal}"),
        _ => status.to_string(),
    };
    let success = status.success() && !timed_out;
    Ok(Finished { success, how, lines, took: started.elapsed() })
}

/// Ends a program that takes too long: first with SIGTERM, which `sudo` passes on and after which a
/// test can clean up.
fn end(child: &mut Child) -> Result<()> {
    let deadline = Instant::now() + TERM_TIME;
    answer("kill", &["-TERM", &child.id().to_string()]);
    while Instant::now() < deadline {
        if child.try_wait().context("wait for a program")?.is_some() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50));
    }
    child.kill().context("end a program that takes too long")
}

/// Runs `command` like [`watch`] and fails, with the end of its output, unless it succeeds.
///
/// # Errors
///
/// Fails if the program cannot be started or does not end with code 0.
pub(crate) fn must(what: &str, command: Command, limit: Duration) -> Result<Finished> {
    let shown = shown(&command);
    let finished = watch(what, command, limit)?;
    if !finished.success {
        bail!("{what} failed ({}): {shown}\n{}", finished.how, finished.tail());
    }
    Ok(finished)
}

/// Runs `command` on this terminal.
///
/// # Errors
///
/// Fails if the program cannot be started or does not end with code 0.
pub(crate) fn attached(mut command: Command) -> Result<()> {
    let shown = shown(&command);
    let status = command.status().with_context(|| format!("start {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

/// What a program that only answers a question prints; `None` if it fails or is not there.
pub(crate) fn answer(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Whether `program` is in the `PATH`, or where the distributions put what only root needs.
pub(crate) fn installed(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    let places = path.split(':').chain(["/usr/sbin", "/sbin"]);
    places.into_iter().any(|place| std::path::Path::new(place).join(program).is_file())
}

/// `cargo` as this task was called by it, at the top of the checkout.
///
/// # Errors
///
/// Fails if the checkout cannot be found.
pub(crate) fn cargo(args: &str) -> Result<Command> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.args(args.split_whitespace()).current_dir(crate::root()?);
    Ok(command)
}

/// When a process started, in clock ticks since boot; `None` if there is none, or only what is left of
/// one until somebody asks how it ended (a zombie).
pub(crate) fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc_pid_stat(5). The name in brackets may hold anything, brackets and spaces included.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The command line, for humans.
pub(crate) fn shown(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let mut words = VecDeque::from([name.to_string_lossy().into_owned()]);
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    Vec::from(words).join(" ")
}

/// Both output streams of `child`, line by line.
fn lines_of(child: &mut Child) -> mpsc::Receiver<String> {
    fn forward(stream: impl Read + Send + 'static, lines: mpsc::Sender<String>) {
        thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if lines.send(line).is_err() {
                    break;
                }
            }
        });
    }
    let (sender, receiver) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        forward(stdout, sender.clone());
    }
    if let Some(stderr) = child.stderr.take() {
        forward(stderr, sender);
    }
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn program_that_takes_too_long_is_asked_to_clean_up() {
        let script = "trap 'echo cleaned; exit 0' TERM; while :; do echo at work; sleep 0.02; done";
        let ended = watch("x", shell(script), Duration::from_millis(200)).unwrap();
        assert_eq!((ended.success, ended.how.as_str()), (false, "no end after 0 s"));
        assert_eq!(ended.lines.last().map(String::as_str), Some("cleaned"));
    }
}
