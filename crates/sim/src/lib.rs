//! The whole fleet in one thread, on simulated time, from one seed.
//!
//! The machines are the real ones. Everything around them is simulated: etcd behind a network, clocks that run wrong,
//! processes that die, disks that stay, Postgres servers, a git repository, load. A seed decides all of it; the same
//! seed gives the same run, byte for byte. While faults happen nothing of [`check`] may be broken; when they have ended
//! the fleet must come to rest within [`world::CONVERGE_WITHIN`].
//!
//! It proves nothing about the shells: those meet real servers in `integration-tests`.

pub mod check;
pub mod clock;
pub mod content;
pub mod coverage;
pub mod ledger;
pub mod plan;
pub mod plant;
pub mod postgres;
pub mod queue;
pub mod rng;
pub mod run;
pub mod trace;
pub mod web;
pub mod world;
