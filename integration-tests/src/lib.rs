//! The harness: a whole fleet of real programs on loopback, for the tests, the demo, the tour and the benchmarks.
//!
//! It looks at the fleet from outside only: etcd, HTTP, SQL, `/proc`. It starts the binaries that were built, waits for
//! conditions and never for luck, and leaves no process behind.

pub mod bots;
pub mod cache;
pub mod chaos;
pub mod clients;
pub mod demo;
pub mod disk;
pub mod etcd;
pub mod fleet;
pub mod git;
pub mod ground;
pub mod http;
pub mod logs;
pub mod network;
pub mod orphans;
pub mod patroni;
pub mod process;
pub mod program;
mod random;
pub mod scratch;
pub mod sql;
pub mod steps;
pub mod store;
pub mod torture;
pub mod usage;
pub mod varnish;
pub mod wait;
pub mod webhook;
pub mod writers;

pub use bots_core::shell::testing::{free_port, skipped};
pub use fleet::Fleet;
