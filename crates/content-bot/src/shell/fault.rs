//! What can go wrong with git, sorted by what follows from it.

use git2::{ErrorClass, ErrorCode};

/// Why a commit is not in the mirror.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Our own mirror is broken: it can be made anew.
    #[error("the mirror is damaged: {0}")]
    Damaged(String),
    /// Objects of the commit are missing although the origin was asked for all of them.
    #[error("{0}")]
    Incomplete(String),
    /// The commit breaks a rule for content.
    #[error("{0}")]
    Unfit(String),
    /// The origin does not give the commit out.
    #[error("the origin does not give out the commit")]
    Vanished,
    /// The network, the origin or the disk; another time it may work.
    #[error("{0}")]
    Failed(String),
}

impl Fault {
    /// An error of an operation that touches nothing but the mirror.
    #[must_use]
    pub fn local(error: &git2::Error) -> Self {
        match error.class() {
            ErrorClass::Os | ErrorClass::Filesystem if error.code() != ErrorCode::NotFound => {
                Self::Failed(error.message().to_owned())
            }
            ErrorClass::NoMemory | ErrorClass::Thread => Self::Failed(error.message().to_owned()),
            _ => Self::Damaged(error.message().to_owned()),
        }
    }
}

/// Whether an error of an operation with the origin tells of the origin or the way to it, not of our mirror.
#[must_use]
pub fn is_remote(error: &git2::Error) -> bool {
    let by_code = matches!(
        error.code(),
        ErrorCode::Auth | ErrorCode::Certificate | ErrorCode::Timeout | ErrorCode::Eof | ErrorCode::Owner
    );
    let by_class = matches!(
        error.class(),
        ErrorClass::Net
            | ErrorClass::Http
            | ErrorClass::Ssh
            | ErrorClass::Ssl
            | ErrorClass::Os
            | ErrorClass::Callback
            | ErrorClass::NoMemory
            | ErrorClass::Thread
    );
    by_code || by_class
}
