//! The contract between the eBPF programs and the agent.
#![cfg_attr(not(test), no_std)]
