//! The web bot: serves one published revision, wakes when load asks for it, drains when load is gone.
//!
//! [`machine`] decides and touches nothing. The shell (feature `shell`) serves requests, fetches content, supervises the
//! app and decides nothing.

pub mod machine;
#[cfg(feature = "shell")]
pub mod shell;
