//! Where requests go: the machine's word to the data plane.

use serde::Serialize;

/// Where requests go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Route {
    /// Nowhere: 503, naming the state, with the advice to try again soon.
    Refuse {
        /// The bot's role.
        state: String,
    },
    /// Wait a little: the app is about to be there.
    Hold,
    /// To the files of a commit.
    Static {
        /// The commit.
        sha: String,
        /// Ask clients to close their connections: we are leaving.
        closing: bool,
    },
    /// To an instance of the app.
    App {
        /// The instance.
        instance: u64,
        /// The commit that it was started on.
        sha: String,
        /// Ask clients to close their connections: we are leaving.
        closing: bool,
    },
}

impl Route {
    /// The commit that responses come from.
    #[must_use]
    pub fn sha(&self) -> Option<&str> {
        match self {
            Self::Static { sha, .. } | Self::App { sha, .. } => Some(sha),
            Self::Refuse { .. } | Self::Hold => None,
        }
    }
}
