//! `postgres-bot guard`: a small process that is the parent of one run of the server, and outlives the bot.
//!
//! It knows one number, the *fence*: the moment at which the lease that lets the server take writes may have run out, less
//! a margin. The bot moves the fence on with every renewal. A bot that is killed, frozen or stuck does not, and then the
//! guard kills every process of the server in time. A bot that comes back before that finds the server as it was. A standby
//! has no fence: it goes on for as long as nobody stops it.
//!
//! Along with the fence the bot may have it hold a watchdog device, for the case that the machine stands still as a whole.
//!
//! No threads, no runtime, no configuration, no etcd: what is not here cannot hang. If the guard itself dies, the kernel
//! tells the postmaster to stop at once.

mod ioctl;
mod line;
mod link;
mod process;
mod watchdog;

pub use self::{
    line::{Ended, Fence},
    link::Link,
    process::{Options, run},
    watchdog::Watch,
};

/// The first argument that makes `postgres-bot` a guard.
pub const COMMAND: &str = "guard";

/// What a guard calls itself, so that it is known by its number.
const NAME: &std::ffi::CStr = c"postgres-guard";

/// Whether the process of this number is a guard: numbers are given out again.
#[must_use]
pub fn is_guard(pid: rustix::process::Pid) -> bool {
    let name = std::fs::read(format!("/proc/{}/comm", pid.as_raw_nonzero()));
    name.is_ok_and(|name| name.trim_ascii_end() == NAME.to_bytes())
}
