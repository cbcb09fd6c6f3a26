//! The postgres bot: keeps a Postgres cluster available, with one writable primary, always.
//!
//! [`machine`] decides; `shell` (feature `shell`) observes the server and performs.

pub mod machine;
#[cfg(feature = "shell")]
pub mod shell;
