//! What is known of one connection: the record that metrics, access log and `connections` share.
//!
//! Facts are shared pointers and small values, never formatted text: a connection costs no string
//! until somebody reads about it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use mesh_core::addr::OrigDst;
use mesh_core::protocol::Protocol;
use mesh_core::snapshot::{Service, Workload};
use mesh_core::spiffe::SpiffeId;
use mesh_core::stage::Stage;

/// Which of its two agents a record comes from: Istio's `reporter` is `source` for an outbound and
/// `destination` for an inbound connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Leaves a pod of this node.
    Outbound,
    /// Enters a pod of this node.
    Inbound,
}

impl Direction {
    /// Both, in order of their index.
    pub const ALL: [Self; 2] = [Self::Outbound, Self::Inbound];

    /// The label and log value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }

    /// Istio's `reporter` label.
    pub fn reporter(self) -> &'static str {
        match self {
            Self::Outbound => "source",
            Self::Inbound => "destination",
        }
    }
}

/// What carries the bytes between the two agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Carrier {
    /// A pooled TLS-over-TCP connection.
    Lane,
    /// A QUIC stream.
    Quic,
    /// No wire: both pods are on this node.
    Local,
    /// Plain TCP from inside the pod to a destination outside the mesh.
    Passthrough,
    /// Plain TCP that came to an enrolled pod from outside the mesh.
    Plaintext,
}

impl Carrier {
    /// The label and log value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lane => "lane",
            Self::Quic => "quic",
            Self::Local => "local",
            Self::Passthrough => "passthrough",
            Self::Plaintext => "plaintext",
        }
    }
}

/// Which way through the mesh a connection took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Way {
    /// Through a tunnel to another node.
    Tunnel,
    /// Between two pods of this node, through this agent.
    Local,
    /// Between two pods of this node, without this agent.
    Direct,
    /// Around the mesh.
    Passthrough,
}

impl Way {
    /// The log value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Local => "local",
            Self::Direct => "direct",
            Self::Passthrough => "passthrough",
        }
    }
}

/// What the kernel measured of a direct connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Smoothed round trip.
    pub rtt: Duration,
    /// Segments that the client sent again.
    pub retransmits: u32,
}

/// Istio's `connection_security_policy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SecurityPolicy {
    /// No identity was proven.
    #[default]
    Unknown,
    /// Both workloads' identities were proven.
    MutualTls,
}

impl SecurityPolicy {
    /// The label value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::MutualTls => "mutual_tls",
        }
    }
}

/// Why a connection failed, in the words that ztunnel and its dashboards use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ResponseFlags {
    /// It did not fail: it ended cleanly, or an application reset it.
    #[default]
    None,
    /// Policy refused it.
    Deny,
    /// The other side could not be reached.
    Connect,
    /// The TLS handshake failed.
    TlsFailure,
    /// Our own or the peer's identity could not be established.
    IdentityError,
}

impl ResponseFlags {
    /// All of them, in order of their index.
    pub const ALL: [Self; 5] =
        [Self::None, Self::Deny, Self::Connect, Self::TlsFailure, Self::IdentityError];

    /// The label and log value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::IdentityError => "IDENTITY_ERROR",
        }
    }
}

/// One end of a connection.
#[derive(Clone, Debug, Default)]
pub struct Party {
    /// Its address: the client's own socket, or the endpoint chosen.
    pub addr: Option<SocketAddr>,
    /// The pod at that end, if a manifest describes it.
    pub workload: Option<Arc<Workload>>,
    /// Who it *proved* to be: from its certificate, or from our own issuing for a pod of this node.
    /// `None` for plain text, even where the workload is known: labels must not claim a proof.
    pub identity: Option<SpiffeId>,
}

impl Party {
    /// A pod of this node whose certificate this agent presents.
    pub fn proven(addr: SocketAddr, workload: &Arc<Workload>) -> Self {
        Self {
            addr: Some(addr),
            workload: Some(Arc::clone(workload)),
            identity: Some(workload.identity.clone()),
        }
    }

    /// An end that has proved nothing.
    pub fn unproven(addr: SocketAddr, workload: Option<&Arc<Workload>>) -> Self {
        Self { addr: Some(addr), workload: workload.cloned(), identity: None }
    }
}

/// Everything that is known of a connection; grows while it passes the stages.
#[derive(Clone, Debug)]
pub struct ConnectionFacts {
    /// Which agent reports.
    pub direction: Direction,
    /// Who opened the connection.
    pub source: Party,
    /// Who takes it.
    pub destination: Party,
    /// What the application dialled, before routing.
    pub orig_dst: Option<OrigDst>,
    /// The service meant, if it was one.
    pub service: Option<Arc<Service>>,
    /// What is spoken, as that service declares it for the endpoint chosen.
    pub protocol: Option<Protocol>,
    /// The node of the other agent.
    pub peer_node: Option<Arc<str>>,
    /// What carries it.
    pub carrier: Option<Carrier>,
    /// Which way it goes.
    pub way: Option<Way>,
    /// Whether both identities were proven.
    pub security: SecurityPolicy,
    /// The trace id that both agents log, from the OPEN frame; 0 if there is none.
    pub trace_id: u128,
    /// What the kernel measured, of a direct connection that has ended.
    pub path: Option<Path>,
}

impl ConnectionFacts {
    /// A connection of which only its opener is known.
    pub fn new(direction: Direction, source: Party) -> Self {
        Self {
            direction,
            source,
            destination: Party::default(),
            orig_dst: None,
            service: None,
            protocol: None,
            peer_node: None,
            carrier: None,
            way: None,
            security: SecurityPolicy::Unknown,
            trace_id: 0,
            path: None,
        }
    }

    /// Forgets what an attempt that failed has said: the next one goes to somebody else, its own way.
    pub fn begin_attempt(&mut self) {
        self.destination = Party::default();
        self.peer_node = None;
        self.carrier = None;
        self.way = None;
        self.security = SecurityPolicy::Unknown;
        self.trace_id = 0;
    }
}

/// Byte counters of a connection while it is open. The relay adds; anyone may read.
///
/// Both are seen from the application *on this side*: the client's for an outbound connection, the
/// server's for an inbound one. What that means to Istio's metrics is decided in one place, the
/// series.
#[derive(Debug, Default)]
pub struct Live {
    /// Payload that the application on this side sent.
    pub sent: AtomicU64,
    /// Payload that reached the application on this side.
    pub received: AtomicU64,
}

/// How a connection ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Both sides said all they had to say.
    Complete,
    /// It was refused, could not be made, or broke; or an application reset it.
    Failed(Failure),
}

impl Outcome {
    /// Whether the mesh, or what it depends on, is to blame. An application that resets its connection
    /// has chosen to end it that way.
    pub fn is_failure(&self) -> bool {
        match self {
            Self::Complete => false,
            Self::Failed(failure) => failure.flags != ResponseFlags::None,
        }
    }
}

/// Why a connection did not end cleanly.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The stage to blame.
    pub stage: Stage,
    /// The stage's error, `reason()`: of a closed set.
    pub reason: &'static str,
    /// For a human: the error with its causes.
    pub detail: String,
    /// Istio's word for it.
    pub flags: ResponseFlags,
}

impl Failure {
    /// A failure of `stage`, with the response flag that usually belongs to its reason.
    pub fn new(stage: Stage, reason: &'static str, detail: impl Into<String>) -> Self {
        // Not by the stage: it also refuses what it has no room for, or does not know yet, and who is told of denials
        // must not be told of those.
        let flags = match reason {
            "denied" | "plaintext_in_strict" => ResponseFlags::Deny,
            _ => ResponseFlags::Connect,
        };
        Self { stage, reason, detail: detail.into(), flags }
    }

    /// The same failure under another response flag.
    #[must_use]
    pub fn with_flags(self, flags: ResponseFlags) -> Self {
        Self { flags, ..self }
    }
}
