//! The agent's own log: events with fields on standard error, with a level that can be changed
//! while it runs.

use std::fmt;
use std::io;

use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};
use tracing_subscriber::{Layer as _, Registry, fmt as log_fmt, reload};

/// How log events are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object on a line.
    Json,
}

/// Why a text is not a log level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLevelError(String);

impl fmt::Display for LogLevelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(item) = self;
        write!(
            f,
            "`{item}` is not a level: off, error, warn, info, debug or trace, or for one module as \
             in mesh_agent::tunnel=debug"
        )
    }
}

impl std::error::Error for LogLevelError {}

/// Checks a level such as `info` or `info,mesh_agent::tunnel=debug`, and returns it unchanged.
///
/// # Errors
///
/// Names the first item that is neither. A mistyped level would otherwise pass for a module's name
/// and silence everything else.
pub fn parse_level(text: &str) -> Result<String, LogLevelError> {
    let in_path = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
    for item in text.split(',') {
        let (module, level) = item.rsplit_once('=').unwrap_or(("", item));
        let is_word = !level.is_empty() && level.bytes().all(|byte| byte.is_ascii_alphabetic());
        if !is_word || level.parse::<LevelFilter>().is_err() || !module.chars().all(in_path) {
            return Err(LogLevelError(item.chars().take(64).collect()));
        }
    }
    Ok(text.to_owned())
}

/// The level of the running process.
#[derive(Clone, Debug)]
pub struct LogLevel(reload::Handle<EnvFilter, Registry>);

impl LogLevel {
    /// Changes it.
    ///
    /// # Errors
    ///
    /// As [`parse_level`].
    pub fn set(&self, text: &str) -> Result<(), LogLevelError> {
        let text = parse_level(text)?;
        let filter = EnvFilter::builder().parse_lossy(&text);
        // Fails only if the subscriber is gone, which lives as long as the process.
        self.0.reload(filter).map_err(|_gone| LogLevelError(text))
    }

    /// What is set.
    pub fn current(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }
}

/// Starts logging for the whole process.
///
/// # Errors
///
/// If this process already has a log. `level` must have passed [`parse_level`].
pub fn init_logging(format: LogFormat, level: &str) -> Result<LogLevel, TryInitError> {
    let (filter, log_level) = reloadable(level);
    let events = log_fmt::layer().with_writer(io::stderr);
    let events = match format {
        LogFormat::Text => {
            let colours = io::IsTerminal::is_terminal(&io::stderr());
            events.with_ansi(colours).boxed()
        }
        LogFormat::Json => events.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(events).try_init()?;
    Ok(log_level)
}

/// A filter, and the handle that changes it for as long as the filter lives.
pub(super) fn reloadable(level: &str) -> (reload::Layer<EnvFilter, Registry>, LogLevel) {
    let (filter, handle) = reload::Layer::new(EnvFilter::builder().parse_lossy(level));
    (filter, LogLevel(handle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_for_all_and_for_one_module_are_taken() {
        for text in ["info", "DEBUG", "off", "info,mesh_agent::tunnel=trace", "warn,quinn=error"] {
            assert_eq!(parse_level(text).as_deref(), Ok(text));
        }
    }

    #[test]
    fn mistyped_level_is_refused_and_not_taken_for_a_module() {
        for text in [
            "",
            "debgu",
            "info,",
            "mesh_agent=loud",
            "3",
            "info,quinn",
            "warn, quinn=off",
            "a[b]=info",
        ] {
            assert!(parse_level(text).is_err(), "{text}");
        }
    }
}
