//! What befalls a cluster as a whole, and what those who run it do to all of it while it is used. Each test has
//! all agents to itself, and nothing else works there meanwhile: so they have a cluster of their own, beside the one
//! of the other tests.

mod outage;
mod rotation;
mod scaling;
mod shipped;
