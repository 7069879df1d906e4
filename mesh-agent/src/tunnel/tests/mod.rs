//! Both ends of the tunnel on loopback, with certificates made on the spot.

mod carriers;
mod hostile;
mod identity;
mod limits;
mod pool;
mod records;
mod restart;
mod session;
mod unreachable;
mod windows;
mod world;
