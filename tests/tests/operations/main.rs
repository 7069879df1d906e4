//! What those who run a cluster do to all of it while it is used, by one deployment of `deploy/` as it is. Nothing
//! else works there meanwhile: so this has a cluster of its own.

mod rotation;
mod scaling;
mod shipped;
