//! The admin socket, from bind to answer.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::view::{CertificateView, ConnectionCounts, StatusView, TunnelView, workloads};
use super::{AdminError, AdminSocket, ClientError, Sources, ask, ask_to_change, serve};
use crate::cli::ask::{Answered, DetachError, answer, must_not_run};
use crate::cli::output::Format;
use crate::cli::{Admin, Ask, AskAgent, Log, Question};
use crate::telemetry::fixture::{Shop, log_level};
use crate::telemetry::{AccessLogFormat, Direction, Options, Telemetry};

/// A directory of its own, removed when dropped.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static LAST: AtomicUsize = AtomicUsize::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("malla-admin-{}-{number}", process::id()));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("new").join("admin.sock")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn telemetry() -> Telemetry {
    Telemetry::new(&Options { access_log: AccessLogFormat::Off, ..Options::default() }).unwrap()
}

fn sources(telemetry: Telemetry) -> Sources {
    let snapshot = Arc::new(Shop::new().snapshot());
    Sources {
        status: Box::new(|| StatusView {
            node: "node-1".into(),
            ready: true,
            connections: ConnectionCounts { outbound: 1, inbound: 0 },
            ..StatusView::default()
        }),
        workloads: Box::new(|| workloads(&Shop::new().snapshot(), |_| None)),
        snapshot: Box::new(move || Arc::clone(&snapshot)),
        certificates: Box::new(|| {
            ["spiffe://cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/shopping/sa/x"]
                .map(|name| CertificateView {
                    name: name.into(),
                    kind: "Leaf".into(),
                    status: "Available".into(),
                    valid: true,
                    serial: "01".into(),
                    not_after: "2026-01-02T00:00:00Z".into(),
                    not_before: "2026-01-01T00:00:00Z".into(),
                    problem: String::new(),
                })
                .into()
        }),
        tunnels: Box::new(Vec::<TunnelView>::new),
        config: Box::new(|| json!({ "tunnel_port": 15019 })),
        telemetry,
        log: log_level("info"),
    }
}

/// An agent's admin socket that answers until dropped.
struct Agent {
    dir: Dir,
    telemetry: Telemetry,
    _serving: JoinSet<std::convert::Infallible>,
}

impl Agent {
    fn start() -> Self {
        let dir = Dir::new();
        let socket = AdminSocket::bind(&dir.socket()).unwrap();
        let telemetry = telemetry();
        let mut serving = JoinSet::new();
        serving.spawn(serve(socket, sources(telemetry.clone())));
        Self { dir, telemetry, _serving: serving }
    }

    fn ask(&self) -> Ask {
        let admin = Admin { socket: self.dir.socket() };
        Ask { admin, output: Format::Table, namespace: None, all_namespaces: false }
    }
}

async fn printed(question: &Question) -> (Answered, String) {
    let mut out = Vec::new();
    let answered = answer(question, &mut out).await.unwrap();
    (answered, String::from_utf8(out).unwrap())
}

#[tokio::test]
async fn every_path_answers_with_its_keys() {
    let agent = Agent::start();
    let tracked = agent.telemetry.open(Shop::new().facts(Direction::Outbound));
    let read = async |path| ask(&agent.dir.socket(), path).await.unwrap();

    assert_eq!(read("/status").await["node"], "node-1");
    assert_eq!(read("/workloads").await[0]["pod"], "api-0");
    assert_eq!(read("/services").await[0]["service"], "api");
    assert_eq!(read("/certs").await[0]["kind"], "Leaf");
    assert_eq!(read("/connections").await[0]["id"], tracked.id());
    assert_eq!(read("/tunnels").await, json!([]));
    assert_eq!(read("/log").await["level"], "info");
    assert_eq!(read("/version").await["version"], env!("CARGO_PKG_VERSION"));
    let dump = read("/config_dump").await;
    assert_eq!(dump["config"]["tunnel_port"], 15019);
    assert_eq!(dump["connections"][0]["workload"], "web-0");
    let refused = ask(&agent.dir.socket(), "/nowhere").await.unwrap_err();
    assert!(matches!(refused, ClientError::Refused { status: 404, .. }), "{refused:?}");
}

#[tokio::test]
async fn answers_are_printed_and_kept_to_the_namespace() {
    let agent = Agent::start();
    let (answered, text) = printed(&Question::Workloads(agent.ask())).await;
    assert_eq!(answered, Answered::Ok);
    assert!(text.starts_with("NAMESPACE   POD NAME   ADDRESS"), "{text}");
    assert_eq!(text.lines().count(), 3);

    let elsewhere = Ask { namespace: Some("elsewhere".into()), ..agent.ask() };
    let (_, text) = printed(&Question::Workloads(elsewhere.clone())).await;
    assert_eq!(text.lines().count(), 1);
    let (_, text) = printed(&Question::Services(elsewhere)).await;
    assert_eq!(text.lines().count(), 1);

    let shop = Ask { namespace: Some("shop".into()), output: Format::Json, ..agent.ask() };
    let (_, text) = printed(&Question::Certs(shop)).await;
    assert!(text.contains("/ns/shop/") && !text.contains("/ns/shopping/"), "{text}");
    let Ask { admin, output, .. } = agent.ask();
    let (_, text) = printed(&Question::Version(AskAgent { admin, output })).await;
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(text, format!("PROGRAM   AGENT\n{version}     {version}\n"));
}

#[tokio::test]
async fn status_with_a_problem_is_a_problem() {
    let dir = Dir::new();
    let socket = AdminSocket::bind(&dir.socket()).unwrap();
    let status = Box::new(|| StatusView { ready: false, ..StatusView::default() });
    let mut serving = JoinSet::new();
    serving.spawn(serve(socket, Sources { status, ..sources(telemetry()) }));
    let admin = Admin { socket: dir.socket() };
    let ask = AskAgent { admin, output: Format::Table };
    assert_eq!(printed(&Question::Status(ask)).await.0, Answered::Problem);
}

#[tokio::test]
async fn level_is_changed_and_a_mistyped_one_refused() {
    let agent = Agent::start();
    let socket = agent.dir.socket();
    let level = "info,mesh_agent::tunnel=trace";
    let admin = Admin { socket: socket.clone() };
    let (_, text) =
        printed(&Question::Log(Log { level: Some(level.into()), admin, output: Format::Table }))
            .await;
    assert!(text.contains("mesh_agent::tunnel=trace"), "{text}");
    assert_eq!(ask(&socket, "/log").await.unwrap()["level"], text.trim());

    for wrong in ["/log?level=debgu", "/log", "/log?level="] {
        let refused = ask_to_change(&socket, wrong).await.unwrap_err();
        assert!(matches!(refused, ClientError::Refused { status: 400, .. }), "{wrong}");
    }
    assert_eq!(ask(&socket, "/log").await.unwrap()["level"], text.trim());
}

#[tokio::test]
async fn nobody_at_the_socket_is_unreachable() {
    let dir = Dir::new();
    let error = ask(&dir.socket(), "/status").await.unwrap_err();
    assert!(error.is_unreachable(), "{error:?}");
}

/// Sockets at which an agent may run that does not answer.
struct Silent {
    dir: Dir,
    _listener: UnixListener,
}

impl Silent {
    fn new() -> Self {
        let dir = Dir::new();
        fs::write(dir.0.join("file"), "").unwrap();
        let listener = UnixListener::bind(dir.0.join("silent.sock")).unwrap();
        Self { dir, _listener: listener }
    }

    /// Each with the reason.
    fn sockets(&self) -> [(PathBuf, &'static str); 2] {
        [
            // As unknown as what is in a directory that only others may enter, and root may enter all.
            (self.dir.0.join("file").join("admin.sock"), "Not a directory (os error 20)"),
            (self.dir.0.join("silent.sock"), "the agent did not answer within 10 s"),
        ]
    }
}

/// Sockets at which nobody listens: none at all, and that of an agent that was killed.
fn of_nobody(dir: &Dir) -> [PathBuf; 2] {
    let left = dir.0.join("left.sock");
    drop(UnixListener::bind(&left).unwrap());
    [dir.socket(), left]
}

#[tokio::test(start_paused = true)]
async fn version_tells_an_agent_that_does_not_answer_from_none() {
    let silent = Silent::new();
    let program = env!("CARGO_PKG_VERSION");
    let none = of_nobody(&silent.dir).map(|socket| {
        (socket, "not running".to_owned(), json!({ "program": program, "agent": null }))
    });
    let no_answer = silent.sockets().map(|(socket, why)| {
        let keys = json!({ "program": program, "agent": null, "problem": why });
        (socket, format!("no answer: {why}"), keys)
    });
    for (socket, told, keys) in none.into_iter().chain(no_answer) {
        let ask = |output| AskAgent { admin: Admin { socket: socket.clone() }, output };
        let (_, text) = printed(&Question::Version(ask(Format::Table))).await;
        assert_eq!(text, format!("PROGRAM   AGENT\n{program}     {told}\n"));
        let (_, text) = printed(&Question::Version(ask(Format::Json))).await;
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), keys);
    }
}

#[tokio::test]
async fn detach_is_refused_while_an_agent_answers() {
    let agent = Agent::start();
    let refused = must_not_run(&agent.dir.socket()).await.unwrap_err();
    assert!(matches!(refused, DetachError::Runs { .. }), "{refused:?}");
    let socket = agent.dir.socket().display().to_string();
    assert!(refused.to_string().contains(&socket), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn detach_goes_on_only_where_nobody_listens() {
    let silent = Silent::new();
    for socket in of_nobody(&silent.dir) {
        must_not_run(&socket).await.unwrap();
    }
    for (socket, _why) in silent.sockets() {
        let refused = must_not_run(&socket).await.unwrap_err();
        assert!(matches!(refused, DetachError::Unknown { .. }), "{refused:?}");
    }
}

#[tokio::test]
async fn only_the_owner_may_open_the_socket_and_it_goes_with_the_agent() {
    let dir = Dir::new();
    let path = dir.socket();
    let socket = AdminSocket::bind(&path).unwrap();
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left behind");

    drop(socket);
    assert!(!path.exists());
}

#[tokio::test]
async fn leftover_is_replaced_and_a_living_agent_is_not() {
    let dir = Dir::new();
    let path = dir.socket();
    let socket = AdminSocket::bind(&path).unwrap();
    assert!(matches!(AdminSocket::bind(&path), Err(AdminError::InUse { .. })));

    // What a killed agent leaves: the path, and nobody who listens.
    let (listener, guard) = socket.into_parts();
    drop(listener);
    let successor = AdminSocket::bind(&path).unwrap();
    drop(guard);
    assert!(path.exists(), "a predecessor does not remove its successor's socket");
    drop(successor);

    fs::write(&path, "mine").unwrap();
    assert!(matches!(AdminSocket::bind(&path), Err(AdminError::NotASocket { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"mine");
}
