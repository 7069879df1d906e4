//! The harness of the end-to-end tests: nodes and pods made of network namespaces, and the real
//! agent on each node.
//!
//! ```no_run
//! use harness::{Mesh, Serve, exchange};
//!
//! # fn main() -> anyhow::Result<()> {
//! harness::require!();
//! let mesh = Mesh::two_nodes()?; // a1 and a2 on node a, b1 and b2 on node b, agents ready
//! let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
//! let mut stream = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
//! exchange(&mut stream, b"hello")?;
//! # Ok(())
//! # }
//! ```
//!
//! Guarantees: nothing here touches the machine's own network; everything that is made carries the
//! process id in its name and is removed when the [`Mesh`] is dropped, also by a panic; tests of one
//! process may run side by side. What a killed process left is removed by a small process that
//! outlives it, and if that one was killed too, by `cargo xtask clean`.
//!
//! A test begins with [`require!`]: it is skipped, loudly and counted, where this machine lacks what
//! it needs.

mod access_log;
mod agent;
mod cgroup;
mod cluster;
mod guard;
mod hop;
mod interrupt;
mod load;
pub mod long;
mod manifests;
mod mesh;
mod metrics;
mod netns;
mod pem;
mod pod;
mod serve;
mod skip;
mod sys;
mod topology;
mod traffic;
pub mod wait;

pub use self::access_log::Record;
pub use self::agent::{Agent, Cli, Predecessor};
pub use self::cgroup::Cgroup;
pub use self::cluster::{
    ANSWERS, Agents, Cluster, Deployment, Frozen, Outage, OwnAgents, PodProcess, SERVERS,
    SharedAgents, Shop, SignerProcess, Stopped, User, enabled, host, service_of_pods, xtask,
};
pub use self::hop::{Fate, Hop};
pub use self::interrupt::Interrupt;
pub use self::load::Load;
pub use self::manifests::Manifests;
pub use self::mesh::{Mesh, Node, Service, init_ca};
pub use self::metrics::Metrics;
pub use self::netns::Netns;
pub use self::pem::{base64, certificates, is_believed, unbase64};
pub use self::pod::{Pod, Process};
pub use self::serve::{Serve, Server};
pub use self::skip::{missing, missing_in_kernel, skipped};
pub use self::topology::{Builder, Carrier, Family, PodSpec, ServiceSpec};
pub use self::traffic::{
    Pattern, defer_connect, exchange, exchange_patterns, fill, has_failed, is_reset, linger_zero,
    receive_pattern, send_pattern,
};
