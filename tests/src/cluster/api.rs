//! Reads from the API without a `kubectl` for each time: to start one takes 60 ms of a core, and whoever
//! waits for something asks all the time.

use std::io::ErrorKind::WouldBlock;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Cluster;
use crate::{sys, wait};

/// What is read: one, several, where it is, and whether it belongs to a namespace.
const KINDS: [(&str, &str, &str, bool); 9] = [
    ("certificatesigningrequest", "certificatesigningrequests", CERTIFICATES, false),
    ("configmap", "configmaps", CORE, true),
    ("deployment", "deployments", "/apis/apps/v1", true),
    ("endpointslice", "endpointslices", "/apis/discovery.k8s.io/v1", true),
    ("event", "events", CORE, true),
    ("namespace", "namespaces", CORE, false),
    ("node", "nodes", CORE, false),
    ("pod", "pods", CORE, true),
    ("service", "services", CORE, true),
];
const CORE: &str = "/api/v1";
const CERTIFICATES: &str = "/apis/certificates.k8s.io/v1";

/// As long as anything may take that a test waits for.
const LIMIT: Duration = wait::SOON;
/// A request that is refused is so within this.
const AT_ONCE: Duration = Duration::from_millis(500);

/// Ends with this program, however that ends: its input does.
const SCRIPT: &str = r#""$0" "$@" >/dev/null & cat >/dev/null; kill $!"#;

/// `kubectl proxy`, which nobody but this program's user can reach.
struct Proxy {
    socket: PathBuf,
    /// Its input is kept open.
    _child: Child,
}

static PROXY: Mutex<Option<Proxy>> = Mutex::new(None);

impl Proxy {
    fn start(mut kubectl: Command) -> Result<Self> {
        let dir = env::temp_dir().join(format!("malla-{}-api", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&dir).context("make a directory")?;
        let socket = dir.join("socket");
        kubectl.arg("proxy").arg("--unix-socket").arg(&socket);
        let mut shell = Command::new("sh");
        shell.args(["-c", SCRIPT]).arg(kubectl.get_program()).args(kubectl.get_args());
        shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        sys::unblock_interrupts(&mut shell);
        let child = shell.spawn().context("start kubectl proxy")?;
        let waited =
            wait::until(wait::SOON, "kubectl proxy", || UnixStream::connect(&socket).is_ok());
        if waited.is_err() {
            // Or whoever tries again finds it in the way. The program ends with its input.
            fs::remove_dir_all(&dir).ok();
        }
        waited?;
        sys::at_exit(remove);
        Ok(Self { socket, _child: child })
    }
}

/// Of a program that ends by itself; the guard does it for others.
extern "C" fn remove() {
    let proxy = PROXY.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(dir) = proxy.as_ref().and_then(|proxy| proxy.socket.parent()) {
        fs::remove_dir_all(dir).ok();
    }
}

impl Cluster {
    /// One object, or a list of them, as `kubectl get` is asked for them.
    ///
    /// # Errors
    ///
    /// Fails with what the API says.
    pub fn get(&self, what: &[&str]) -> Result<Value> {
        let text = match self.path(what) {
            Some(path) => self.read(&path)?,
            None => self.kubectl(&[&["get", "--output", "json"], what].concat())?,
        };
        serde_json::from_str(&text).context("read an object")
    }

    /// What a pod's only container has written.
    ///
    /// # Errors
    ///
    /// Fails with what the API says.
    pub fn log(&self, pod: &str) -> Result<String> {
        self.read(&format!("{CORE}/namespaces/{}/pods/{pod}/log", self.namespace))
    }

    /// Begins to send an event to the API in the name of a service account, and does not end: until the
    /// server has waited for a minute, or this is dropped, that account has one request under way. Nothing if
    /// it is answered at once, since it had another one.
    ///
    /// # Errors
    ///
    /// Fails if the API cannot be asked.
    pub fn unfinished_request(&self, account: &str) -> Result<Option<UnixStream>> {
        let mut stream = self.connect()?;
        let namespace = &self.namespace;
        write!(
            stream,
            "POST {CORE}/namespaces/{namespace}/events HTTP/1.1\r\nHost: localhost\r\n\
             Impersonate-User: system:serviceaccount:{namespace}:{account}\r\n\
             Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{"
        )?;
        stream.set_read_timeout(Some(AT_ONCE))?;
        let is_open = stream.read(&mut [0]).is_err_and(|error| error.kind() == WouldBlock);
        Ok(is_open.then_some(stream))
    }

    /// Where to read what `kubectl get` would be asked for; nowhere if that is not known here.
    fn path(&self, what: &[&str]) -> Option<String> {
        let (kind, rest) = what.split_first()?;
        let known = KINDS.iter().find(|(one, many, ..)| kind == one || kind == many);
        let (_, many, group, is_of_namespace) = known?;
        let namespace = if *is_of_namespace {
            format!("/namespaces/{}", self.namespace)
        } else {
            String::new()
        };
        let place = format!("{group}{namespace}/{many}");
        match rest {
            [] => Some(place),
            [flag, value] if *flag == "--field-selector" => {
                Some(format!("{place}?fieldSelector={}", escaped(value)))
            }
            [one] => match one.strip_prefix("--selector=") {
                Some(labels) => Some(format!("{place}?labelSelector={}", escaped(labels))),
                None => (!one.starts_with('-')).then(|| format!("{place}/{one}")),
            },
            _ => None,
        }
    }

    fn read(&self, path: &str) -> Result<String> {
        let mut stream = self.connect()?;
        stream.set_read_timeout(Some(LIMIT))?;
        // Of this version, the answer ends with the connection and comes in one piece.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).with_context(|| format!("read {path}"))?;
        let answer = String::from_utf8(answer).context("an answer that is no text")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.split(' ').nth(1).context("no HTTP status")?;
        ensure!(status == "200", "{path}: {status}: {body}");
        Ok(body.to_owned())
    }

    fn connect(&self) -> Result<UnixStream> {
        let mut proxy = PROXY.lock().unwrap_or_else(PoisonError::into_inner);
        if proxy.is_none() {
            *proxy = Some(Proxy::start(self.command())?);
        }
        let socket = proxy.as_ref().map(|proxy| proxy.socket.as_path()).context("no proxy")?;
        UnixStream::connect(socket).context("connect to kubectl proxy")
    }
}

/// RFC 3986 section 2.1.
fn escaped(text: &str) -> String {
    let escape = |byte: u8| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            char::from(byte).to_string()
        } else {
            format!("%{byte:02X}")
        }
    };
    text.bytes().map(escape).collect()
}
