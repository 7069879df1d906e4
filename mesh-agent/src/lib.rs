//! Malla's node agent: captures the traffic of enrolled pods, carries it over mutual TLS, balances
//! it, decides who may talk to whom, and tells what happened.
//!
//! ```text
//! capture ─► orig_dst ─► route ─► balance ─► tunnel ═► authorize ─► deliver ─► telemetry
//!  kernel     kernel+map   pure     pure     mTLS wire    pure       local TCP   all stages
//! ```
//!
//! [`outbound`] and [`inbound`] are the only places that know this order; reading them top to bottom
//! is reading a connection's life.

pub mod admin;
pub mod agent;
pub mod capture;
pub mod cli;
pub mod dirwatch;
pub mod discovery;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
mod gate;
pub mod identity;
pub mod inbound;
pub mod known;
pub mod mounted;
pub mod net;
pub mod node;
pub mod opening;
pub mod outbound;
pub mod pod_cgroups;
pub mod polling;
pub mod processes;
pub mod relay;
pub mod serve;
pub mod telemetry;
pub mod tunnel;
pub mod workers;
