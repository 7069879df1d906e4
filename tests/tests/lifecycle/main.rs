//! Pods come into the mesh and leave it, agents end and start, and programs keep running.

mod agents;
mod pods;
