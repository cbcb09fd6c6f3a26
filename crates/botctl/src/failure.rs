//! How a command ends badly: one line for the operator and an exit code for the script.

use std::fmt;

/// The documented exit codes; 0 is success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    /// The command was understood and did not succeed.
    Failed = 1,
    /// The command line is wrong, or a question cannot be asked.
    Usage = 2,
    /// No etcd member answers, or what was asked of it may or may not have been done.
    Etcd = 3,
    /// No bot, scope or member of that name.
    NotFound = 4,
}

/// One clear line and the exit code that goes with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { code: Code::Failed, message: message.into() }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { code: Code::Usage, message: message.into() }
    }

    pub(crate) fn etcd(hosts: &str, error: &dyn fmt::Display) -> Self {
        let message = format!("etcd at {hosts} does not answer: {error}; name its members with --etcd or BOTCTL_ETCD");
        Self { code: Code::Etcd, message: one_line(&message) }
    }

    /// etcd may have done what it was asked, and has not said so.
    pub(crate) fn unknown(hosts: &str, error: &dyn fmt::Display) -> Self {
        let message = format!(
            "etcd at {hosts} was asked and did not say what came of it: {error}; it may have been done: look before you repeat it"
        );
        Self { code: Code::Etcd, message: one_line(&message) }
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self { code: Code::NotFound, message: message.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// The same text on one line.
pub(crate) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
