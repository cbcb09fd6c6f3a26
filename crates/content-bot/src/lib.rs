//! The content bot: watches a git repository, verifies what is pushed, publishes one commit for every web bot to serve.

pub mod machine;
#[cfg(feature = "shell")]
pub mod shell;
