//! The admin socket: what the agent knows and does, for the command line.
//!
//! HTTP/1.1 with JSON on a Unix socket of mode 0600, so that only who may stop the agent may ask it.
//!
//! | path | answers |
//! |---|---|
//! | `/status` | [`view::StatusView`] |
//! | `/workloads`, `/services`, `/certs`, `/connections`, `/tunnels` | a list of views |
//! | `/config_dump` | all of these, and the effective configuration |
//! | `/log` | `{"level": …}`; `POST /log?level=LEVEL` changes it |
//! | `/version` | `{"version": …}` |
//!
//! An error is `{"error": …}` with a status of 400 or above.

mod client;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
mod socket;
#[cfg(test)]
mod tests;
pub mod view;

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use hyper::{Method, StatusCode};
use mesh_core::snapshot::Snapshot;
use serde::Serialize;
use serde_json::{Value, json};

pub use self::client::{ClientError, ask, ask_to_change};
pub use self::socket::{AdminError, AdminSocket};
use self::view::{CertificateView, StatusView, TunnelView, WorkloadView};
use crate::telemetry::http::{Answer, Question, must_be_read, serve as serve_http};
use crate::telemetry::{LogLevel, Telemetry};

/// Where the answers come from. The closures run on the thread that answers and must not block.
pub struct Sources {
    /// `/status`.
    pub status: Box<dyn Fn() -> StatusView + Send + Sync>,
    /// `/workloads`.
    pub workloads: Box<dyn Fn() -> Vec<WorkloadView> + Send + Sync>,
    /// `/services` are read from it.
    pub snapshot: Box<dyn Fn() -> Arc<Snapshot> + Send + Sync>,
    /// `/certs`.
    pub certificates: Box<dyn Fn() -> Vec<CertificateView> + Send + Sync>,
    /// `/tunnels`.
    pub tunnels: Box<dyn Fn() -> Vec<TunnelView> + Send + Sync>,
    /// The effective configuration, for `/config_dump`. No secrets.
    pub config: Box<dyn Fn() -> Value + Send + Sync>,
    /// `/connections`.
    pub telemetry: Telemetry,
    /// `/log`.
    pub log: LogLevel,
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

/// Answers until dropped, and then removes the socket.
pub async fn serve(socket: AdminSocket, sources: Sources) -> Infallible {
    let (listener, _removed_when_dropped) = socket.into_parts();
    serve_http(listener, move |question| sources.answer(question)).await
}

impl Sources {
    fn answer(&self, question: &Question<'_>) -> Answer {
        if question.path == "/log" && *question.method == Method::POST {
            return self.change_level(question.query);
        }
        if let Err(refused) = must_be_read(question) {
            return refused;
        }
        match self.read(question.path) {
            Some(value) => json_answer(StatusCode::OK, &value),
            None => error_answer(StatusCode::NOT_FOUND, "no such path"),
        }
    }

    fn read(&self, path: &str) -> Option<Value> {
        Some(match path {
            "/status" => value(&(self.status)()),
            "/workloads" => value(&(self.workloads)()),
            "/services" => value(&view::services(&(self.snapshot)())),
            "/certs" => value(&(self.certificates)()),
            "/connections" => {
                let open = self.telemetry.connections();
                value(&open.iter().map(view::connection).collect::<Vec<_>>())
            }
            "/tunnels" => value(&(self.tunnels)()),
            "/config_dump" => self.dump(),
            "/log" => json!({ "level": self.log.current() }),
            "/version" => json!({ "version": env!("CARGO_PKG_VERSION") }),
            _ => return None,
        })
    }

    fn dump(&self) -> Value {
        let parts = [
            "status",
            "workloads",
            "services",
            "certs",
            "connections",
            "tunnels",
            "log",
            "version",
        ];
        let parts = parts.into_iter().filter_map(|part| {
            let value = self.read(&format!("/{part}"))?;
            Some((part.to_owned(), value))
        });
        parts.chain([("config".to_owned(), (self.config)())]).collect()
    }

    fn change_level(&self, query: &str) -> Answer {
        let Some(level) = query.split('&').find_map(|pair| pair.strip_prefix("level=")) else {
            return error_answer(StatusCode::BAD_REQUEST, "level= is missing");
        };
        match self.log.set(level) {
            Ok(()) => json_answer(StatusCode::OK, &json!({ "level": self.log.current() })),
            Err(error) => error_answer(StatusCode::BAD_REQUEST, &error.to_string()),
        }
    }
}

fn value(view: &impl Serialize) -> Value {
    // Views hold strings, numbers and lists of them: none can fail to become JSON.
    serde_json::to_value(view).unwrap_or_default()
}

fn json_answer(status: StatusCode, value: &Value) -> Answer {
    Answer { status, content_type: "application/json", body: format!("{value}\n").into() }
}

fn error_answer(status: StatusCode, error: &str) -> Answer {
    json_answer(status, &json!({ "error": error }))
}
