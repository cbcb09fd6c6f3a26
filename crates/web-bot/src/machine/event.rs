//! What can happen to a web bot, and what it can ask of the world.

use bots_core::{
    dcs::{DcsAction, DcsEvent},
    machine::Span,
    membership::MembershipAction,
    wire::WebLoad,
};
use serde::Serialize;

use super::{Live, Route};

/// Everything that can happen to it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum Event {
    /// From the store.
    Dcs(DcsEvent),
    /// The instance that answered at the probed address, or nothing if nobody did.
    NameProbed {
        /// Its `instance`.
        instance: Option<String>,
    },
    /// The armed deadline has passed.
    TimerFired,
    /// An operator or the system wants the bot to end; a second time: at once.
    ShutdownRequested,
    /// The bot's configuration was read again: what of it can change while the bot runs is this now.
    Reconfigured(Live),
    /// A commit stands ready: fetched, whole, verified, unpacked as the mode needs it.
    ContentPrepared {
        /// The number of the preparation.
        id: u64,
        /// The commit.
        sha: String,
    },
    /// A commit could not be prepared this time: nobody gave it, or the disk failed.
    ContentFailed {
        /// The number of the preparation.
        id: u64,
        /// The commit.
        sha: String,
        /// One line: what failed and how to mend it.
        why: String,
    },
    /// A commit can never be served by this bot as it is set up, whoever gives it.
    ContentRefused {
        /// The number of the preparation.
        id: u64,
        /// The commit.
        sha: String,
        /// One line: what is wrong with it and how to mend it.
        why: String,
    },
    /// An instance of the app answers its health check, for the first time or again after [`Event::AppHung`].
    AppReady {
        /// The instance.
        instance: u64,
    },
    /// An instance that was ready has missed several health checks in a row, and its process lives. Said again for as long as
    /// that goes on.
    AppHung {
        /// The instance.
        instance: u64,
        /// One line: what came of the last check.
        how: String,
    },
    /// An instance of the app has ended.
    AppExited {
        /// The instance.
        instance: u64,
        /// One line: its exit status.
        how: String,
    },
    /// An instance of the app could not be started. That is never the commit's fault: the program is the bot's own setting.
    AppNotStarted {
        /// The instance.
        instance: u64,
        /// One line: what kept it from starting.
        how: String,
    },
    /// The primary of the database was asked whether it answers.
    DatabaseProbed {
        /// The number of the question.
        id: u64,
        /// Whether it did, in time.
        answers: bool,
    },
    /// How busy the data plane was of late.
    LoadMeasured(WebLoad),
    /// Work on this machine has waited for a processor for much of the last seconds.
    ProcessorStalled,
    /// No request is in flight any more.
    InFlightEnded {
        /// The number of the drain that asked.
        id: u64,
    },
}

/// Everything it can ask of the world.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum Action {
    /// Ask the store.
    Dcs(DcsAction),
    /// Ask the bot that seems to hold our name who it is. Answered by [`Event::NameProbed`].
    ProbeName {
        /// Where its API answers.
        api_url: String,
    },
    /// Make a commit ready: from disk if it is there, else from the packs in order, else from the origin. Answered by
    /// [`Event::ContentPrepared`] once every object is durable and verified, by [`Event::ContentRefused`] if it is and can
    /// never be served, or by [`Event::ContentFailed`].
    PrepareContent {
        /// The number of the preparation.
        id: u64,
        /// The commit.
        sha: String,
        /// Where packs of it may be had, the best first.
        pack_urls: Vec<String>,
        /// The repository to fetch from if no pack can be had; empty if it is to be spared yet.
        origin: String,
        /// The branch or tag that leads to it there.
        reference: String,
    },
    /// Keep these commits; delete what else is on disk or in memory.
    RetainContent {
        /// The commits.
        shas: Vec<String>,
    },
    /// Start an instance of the app on a prepared commit. Answered by [`Event::AppReady`] once it is healthy, by
    /// [`Event::AppHung`] if it is not any more, and by [`Event::AppExited`] when it ends, at whatever time; or by
    /// [`Event::AppNotStarted`] alone.
    StartApp {
        /// The instance.
        instance: u64,
        /// The commit.
        sha: String,
        /// The hosts of the database, `host:port`.
        database_hosts: Vec<String>,
        /// The CDN's base URL.
        cdn_url: Option<String>,
        /// How it is run: [`Live::configuration`].
        configuration: u64,
    },
    /// Stop an instance that no new request is sent to: let its requests end, SIGTERM, SIGKILL.
    StopApp {
        /// The instance.
        instance: u64,
        /// How long its requests in flight may take.
        drain: Span,
        /// How long it may then take to end by itself.
        grace: Span,
    },
    /// Ask the server at `address` whether it answers as Postgres does. Answered by [`Event::DatabaseProbed`], soon and in any
    /// case.
    ProbeDatabase {
        /// The number of the question.
        id: u64,
        /// `host:port`.
        address: String,
    },
    /// Send requests there from now on, all at once: a request that has begun keeps the route that it began with.
    SetRoute(Route),
    /// Say when no request is in flight, by [`Event::InFlightEnded`].
    AwaitInFlight {
        /// The number of the drain.
        id: u64,
    },
    /// End the process, after everything before it was sent.
    Exit {
        /// 0: asked to. 3: the world contradicts us.
        code: u8,
        /// One line for the log.
        message: String,
    },
}

impl From<MembershipAction> for Action {
    fn from(action: MembershipAction) -> Self {
        match action {
            MembershipAction::Dcs(action) => Self::Dcs(action),
            MembershipAction::ProbeName { api_url } => Self::ProbeName { api_url },
        }
    }
}
