//! The four rules that make something a bot, and what every bot shares.
//!
//! The pure half (`machine`, `dcs`, `wire`, `membership`, `leadership`) holds no clock, no I/O and no randomness: it is
//! what the machines and the simulator build on. The `shell` half (feature `shell`) touches the world: etcd, HTTP,
//! clocks, configuration files, logs. It is not a place for decisions.

pub mod dcs;
pub mod leadership;
pub mod machine;
pub mod membership;
#[cfg(feature = "shell")]
pub mod shell;
pub mod wire;
