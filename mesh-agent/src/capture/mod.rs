//! Capture: the eBPF programs, their maps, and which pods they act upon.
//!
//! ```text
//! connect4/6 ──► listener in the pod ──► accept ──► OrigDstTable::take     outbound
//! sk_lookup  ──► listener in the pod ──► accept ──► local address          inbound
//! ```
//!
//! # Guarantees
//!
//! - *No gap.* Programs and maps are pinned; a new agent replaces programs in place. While no agent
//!   runs, an enrolled pod's connections are refused at once, or bypass the mesh if it fails open.
//! - *Nothing reused blindly.* A pin that is not what this agent would have made is an error that
//!   names it.
//! - *No fixed ports.* Listeners take free ones, away from those that applications want.
//! - *Nothing left.* [`Capture::detach`] needs no agent and removes all of it.
//!
//! # Not here
//!
//! What becomes of a connection (`outbound`, `inbound`), and the decisions of the programs
//! ([`mesh_common::verdict`]).

mod attach;
mod config;
mod direct;
mod error;
mod events;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
mod heartbeat;
mod inherit;
mod listeners;
mod log;
mod maps;
mod networks;
mod object;
mod orig_dst;
mod pending;
mod pins;
mod pods;
pub mod probe;
mod redirect;
mod routes;
mod sys;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use mesh_common::Counter;
use mesh_common::maps::{Control, ROLE_AGENT, ROLE_DELIVER, SPECS, SockMeta};
use mesh_common::verdict::STALE_NS;
use mesh_core::addr::Cidr;
use mesh_core::generation::GenerationKey;
use mesh_core::networks::Block;
use mesh_core::settings::{Mode, Settings};
use serde::Serialize;
use socket2::{Domain, Socket, Type};

pub use attach::rehearse;
pub use config::CaptureConfig;
pub use direct::{Generations, VerdictEntry, Written};
pub use error::CaptureError;
pub use events::{DirectFacts, DirectRecord, Ended, KernelEvents};
pub use log::KernelLog;
pub use maps::PodTag;
pub use orig_dst::OrigDstTable;
pub use pending::HeldBack;
pub use redirect::NotRedirected;

use crate::mounted;
use crate::net::Netns;
use attach::Programs;
use heartbeat::Heartbeat;
use inherit::Nameless;
use object::{OBJECT, loader, open_map};
use pending::Pending;
use pins::Pins;
use pods::Pods;
use redirect::Redirect;
use routes::Routes;

/// In which a living agent beats once at least: it does so every second.
const BEATS: Duration = Duration::from_millis(2500);

/// A pod to capture.
#[derive(Clone, Copy, Debug)]
pub struct PodCapture<'a> {
    /// The pod's UID: what tells it from every other pod. At most 240 letters, digits and `-`; anything
    /// else counts three times.
    pub uid: &'a str,
    /// Its addresses: one, or one of each family.
    pub ips: &'a [IpAddr],
    /// Its network namespace.
    pub netns: &'a Netns,
    /// How it takes part.
    pub settings: &'a Settings,
    /// The pod that leaves this namespace when this one is captured, and not a moment before.
    pub predecessor: Option<&'a str>,
    /// Outbound listeners per address, 1 to 16. Connections take turns: give every worker the same
    /// number.
    pub outbound_listeners: usize,
    /// Inbound listeners per address, 1 to 16: one per worker.
    pub inbound_listeners: usize,
}

/// Non-blocking listeners in a pod's namespace. In both lists all addresses of the pod come first with
/// their first listener, then all with their second, and so on.
#[derive(Debug)]
pub struct Listeners {
    /// Captured connections arrive here: ask [`OrigDstTable::take`] whither.
    pub outbound: Vec<TcpListener>,
    /// Connections to the pod arrive here: `local_addr()` is what the client dialled.
    pub inbound: Vec<TcpListener>,
}

/// What decides whether a pod's connection is captured, where its settings do not ask for everything.
#[derive(Debug)]
pub enum Destinations {
    /// The addresses that were set: all of them are in the kernel.
    Listed,
    /// Nothing: there was no room for all addresses, for this reason, and a connection to one that is
    /// missing would leave in plain text. So everything is captured; the agent knows every address, and
    /// passes on what is not of the mesh.
    Everything(CaptureError),
}

/// What a socket of the agent is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It leaves as it is.
    Agent,
    /// It delivers to an application of an enrolled pod: the lookup program lets it through.
    Deliver,
}

/// What [`Capture::detach`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Detached {
    /// Pins and directories that were removed.
    pub removed: Vec<PathBuf>,
    /// Namespaces whose routes for client addresses were removed.
    pub namespaces: Vec<PathBuf>,
    /// What lies in the directory and is not ours.
    pub left: Vec<PathBuf>,
}

/// Programs and maps in the kernel. They stay when this value is dropped.
#[derive(Debug)]
pub struct Capture {
    pods: Mutex<Pods>,
    /// Of [`Pods`]: who holds back a new pod must not wait for what is done to others.
    everything: Arc<AtomicBool>,
    pending: Mutex<Pending>,
    programs: Programs,
    redirect: Option<Redirect>,
    pins: Pins,
    control: OwnedFd,
    /// What the programs are told besides the heartbeat.
    told: Mutex<Control>,
    sock_meta: OwnedFd,
    flows: Arc<OwnedFd>,
    heartbeat: Heartbeat,
    log: Mutex<Option<KernelLog>>,
    events: Mutex<Option<KernelEvents>>,
    generation_key: GenerationKey,
}

impl Capture {
    /// Loads the programs and attaches them, in place of an earlier agent's if there was one.
    ///
    /// Pods that it had enrolled stay captured (and refused, since their listeners are gone) until
    /// [`Self::enrol`] gives them new ones or [`Self::retain`] lets them go.
    ///
    /// # Errors
    ///
    /// Something is missing (`mesh-agent check` tells), or lies in the way.
    pub fn start(config: &CaptureConfig) -> Result<Self, CaptureError> {
        pins::check_cgroup2(&config.cgroup)?;
        let open = |source| CaptureError::Pin { what: "open", path: config.cgroup.clone(), source };
        let cgroup = File::open(&config.cgroup).map_err(open)?;
        // The kernel's ID of a cgroup is its inode.
        let cgroup_id = cgroup.metadata().map_err(open)?.ino();
        let (pins, older) = Pins::open(config)?;
        let routes = Routes::open(&pins, &older)?;

        let mut loader = loader();
        for spec in &SPECS {
            loader.map_pin_path(spec.name, pins.map(spec.name));
            loader.map_max_entries(spec.name, pins::entries(spec, config));
        }
        let mut ebpf = loader
            .load(OBJECT)
            .map_err(|error| CaptureError::Load { what: "the maps", source: error.into() })?;
        let control = open_map(&pins, "CONTROL")?;
        // What the agent before this one knew of the node is so still: probes of pods go on.
        let nothing =
            Control { heartbeat_ns: 0, node_netns: 0, kubelet_cgroup: 0, pending: 0, no_direct: 0 };
        let before = sys::lookup(control.as_fd(), &0u32, nothing).ok().flatten();
        let before = before.unwrap_or(nothing);
        let sock_meta = open_map(&pins, "SOCK_META")?;
        let flows = Arc::new(open_map(&pins, "FLOWS")?);
        let programs = Programs::load(&mut ebpf, cgroup.into(), cgroup_id, older)?;
        let redirect = config.redirect_peer.then(|| Redirect::take(&mut ebpf)).transpose()?;
        let log = Mutex::new(Some(KernelLog::take(&mut ebpf)?));
        let events = Mutex::new(Some(KernelEvents::take(&mut ebpf)?));
        let generation_key = direct::generation_key(&open_map(&pins, "SECRETS")?)?;
        let pending = maps::typed(&mut ebpf, "PENDING")?;
        let pending = Pending::new(pending, config.max_pods, &programs.older())?;
        let networks = maps::typed(&mut ebpf, "NETWORKS")?;
        let pods = Pods::new(maps::Maps::take(&mut ebpf, config)?, networks, routes)?;

        let capture = Self {
            everything: pods.everything(),
            pods: Mutex::new(pods),
            programs,
            redirect,
            pins,
            control,
            told: Mutex::new(Control {
                heartbeat_ns: 0,
                pending: pending.count(),
                no_direct: 0,
                ..before
            }),
            pending: Mutex::new(pending),
            heartbeat: Heartbeat::after(before.heartbeat_ns),
            sock_meta,
            flows,
            log,
            events,
            generation_key,
        };
        capture.beat();
        capture.programs.attach_hooks(&capture.pins)?;
        if capture.programs.older().is_empty() && capture.is_heard() == Some(false) {
            return Err(CaptureError::Outside { cgroup: config.cgroup.clone() });
        }
        attach::remove_dead_lookups(capture.pins.dir())?;
        Ok(capture)
    }

    /// Whether the programs see what this process connects: its deliveries would come back to it otherwise. Nothing if
    /// that cannot be told.
    fn is_heard(&self) -> Option<bool> {
        let announced = || lock(&self.pods).maps.counter(Counter::DeliveryAnnounced);
        let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).ok()?;
        self.exempt(socket.as_fd(), Role::Deliver).ok()?;
        let before = announced();
        match socket.connect(&nobody.local_addr().ok()?.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => None,
            _ => Some(announced() > before),
        }
    }

    /// Makes these the addresses of the mesh, whose connections are captured, and with them those in
    /// `blocks` that are not left alone there. Additions come first: an address that moves from one service
    /// to another is never missing. If they do not fit, enrolled pods capture everything until they do.
    ///
    /// # Errors
    ///
    /// The kernel refuses a change, and it is not certain that all of them are captured: call it again.
    pub fn set_destinations(
        &self,
        wanted: &HashSet<IpAddr>,
        blocks: &HashMap<Cidr, Block>,
    ) -> Result<Destinations, CaptureError> {
        let hold_back = |everything| self.hold_back_everything(everything);
        lock(&self.pods).set_destinations(wanted, blocks, hold_back)
    }

    /// The addresses that are left alone in blocks that are not, and to which pods have connected since
    /// this was last asked.
    pub fn take_used(&self) -> Vec<IpAddr> {
        lock(&self.pods).networks.take_used()
    }

    /// Opens listeners in the pod's namespace and captures its connections, in both directions. Where
    /// the pod keeps client addresses, its namespace gets the routes that this needs.
    ///
    /// A pod that is enrolled already moves to the new listeners without a gap; what is queued on the
    /// old ones is the caller's to accept. After an error a pod that nobody had enrolled before is left
    /// alone again; of any other nothing is promised but that enrolling it again or [`Self::leave`] puts
    /// it right.
    ///
    /// # Errors
    ///
    /// Another pod has the address, the namespace cannot be entered, a map is full.
    pub fn enrol(&self, pod: &PodCapture<'_>) -> Result<Listeners, CaptureError> {
        let mut pods = lock(&self.pods);
        if let Some(predecessor) = pod.predecessor
            && self.redirect.is_some()
        {
            redirect::unplug(&mut pods.maps, &self.pins, predecessor)?;
        }
        let attach = || self.programs.attach_lookup(&self.pins, pod);
        let detach = |uid: &str| attach::remove_lookup(&self.pins.lookup(uid));
        let was_linked = self.programs.has_lookup(&self.pins, pod.uid);
        pods.enrol(pod, was_linked, attach, detach).inspect_err(|_error| {
            // What an agent of another layout knew of it ends with `take_over`.
            if was_linked && let Err(error) = inherit::refuse_pod(&mut pods, pod, attach) {
                let error = crate::telemetry::chain(&error);
                tracing::warn!(error, pod = pod.uid, stage = "capture", "may talk in plain text");
            }
        })
    }

    /// Changes how an enrolled pod takes part, for connections from now on.
    ///
    /// # Errors
    ///
    /// The pod is not enrolled, a map is full.
    pub fn update(&self, uid: &str, settings: &Settings) -> Result<(), CaptureError> {
        let mut pods = lock(&self.pods);
        // Strict first and permissive last: if anything fails in between, too much is refused.
        if settings.mode == Mode::Strict && pods.is_enrolled(uid) {
            self.programs.set_mode(&self.pins, uid, Mode::Strict)?;
        }
        pods.update(uid, settings)?;
        if settings.mode == Mode::Permissive {
            self.programs.set_mode(&self.pins, uid, Mode::Permissive)?;
        }
        Ok(())
    }

    /// Stops capturing the pod's connections. Established ones and the listeners are the caller's: keep
    /// accepting for a moment, since a SYN may be under way. The routes for client addresses go when the
    /// last delivery that needs them has ended: [`Self::retire_routes`].
    ///
    /// # Errors
    ///
    /// The pod is not enrolled.
    pub fn leave(&self, uid: &str) -> Result<(), CaptureError> {
        let mut pods = lock(&self.pods);
        if self.redirect.is_some() {
            redirect::unplug(&mut pods.maps, &self.pins, uid)?;
        }
        pods.leave(uid, || attach::remove_lookup(&self.pins.lookup(uid)))
    }

    /// Ends what an earlier agent left: call it once, when the pods of this node are known and those
    /// that could be have been enrolled. Lets go of pods that are neither enrolled nor in `uids` nor in
    /// one of the `namespaces` (cookies), where a successor could not be enrolled yet; and after an
    /// upgrade moves the programs of the older agent to this one. What that one had captured and is not
    /// enrolled is refused in both directions, as long as one of `uids` that it had captured is not: nobody
    /// knows which of its pods is which.
    ///
    /// # Errors
    ///
    /// Something in the older agent's directory is not ours.
    pub fn retain(
        &self,
        uids: &HashSet<String>,
        namespaces: &HashSet<u64>,
    ) -> Result<(), CaptureError> {
        let mut pods = lock(&self.pods);
        let keep: HashSet<String> =
            pods.uids().map(str::to_owned).chain(uids.iter().cloned()).collect();
        self.programs.adopt_lookups(&self.pins, &keep)?;
        attach::remove_dead_lookups(self.pins.dir())?;
        let linked = self.pins.lookups()?;
        let captured = linked.iter().map(|(uid, _path)| uid.as_str());
        // Read once: this is asked for at every change of anything. What is written next is to stay.
        let owners = pods.maps.owners()?;
        let nameless = Nameless::of(&owners, captured.filter(|uid| uids.contains(*uid)));
        inherit::refuse_nameless(&mut pods, &self.programs.older(), nameless, namespaces);
        // Before their entries, as in `leave`.
        for (uid, path) in &linked {
            if !keep.contains(uid) {
                attach::remove_lookup(path)?;
            }
        }
        pods.retain(uids, namespaces, &owners, nameless)?;
        redirect::retain(&mut pods.maps, &self.pins, &keep)?;
        let permissive = pods.permissive();
        let inherit = |layout: &Path| events::inherit(&mut pods.maps, layout);
        self.programs.take_over(&self.pins, &permissive, inherit)
    }

    /// Takes the routes for client addresses away from namespaces whose pod has left, or does not show
    /// clients any more, once no connection lives by them. Says whether some are left: ask again.
    pub fn retire_routes(&self) -> bool {
        lock(&self.pods).routes.retire()
    }

    /// Hands packets between the enrolled pods over past the node, as far as it can be done, and says of
    /// each pod, by UID, whether it is. Nothing if this is not asked for. For the thread that entered no
    /// pod's namespace; again after every change of pods, and from time to time, since devices change
    /// without a word.
    pub fn redirect(&self) -> Vec<(String, Result<(), NotRedirected>)> {
        let Some(redirect) = &self.redirect else {
            return Vec::new();
        };
        let mut pods = lock(&self.pods);
        let mut plugged = Vec::new();
        for (uid, ips, netns) in pods.places() {
            let done = redirect.plug_in(&mut pods.maps, &self.pins, &uid, &ips, &netns);
            plugged.push((uid, done));
        }
        plugged
    }

    /// Keeps a socket of the agent out of capture. Before `connect()`; it may be forgotten for sockets
    /// of the agent's own namespace, where nothing is enrolled.
    ///
    /// # Errors
    ///
    /// The kernel has no memory left for the socket's storage.
    pub fn exempt(&self, socket: BorrowedFd<'_>, role: Role) -> io::Result<()> {
        let role = match role {
            Role::Agent => ROLE_AGENT,
            Role::Deliver => ROLE_DELIVER,
        };
        sys::update(self.sock_meta.as_fd(), &socket.as_raw_fd(), &SockMeta::of(role))
    }

    /// A worker's own handle to the table of original destinations.
    pub fn orig_dst_table(&self) -> OrigDstTable {
        OrigDstTable::new(Arc::clone(&self.flows))
    }

    /// From now on connections from the cgroup with this ID, made in the namespace `node`, reach the
    /// applications of enrolled pods in any mode: they are the kubelet's. `None`: nobody's do.
    pub fn let_kubelet_in(&self, node: &Netns, cgroup: Option<u64>) {
        let mut told = lock(&self.told);
        told.node_netns = node.cookie();
        told.kubelet_cgroup = cgroup.unwrap_or_default();
        self.tell(&mut told);
    }

    /// What the programs counted since the maps were made, by reason. One that cannot be read is left
    /// out.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        lock(&self.pods).maps.counters()
    }

    /// What the programs tell, for one reader: `None` after the first call.
    pub fn take_log(&self) -> Option<KernelLog> {
        lock(&self.log).take()
    }

    /// Whether an agent that uses pins under `bpffs` tells the programs that it lives. Where one has ended within
    /// the last seconds this waits for a beat that does not come.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub fn is_beating(bpffs: &Path) -> Result<bool, CaptureError> {
        let before = pins::heartbeats(bpffs)?;
        // One that carries nothing says so with a beat that is a little older than that, and goes on.
        let silent = sys::boot_ns().saturating_sub(2 * STALE_NS);
        if before.iter().all(|beat| *beat < silent) {
            return Ok(false);
        }
        thread::sleep(BEATS);
        // Pins that went away meanwhile tell nothing.
        Ok(pins::heartbeats(bpffs)?.iter().any(|beat| !before.contains(beat)))
    }

    /// Detaches every program and removes every pin under `bpffs`, of this and of older agents, and the
    /// routes for client addresses in the namespaces that have them. For when no agent runs; a
    /// running one captures nothing any more and must be stopped.
    ///
    /// # Errors
    ///
    /// A pin cannot be removed.
    pub fn detach(bpffs: &Path) -> Result<Detached, CaptureError> {
        let (layouts, left) = pins::layouts(bpffs)?;
        let mut detached = Detached { left, ..Detached::default() };
        let mut inodes = HashSet::new();
        for layout in &layouts {
            inodes.extend(routes::noted(layout)?);
        }
        for layout in &layouts {
            detached.removed.extend(pins::remove_layout(layout)?);
        }
        detached.namespaces = routes::remove_from(inodes);
        // Stays when something else lies there, or the node has a bpffs mounted there: both are not ours.
        if mounted::remove_dir(bpffs) {
            detached.removed.push(bpffs.to_owned());
        }
        Ok(detached)
    }
}

/// Whether a connection on an inbound listener was steered there: nobody can dial the address that the
/// listener is bound to, so this is only false for what a pod with its own routes makes up.
pub fn was_steered(local: SocketAddr, pod_ips: &[IpAddr]) -> bool {
    pod_ips.contains(&local.ip().to_canonical())
}

/// A lock whose holder panicked protects maps that every operation leaves usable: go on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
