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
    /// The commit seems to break one; who says so may say otherwise another time.
    #[error("{0}")]
    Doubtful(String),
    /// The origin does not give the commit out.
    #[error("the origin does not give out the commit")]
    Vanished,
    /// Whoever was asked refuses, and will another time.
    #[error("{0}")]
    Refused(String),
    /// The network, the origin or the disk; another time it may work.
    #[error("{0}")]
    Failed(String),
}

impl Fault {
    /// Whether objects are broken or gone, so that to try again is in vain as long as they are not fetched again.
    #[must_use]
    pub const fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged(_) | Self::Incomplete(_))
    }

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

/// Whether the origin was reached and will not give what it is asked for: it wants other credentials, or has no such repository.
#[must_use]
pub fn is_refusal(error: &git2::Error) -> bool {
    let refuses =
        matches!(error.code(), ErrorCode::Auth | ErrorCode::Certificate | ErrorCode::NotFound | ErrorCode::Owner);
    let absent = ["status code: 401", "status code: 403", "status code: 404", "failed to resolve path"];
    refuses || absent.iter().any(|words| error.message().contains(words))
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

#[cfg(test)]
mod tests {
    use git2::{Error, ErrorClass, ErrorCode};

    use super::Fault;

    #[test]
    fn a_full_disk_is_no_damage() {
        let local = |class, code| Fault::local(&Error::new(code, class, "it does not work"));
        for class in [ErrorClass::Os, ErrorClass::Filesystem, ErrorClass::NoMemory] {
            assert!(!local(class, ErrorCode::GenericError).is_damage(), "{class:?}");
        }
        assert!(local(ErrorClass::Odb, ErrorCode::NotFound).is_damage());
        assert!(local(ErrorClass::Zlib, ErrorCode::GenericError).is_damage());
        assert!(Fault::Incomplete(String::from("a tree is missing")).is_damage());
        assert!(!Fault::Failed(String::from("not done within 5 s")).is_damage());
    }
}
