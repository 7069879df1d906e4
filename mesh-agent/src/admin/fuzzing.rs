//! Requests to the admin socket as the fuzzer writes them, and answers of it. Metrics and probes are behind the same
//! HTTP server.

use std::sync::{Arc, OnceLock};

use hyper::StatusCode;
use mesh_core::snapshot::Snapshot;
use mesh_core::spiffe::TrustDomain;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

use super::Sources;
use super::client::parse;
use super::view::{
    CertificateView, ConnectionView, ServiceView, StatusView, TunnelView, WorkloadView,
};
use crate::cli::output::{Format, Tabular, print};
use crate::telemetry::http::serve_one;
use crate::telemetry::{AccessLogFormat, LogLevel, Options, Telemetry};

/// Larger than what is sent and answered, so that neither waits for the other.
const ROOM: usize = 1 << 20;

/// Any bytes are answered with JSON and a status, or with nothing.
pub fn admin(input: &[u8]) {
    let answer = answered(input);
    if answer.is_empty() {
        return;
    }
    let text = String::from_utf8_lossy(&answer);
    assert!(text.starts_with("HTTP/1."), "{text}");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_default();
    if head.contains("application/json") && !body.is_empty() {
        assert!(serde_json::from_str::<Value>(body).is_ok(), "{text}");
    }
}

/// What is said to somebody who writes this and then nothing more.
fn answered(input: &[u8]) -> Vec<u8> {
    let mut answer = Vec::new();
    let input = &input[..input.len().min(ROOM / 2)];
    let Some(sources) = sources() else { return answer };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let Ok(runtime) = runtime else { return answer };
    runtime.block_on(async {
        let (mut client, server) = duplex(ROOM);
        client.write_all(input).await.unwrap_or_default();
        client.shutdown().await.unwrap_or_default();
        serve_one(server, &|question: &_| sources.answer(question)).await;
        client.read_to_end(&mut answer).await.unwrap_or_default();
    });
    answer
}

/// Any answer, behind its status in two bytes, is an error, or is shown whole in whatever form: as a table with nothing
/// that a terminal would obey.
pub fn answers(input: &[u8]) {
    let Some((&status, body)) = input.split_first_chunk::<2>() else { return };
    let Ok(status) = StatusCode::from_u16(u16::from_be_bytes(status)) else { return };
    let Ok(answer) = parse(status, body) else { return };
    show::<StatusView>(&answer);
    show::<Vec<WorkloadView>>(&answer);
    show::<Vec<ServiceView>>(&answer);
    show::<Vec<CertificateView>>(&answer);
    show::<Vec<ConnectionView>>(&answer);
    show::<Vec<TunnelView>>(&answer);
}

fn show<V: Tabular + DeserializeOwned>(answer: &Value) {
    let Ok(view) = serde_json::from_value::<V>(answer.clone()) else { return };
    let shown = |format| {
        let mut shown = Vec::new();
        assert!(print(&mut shown, format, &view).is_ok(), "into memory");
        String::from_utf8(shown).unwrap_or_default()
    };
    let table = shown(Format::Table);
    assert!(!table.contains(|char: char| char.is_control() && char != '\n'), "{table:?}");
    let json = shown(Format::Json);
    assert!(serde_json::from_str::<V>(&json).is_ok(), "{json}");
    assert!(!shown(Format::Yaml).contains('\u{1b}'));
}

fn sources() -> Option<&'static Sources> {
    static SOURCES: OnceLock<Option<Sources>> = OnceLock::new();
    let make = || {
        let snapshot = Arc::new(Snapshot::empty("a".into(), TrustDomain::new("a").ok()?));
        let quiet = Options { access_log: AccessLogFormat::Off, ..Options::default() };
        Some(Sources {
            status: Box::new(StatusView::default),
            workloads: Box::new(Vec::new),
            snapshot: Box::new(move || Arc::clone(&snapshot)),
            certificates: Box::new(Vec::new),
            tunnels: Box::new(Vec::new),
            config: Box::new(|| json!({})),
            telemetry: Telemetry::new(&quiet).ok()?,
            log: log_level()?,
        })
    };
    SOURCES.get_or_init(make).as_ref()
}

/// A level that nothing but this uses: tests share their process with others.
#[cfg(test)]
fn log_level() -> Option<LogLevel> {
    Some(crate::telemetry::fixture::log_level("info"))
}

/// The process's own.
#[cfg(not(test))]
fn log_level() -> Option<LogLevel> {
    crate::telemetry::init_logging(crate::telemetry::LogFormat::Text, "off").ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_of_the_fuzzer_hold() {
        crate::fuzzing::replay("admin", super::admin);
        crate::fuzzing::replay("answers", super::answers);
        let status = super::answered(b"GET /status HTTP/1.1\r\nHost: agent\r\n\r\n");
        assert!(status.starts_with(b"HTTP/1.1 200 "), "most of what is tried is not answered");
    }
}
