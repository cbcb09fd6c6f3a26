//! The edge bot: points a real proxy (HAProxy) at the primary, the replicas and the serving web bots.

pub mod machine;
#[cfg(feature = "shell")]
pub mod shell;
