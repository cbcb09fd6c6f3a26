//! Everything that can happen to a postgres bot and everything it can ask for. Plain data.

use std::{collections::BTreeMap, fmt};

use bots_core::{
    dcs::{DcsAction, DcsEvent, Revision},
    machine::{Span, Time},
    wire::{Lsn, Timeline},
};
use serde::{Deserialize, Serialize};

use super::{
    operator::{Command, CommandId},
    postgres::{DataDir, Disk, LeaderSlots, Postgres, SlotKind, Upstream},
    settings::Rules,
    watchdog::WatchdogOrder,
};

/// Ties the end of a job to its start; an end with another number is old news.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub u64);

/// Ties the answers of peers to the question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ProbeId(pub u64);

/// Ties the answers of members to a question of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AskId(pub u64);

/// Ties our answer to the question of another member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AskedId(pub u64);

/// What members ask of each other in failsafe mode. A yes binds whoever says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// May I lead on without etcd?
    Lead {
        /// Who asks.
        leader: String,
        /// The creation of the lock that it held last.
        generation: Revision,
    },
    /// May I be elected?
    Stand {
        /// Who asks.
        candidate: String,
    },
}

/// Everything that can happen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// From etcd.
    Dcs(DcsEvent),
    /// Who answers at the address in the member key that bears our name.
    NameProbed {
        /// Its instance, or nothing if nobody answered.
        instance: Option<String>,
    },
    /// A deadline of the machine has passed.
    TimerFired,
    /// The process was asked to stop (SIGTERM, SIGINT).
    ShutdownRequested,
    /// The data directory was looked at.
    DataInspected(DataDir),
    /// The data directory or the programs cannot be used; the text says what and how to mend it.
    DataUnusable {
        /// One line.
        why: String,
        /// The exit code for it.
        code: u8,
    },
    /// The server was asked how it does; sent when the answer has changed.
    PostgresObserved(Postgres),
    /// The disk of the data directory was tried; sent when it has changed.
    DiskObserved(Disk),
    /// The watchdog device was looked at, without opening it, which would arm it; sent when it has changed.
    WatchdogSeen(Result<(), String>),
    /// The guard has opened the device or kept it alive, with this time-out in seconds, or cannot; sent when it has changed.
    WatchdogUsed(Result<u64, String>),
    /// The guard of a server that takes writes confirms where its fence stands, or has not done so for longer than its margin; sent when
    /// it has changed.
    GuardObserved {
        /// It does.
        answers: bool,
    },
    /// Parameters that the server would not take are left out, by name with its own words; sent when they have changed.
    ParametersRefused(BTreeMap<String, String>),
    /// The primary that a fast stop brings down has written its last word and sent it to whoever streams, and all that is left of
    /// it archives: it takes nothing any more. The stop goes on.
    PostgresClosed {
        /// The position of its shutdown checkpoint.
        shutdown_checkpoint: Lsn,
    },
    /// The postmaster died, and every process of that server is gone.
    PostgresExited {
        /// One line: the exit status or signal.
        how: String,
    },
    /// The peers answered, or their deadline has passed.
    PeersProbed {
        /// The question.
        id: ProbeId,
        /// The answers by member; who did not answer is missing.
        answers: BTreeMap<String, PeerAnswer>,
    },
    /// The leader was asked for its logical slots, as [`Action::LookAtSlots`] wants it, or could not be.
    LeaderSlotsSeen {
        /// The question.
        id: ProbeId,
        /// What it has, or why that is not known, on one line.
        seen: Result<LeaderSlots, String>,
    },
    /// Another member asks for our word.
    MemberAsked {
        /// The number that the answer shall bear.
        id: AskedId,
        /// What.
        ask: Ask,
    },
    /// A member has answered our question, or has not in time.
    MemberAnswered {
        /// The question.
        id: AskId,
        /// Who.
        member: String,
        /// Yes, or why not.
        answer: Result<(), String>,
    },
    /// An operator asks something of this member.
    Commanded {
        /// The number that the answer shall bear.
        id: CommandId,
        /// What.
        command: Command,
    },
    /// A copy under way has come this far.
    CopyProgressed {
        /// Bytes that have arrived.
        bytes_done: u64,
        /// Bytes that the source has announced.
        bytes_total: u64,
    },
    /// A job came to its end.
    JobEnded {
        /// Which.
        id: JobId,
        /// How.
        result: Result<JobResult, JobError>,
    },
}

/// What a peer says of its server when asked directly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAnswer {
    /// It accepts writes.
    pub is_primary: bool,
    /// Its timeline.
    pub timeline: Timeline,
    /// The greater of received and replayed.
    pub position: Lsn,
    /// It must not lead, by its own tag or state.
    pub may_lead: bool,
    /// Its `failover_priority`: who of several that hold the same goes first.
    pub priority: u32,
    /// The position is of this moment and all that it has. Only then may it count as a vote.
    pub sure: bool,
}

/// How to stop a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopMode {
    /// Roll back what runs, write a shutdown checkpoint, let replicas receive it.
    Fast,
    /// Stop at once; whatever lives after `kill_after` is killed, backends included.
    Immediate {
        /// How long the server may take.
        kill_after: Span,
    },
}

/// Long work: started by an action, ended by [`Event::JobEnded`] with the same number. At most one runs at a time,
/// except that a stop may overtake any other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Job {
    /// `initdb` into the empty data directory, which is marked unfinished first. Ends as [`JobResult::Initialized`].
    Initialize,
    /// On the new, running primary: the superuser, replication and rewind roles, idempotent. Ends as [`JobResult::Done`].
    CreateRoles,
    /// Take the mark of an unfinished bootstrap or clone off the data directory. Ends as [`JobResult::Done`].
    Complete,
    /// Delete a data directory that is marked unfinished, and nothing else. Ends as [`JobResult::Done`].
    DiscardUnfinished {
        /// Delete what a rewind has left half done, too; else it is renamed out of the way, for it holds what nobody else may have.
        remove_rewound: bool,
    },
    /// Rename a diverged data directory out of the way, or delete it. Ends as [`JobResult::Done`].
    SetAside {
        /// Delete instead of keeping a copy.
        remove: bool,
        /// Only if this one sends its log to us: if it does not, a new copy would be of no more use than what is there.
        #[serde(default)]
        leader: Option<Upstream>,
    },
    /// `pg_basebackup` into the empty data directory, marked unfinished until done. Ends as [`JobResult::Done`].
    Clone {
        /// Where from.
        source: Upstream,
    },
    /// Have the server run as a primary, on the timeline it is on: started, or taken over as it runs in its guard's care.
    /// Ends as [`JobResult::Started`] once it takes queries. A fence must be set before.
    StartPrimary,
    /// Have it run read-only, following `upstream` if there is one: started, or taken over as it runs in its guard's care.
    /// Ends as [`JobResult::Started`] once it takes queries.
    StartStandby {
        /// Whom to follow.
        upstream: Option<Upstream>,
    },
    /// Follow another upstream without a restart, or none. Ends as [`JobResult::Done`]; with none, once nothing is received and
    /// nothing can be any more.
    Follow {
        /// Whom to follow.
        upstream: Option<Upstream>,
    },
    /// Leave recovery and become writable, on `timeline` and no other. Ends as [`JobResult::Promoted`] once writes are
    /// accepted. A fence must be set before, and the guard must have said that it stands; and that the device watches, if the
    /// order that was given with the fence requires it.
    Promote {
        /// A number that was taken for this.
        timeline: Timeline,
        /// Not before commits would wait for the standbys that the server is told of: the machine has named them, not the operator.
        heeds: bool,
        /// Copies of logical slots that are removed before, since they may lack something.
        #[serde(default)]
        without_slots: Vec<String>,
    },
    /// `CHECKPOINT`. Ends as [`JobResult::Done`].
    Checkpoint,
    /// End the sessions of clients as they come to rest, none in a transaction. Ends as [`JobResult::Done`] once there are
    /// none; may never end.
    Drain,
    /// Stop the server. Ends as [`JobResult::Stopped`] once every process of it is gone.
    Stop {
        /// How.
        mode: StopMode,
    },
    /// `pg_rewind` the stopped server, after crash recovery if it needs it. Ends as [`JobResult::Done`].
    Rewind {
        /// The present leader.
        source: Upstream,
    },
}

/// In the words of the report.
impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of =
            |upstream: &Option<Upstream>| upstream.as_ref().map_or_else(|| String::from("nobody"), |u| u.name.clone());
        match self {
            Self::Initialize => f.write_str("initdb"),
            Self::CreateRoles => f.write_str("create roles"),
            Self::Complete => f.write_str("take off the unfinished mark"),
            Self::DiscardUnfinished { .. } => f.write_str("discard the unfinished data"),
            Self::SetAside { remove: false, .. } => f.write_str("set the data aside"),
            Self::SetAside { remove: true, .. } => f.write_str("delete the diverged data"),
            Self::Clone { source } => write!(f, "clone {}", source.name),
            Self::StartPrimary => f.write_str("start as primary"),
            Self::StartStandby { upstream } => write!(f, "start as standby of {}", of(upstream)),
            Self::Follow { upstream } => write!(f, "follow {}", of(upstream)),
            Self::Promote { timeline, .. } => write!(f, "promote to timeline {timeline}"),
            Self::Checkpoint => f.write_str("checkpoint"),
            Self::Drain => f.write_str("end sessions"),
            Self::Stop { mode: StopMode::Fast } => f.write_str("stop, fast"),
            Self::Stop { mode: StopMode::Immediate { kill_after } } => {
                write!(f, "stop at once, kill after {kill_after}")
            }
            Self::Rewind { source } => write!(f, "rewind to {}", source.name),
        }
    }
}

/// One change of the replication slots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SlotChange {
    /// Make it; from then on it keeps the log.
    Create {
        /// Its name.
        name: String,
        /// What it is for.
        kind: SlotKind,
    },
    /// Let go of the log before this position.
    Advance {
        /// Its name.
        name: String,
        /// From here on, the log is kept.
        to: Lsn,
    },
    /// Move the copy of a logical slot on: its consumer has confirmed so much on the leader.
    Follow {
        /// Its name.
        name: String,
        /// The database that it decodes.
        database: String,
        /// What is confirmed, and replayed here.
        to: Lsn,
    },
    /// Remove it, unless it is in use.
    Drop {
        /// Its name.
        name: String,
    },
}

/// How a job ended well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobResult {
    /// Nothing to tell.
    Done,
    /// A new cluster stands.
    Initialized {
        /// Its system identifier.
        system_id: String,
    },
    /// The server takes queries.
    Started(super::postgres::Server),
    /// The server takes writes.
    Promoted {
        /// The server on its new timeline.
        server: super::postgres::Server,
        /// What the new timeline comes from: each earlier one with where it was left, the oldest first.
        ancestry: Vec<(Timeline, Lsn)>,
    },
    /// Every process of the server is gone.
    Stopped {
        /// The position of the shutdown checkpoint, if the stop was clean.
        shutdown_checkpoint: Option<Lsn>,
    },
}

/// How a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobError {
    /// One line: what failed, and how to mend it where we know.
    pub why: String,
    /// The fault is another server's, or lies on the way to it, and nothing has changed here: says nothing against our own data.
    #[serde(default)]
    pub elsewhere: bool,
}

/// Everything the machine can ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Ask etcd.
    Dcs(DcsAction),
    /// Ask who answers at the address in the member key that bears our name.
    ProbeName {
        /// The address.
        api_url: String,
    },
    /// Look at the data directory. Answered by [`Event::DataInspected`] or [`Event::DataUnusable`].
    InspectData,
    /// Ask the server at once how it does. Answered by [`Event::PostgresObserved`], changed or not.
    Observe,
    /// Use these parameters from now on: written before the next start, and reloaded into a running server.
    Configure {
        /// The parameters of `postgresql.conf`, merged and complete.
        parameters: BTreeMap<String, String>,
        /// The lines of `pg_hba.conf` and `pg_ident.conf` that are not our own.
        rules: Rules,
    },
    /// From now on, the guard kills every process of a server that takes writes at this time, unless it is told another
    /// before: the lease may have run out soon after.
    SetFence {
        /// On the machine's clock, which counts suspend.
        at: Time,
        /// What the guard does with the watchdog device until then; nothing if none is used.
        watchdog: Option<WatchdogOrder>,
    },
    /// Start a job. Whatever the machine asked of etcd before is asked before.
    Run {
        /// Its number.
        id: JobId,
        /// What to do.
        job: Job,
    },
    /// Change replication slots of the running server, in this order. Each change is made if it still can be: what is in use
    /// or there already is left alone. Never answered: the next look shows what has become of it.
    ChangeSlots {
        /// What to change.
        changes: Vec<SlotChange>,
    },
    /// Ask the leader for logical slots, first how far it heeds us and then for the slots, and fetch the files of those that are to be
    /// copied: the next start as a standby of this leader puts them into the data directory. Answered by
    /// [`Event::LeaderSlotsSeen`].
    LookAtSlots {
        /// The question's number.
        id: ProbeId,
        /// Whom to ask.
        leader: Upstream,
        /// Our own slot there.
        own: String,
        /// The slots that are asked for.
        names: Vec<String>,
        /// Those of them whose files are wanted.
        fetch: Vec<String>,
    },
    /// Give up a running job; its end is not waited for and not told.
    Cancel {
        /// Its number.
        id: JobId,
    },
    /// Ask every peer at once how far it is. Answered by [`Event::PeersProbed`] when all have answered or the deadline
    /// has passed.
    ProbePeers {
        /// The question's number.
        id: ProbeId,
        /// The `api_url` of each member.
        peers: BTreeMap<String, String>,
        /// How long to wait.
        deadline: Span,
    },
    /// Ask these members at once. Each one's answer is an [`Event::MemberAnswered`], and so is its silence.
    AskMembers {
        /// The question's number.
        id: AskId,
        /// What is asked.
        ask: Ask,
        /// The `api_url` of each member.
        members: BTreeMap<String, String>,
        /// How long to wait.
        deadline: Span,
    },
    /// Answer another member's question.
    AnswerMember {
        /// The number of the question.
        id: AskedId,
        /// Yes, or why not.
        answer: Result<(), String>,
    },
    /// End the process.
    Exit {
        /// Zero for a clean end.
        code: u8,
        /// One line for the operator.
        message: String,
    },
}
