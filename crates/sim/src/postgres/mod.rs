//! A simulated Postgres server: a data directory that survives, a process that does not, and jobs between them. It behaves
//! as the real one does where that matters to a bot: what is durable, who can follow whom, when writes are accepted.

mod jobs;
mod perform;
mod process;
mod streaming;
mod synchronous;
mod wal;

use bots_core::{
    machine::{Span, Time},
    wire::{Lsn, Timeline},
};
use postgres_bot::machine::{DataDir, Job, JobId, Postgres, Running, Server, WatchdogOrder};

pub(crate) use self::process::End;
pub use self::{synchronous::Commits, wal::Wal};
use crate::{plant::Plant, world::NodeId};

/// Longer than any world goes on.
const NEVER: Span = Span::from_secs(86_400);

/// What is in a data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Contents {
    /// Nothing.
    #[default]
    Empty,
    /// A cut-off bootstrap or clone.
    Unfinished {
        /// It was being copied.
        cloning: bool,
    },
    /// A cluster.
    Present,
}

/// A data directory; it outlives everything but its own removal.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    /// What is in it.
    pub contents: Contents,
    /// The system identifier, once there is one.
    pub system_id: Option<String>,
    /// There is a `standby.signal`.
    pub standby: bool,
    /// Whom `primary_conninfo` names.
    pub upstream: Option<String>,
    /// The timeline in the control file: that of the last checkpoint.
    pub control_timeline: Timeline,
    /// The log; what is in it is on disk.
    pub wal: Wal,
    /// Pages of two histories are mixed in it: nothing starts on it.
    pub torn: bool,
    /// It was rewound, and cannot be used before the source's log is there to the end.
    pub rewound: bool,
    /// The newest timeline whose history file was ever fetched; a promotion goes beyond it.
    pub history_seen: Timeline,
}

/// A standby's connection to the server that it follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Whom it follows.
    pub to: NodeId,
    /// Which run of that server.
    pub run: u64,
    /// Something is on its way.
    pub(crate) busy: bool,
    /// For how many looks nothing was heard.
    pub(crate) silent: u32,
}

/// The server's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Process {
    /// There is none.
    #[default]
    Down,
    /// Recovering, and not open to clients yet.
    Starting {
        /// It will accept writes once it is up.
        primary: bool,
    },
    /// Open to clients.
    Up {
        /// Read-only.
        in_recovery: bool,
        /// A promotion is under way.
        promoting: bool,
    },
    /// Shutting down: closed to clients.
    Stopping,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RunningJob {
    id: JobId,
    job: Job,
    serial: u64,
    /// The run of the server that the job copies from, as it was when it began.
    source_run: Option<u64>,
}

/// A server with its data.
#[derive(Debug, Default)]
pub struct PostgresBody {
    /// The data directory.
    pub disk: Disk,
    /// The process.
    pub process: Process,
    /// Grows with every start of the process.
    pub run: u64,
    /// Whom it streams from.
    pub link: Option<Link>,
    /// The timeline that the server leaves recovery for: the one asked for, or beyond any that it has heard of.
    promoting_to: Timeline,
    job: Option<RunningJob>,
    jobs: u64,
    told: Postgres,
    /// The end of the process is decided already.
    ending: bool,
    /// Where its shutdown checkpoint is, as long as its archiver has more to do.
    closed: Option<Lsn>,
    /// When its guard kills it, on the machine's own clock; nothing if it takes no writes.
    pub fence: Option<Time>,
    /// Where the bot wants the fence of the next server that takes writes.
    wanted_fence: Option<Time>,
    /// What the guard was told and has not read.
    unread: Option<(Time, Option<WatchdogOrder>)>,
    /// Its processes are gone, and the bot waits for a guard that does not say so.
    unburied: bool,
    /// When the machine's watchdog device resets it at the latest, on its own clock, if the fence is moved on no more.
    pub device: Option<Time>,
    /// It lives and answers nobody.
    silent: bool,
    /// The disk takes no writes, as far as the bot can see, and what it was told of that.
    stalled: bool,
    told_stalled: bool,
    /// It runs on since before its bot was started, which has not taken it over yet.
    kept: bool,
    /// The bot that came back has not heard its guard.
    unheard: bool,
    /// What its commits wait for.
    pub commits: Commits,
}

/// Something that a server or a job on it comes to.
#[derive(Debug)]
pub(crate) enum ServerItem {
    /// The server is open to clients.
    Ready { run: u64 },
    /// The server has left recovery.
    Promoted { run: u64 },
    /// A server that has begun to take writes when its guard was about to kill it must be gone.
    StillWritable { run: u64 },
    /// Nothing of the server is left but its archiver.
    Closed { run: u64 },
    /// The process is gone.
    Gone { run: u64, end: End },
    /// The bot has waited long enough for the guard of a server that is gone.
    Buried { run: u64, life: u64, end: End, checkpoint: Option<Lsn> },
    /// A job is done, or has failed.
    JobDone { serial: u64 },
    /// WAL arrives, or a look whether the connection still stands.
    Stream { run: u64 },
    /// A standby tries to connect.
    Connect { run: u64 },
    /// The bot's shell looks at the server, as it does every second.
    Look { life: u64 },
    /// The bot asked for a look.
    Observe { life: u64 },
    /// The bot asked for a look at the data directory.
    Inspect { life: u64 },
    /// A guard's deadline.
    Guard { run: u64 },
    /// The processes of the server read their files again.
    Reload { run: u64, life: u64 },
    /// A standby has reported how much it has on disk.
    Flushed { standby: NodeId, run: u64, at: Lsn },
    /// A standby that was just started has replayed what it had.
    Replayed { run: u64 },
}

impl PostgresBody {
    /// Whether a client's write would be accepted at this moment, if the machine moves.
    #[must_use]
    pub const fn accepts_writes(&self) -> bool {
        matches!(self.process, Process::Up { in_recovery: false, .. })
    }

    /// Whether it accepts writes, or will by itself.
    #[must_use]
    pub const fn may_take_writes(&self) -> bool {
        matches!(
            self.process,
            Process::Up { in_recovery: false, .. }
                | Process::Up { promoting: true, .. }
                | Process::Starting { primary: true }
        )
    }

    /// Until when it may take writes as far as its bot knows, which stops it before.
    #[must_use]
    pub fn fence_wanted(&self) -> Option<Time> {
        self.fence.map(|fence| self.wanted_fence.map_or(fence, |wanted| wanted.max(fence)))
    }

    /// Whether it runs on since before its bot was started.
    pub(crate) const fn is_kept(&self) -> bool {
        self.kept
    }

    /// Whether its bot is gone, or its end is decided.
    pub(crate) const fn is_left_alone(&self) -> bool {
        self.kept || self.ending
    }

    /// Whether it follows another server at this moment.
    #[must_use]
    pub const fn streams(&self) -> bool {
        self.link.is_some()
    }

    /// What the server says of itself.
    #[must_use]
    pub fn facts(&self) -> Option<Server> {
        let Process::Up { in_recovery, .. } = self.process else { return None };
        // What is not replayed yet does not show.
        let hidden = if in_recovery { self.commits.hidden } else { 0 };
        let position = self.disk.wal.end_before(hidden);
        let standby = |lsn: Lsn| if in_recovery { lsn } else { Lsn(0) };
        Some(Server {
            in_recovery,
            timeline: self.disk.wal.timeline(),
            position,
            received: standby(position),
            replayed: standby(position),
            streaming: self.link.is_some(),
            settled: in_recovery && hidden == 0,
            ..Server::default()
        })
    }

    /// What a look at the process shows.
    fn observed(&self) -> Option<Postgres> {
        match self.process {
            Process::Up { .. } if self.silent => Some(Postgres::Silent),
            Process::Up { .. } => self.facts().map(Postgres::Up),
            Process::Starting { .. } => Some(Postgres::Starting),
            Process::Down | Process::Stopping => None,
        }
    }

    /// What a look at the data directory shows, to who hears the guard or does not.
    fn inspected(&self, guard_moves: bool, plant: Option<Plant>) -> DataDir {
        let unknown = plant == Some(Plant::EarlierFenceUnknown);
        let fence = self.fence.map(|at| if unknown { at + NEVER } else { at });
        let running = match (self.process, self.kept && guard_moves) {
            (Process::Down, _) => Running::No,
            (_, true) => Running::Guarded { fence },
            (_, false) => Running::LeftBehind { fence: None },
        };
        match (self.disk.contents, &self.disk.system_id) {
            (Contents::Empty, _) | (Contents::Present, None) => DataDir::Empty,
            (Contents::Unfinished { cloning }, id) => DataDir::Unfinished { system_id: id.clone(), cloning, running },
            (Contents::Present, Some(id)) => DataDir::Present {
                system_id: id.clone(),
                timeline: self.disk.control_timeline,
                was_primary: !self.disk.standby,
                rewound: self.disk.rewound,
                running,
            },
        }
    }
}
