//! What the proxy shows of itself, and how far the conversation with it has come. Not what should be different.

use std::net::SocketAddr;

use bots_core::machine::{Deadline, Span, Time};
use serde::{Deserialize, Serialize};

use super::{Action, Command, JobId, Place};

/// Between two looks at the proxy when nothing happens. A check of the proxy's own needs two good answers, a second apart,
/// to bring a server up against what etcd says; a look a second finds it soon after, and costs nothing to speak of.
pub const LOOK_INTERVAL: Span = Span::from_secs(1);

/// Between two looks while a primary that hands over waits for the last sessions to end: its clients wait meanwhile.
pub const HOLD_LOOK_INTERVAL: Span = Span::from_millis(20);

/// How soon commands that had no effect yet are repeated for the first time: sessions that are shut take a moment to end.
pub const REPEAT_MIN: Span = Span::from_millis(50);

/// How seldom commands that stay without effect are repeated: no more often than the proxy is looked at anyway.
pub const REPEAT_MAX: Span = LOOK_INTERVAL;

/// How many batches may follow each other at once without the proxy coming to what is wanted. A change of the fleet takes
/// two or three; a proxy that undoes what it is told must not be told a thousand times a second.
pub const BATCHES_MAX: u32 = 20;

/// Between a failed start of the proxy and the next, the first time; it doubles.
const START_RETRY_MIN: Span = Span::from_millis(500);

/// Between two starts of a proxy that does not come up, or does not stay up. A wrong configuration is mended by people, who need
/// no hurry.
pub const START_RETRY_MAX: Span = Span::from_secs(30);

/// A proxy that has answered for so long stays up: if it ends then, it is started at once, and pauses begin anew. As long as the
/// longest pause, so that none is cut short by that.
pub const PROVEN_AFTER: Span = START_RETRY_MAX;

/// A group of servers among which the proxy distributes connections; its name in the proxy's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The Postgres server that accepts writes.
    Primary,
    /// Those that follow it.
    Replicas,
    /// The serving web bots.
    Web,
}

impl Backend {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Primary, Self::Replicas, Self::Web];

    /// The name in the proxy's configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Replicas => "replicas",
            Self::Web => "web",
        }
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What the proxy is told to do with a server, whatever its health.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Admin {
    /// Send it connections while it is healthy.
    Ready,
    /// Send it no new connections; those that it has go on, and so do its checks.
    Drain,
    /// Send it nothing and do not check it: the place is free.
    Maint,
}

/// A server as the proxy shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// Its place.
    pub place: Place,
    /// Where connections go; nothing while it has no address.
    pub serve: Option<SocketAddr>,
    /// Where its health is asked for; nothing while that is not set.
    pub check: Option<SocketAddr>,
    /// What the proxy is told to do with it.
    pub admin: Admin,
    /// Whether the proxy takes it for healthy.
    pub up: bool,
    /// Its share of new connections.
    pub weight: u32,
    /// Its sessions at the moment.
    pub sessions: u64,
}

/// The proxy at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its process.
    pub pid: u32,
    /// The servers of our backends, in the order of its configuration.
    pub servers: Vec<Server>,
}

impl Snapshot {
    /// The servers of a backend.
    pub(super) fn of(&self, backend: Backend) -> impl Iterator<Item = &Server> {
        self.servers.iter().filter(move |s| s.place.backend == backend)
    }
}

/// What a look at the proxy saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Look {
    /// It answers.
    Up {
        /// What it shows, after the commands.
        snapshot: Snapshot,
        /// What it said against commands, one line each.
        complaints: Vec<String>,
    },
    /// Nobody listens at its socket.
    Absent {
        /// One line.
        why: String,
    },
    /// Somebody listens, and no usable answer came in time.
    Silent {
        /// One line.
        why: String,
    },
}

/// How a start of the proxy ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Started {
    /// It runs.
    Done,
    /// It does not.
    Failed {
        /// One line: why, and what to do.
        why: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
enum Link {
    Unknown,
    Absent,
    Up,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
enum Job {
    Look(JobId),
    Apply(JobId),
    Start(JobId),
}

/// What a look has brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// Another process than before answers.
    Another(u32),
    /// The same process answers.
    Same,
    /// Nobody answers.
    Nothing,
    /// The end of a job that is not waited for any more.
    OldNews,
}

/// The conversation with the proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Proxy {
    link: Link,
    job: Option<Job>,
    jobs: u64,
    snapshot: Snapshot,
    seen_at: Time,
    /// When this process answered for the first time.
    up_since: Time,
    /// When the last look ended, whatever it brought.
    looked_at: Time,
    look_at: Time,
    start_at: Time,
    start_pause: Span,
    /// Whether this bot has started it; otherwise it was found running.
    started: bool,
    /// The last commands, and when to repeat them if they turn out to have had no effect.
    applied: Vec<Command>,
    repeat_at: Time,
    repeat_pause: Span,
    /// Batches since the proxy was last seen to be as wanted.
    batches: u32,
    /// What it said against the last commands.
    complaint: Option<String>,
    /// Why it does not run or does not answer.
    silence: Option<String>,
}

impl Proxy {
    pub(super) const fn new() -> Self {
        Self {
            link: Link::Unknown,
            job: None,
            jobs: 0,
            snapshot: Snapshot { pid: 0, servers: Vec::new() },
            seen_at: Time::ZERO,
            up_since: Time::ZERO,
            looked_at: Time::ZERO,
            look_at: Time::ZERO,
            start_at: Time::ZERO,
            start_pause: START_RETRY_MIN,
            started: false,
            applied: Vec::new(),
            repeat_at: Time::ZERO,
            repeat_pause: REPEAT_MIN,
            batches: 0,
            complaint: None,
            silence: None,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.link == Link::Up
    }

    /// Whether there was a first look.
    pub(super) fn is_known(&self) -> bool {
        self.link != Link::Unknown
    }

    pub(super) const fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// When the snapshot was taken in.
    pub(super) const fn seen_at(&self) -> Time {
        self.seen_at
    }

    pub(super) const fn was_started(&self) -> bool {
        self.started
    }

    pub(super) fn is_starting(&self) -> bool {
        matches!(self.job, Some(Job::Start(_)))
    }

    pub(super) fn trouble(&self) -> Option<&str> {
        self.silence.as_deref().or(self.complaint.as_deref())
    }

    /// The process, while it answers.
    pub(super) fn pid(&self) -> Option<u32> {
        self.is_up().then_some(self.snapshot.pid)
    }

    /// Takes in a look.
    pub(super) fn observed(&mut self, now: Time, job: JobId, look: Look) -> Seen {
        let applied = match self.job {
            Some(Job::Look(id)) if id == job => false,
            Some(Job::Apply(id)) if id == job => true,
            Some(Job::Look(_) | Job::Apply(_) | Job::Start(_)) | None => return Seen::OldNews,
        };
        self.job = None;
        self.looked_at = now;
        self.look_at = now + LOOK_INTERVAL;
        match look {
            Look::Up { snapshot, complaints } => {
                let other = self.link != Link::Up || self.snapshot.pid != snapshot.pid;
                self.link = Link::Up;
                self.snapshot = snapshot;
                self.seen_at = now;
                self.silence = None;
                if other {
                    self.up_since = now;
                    self.applied.clear();
                }
                if self.up_since + PROVEN_AFTER <= now {
                    self.start_pause = START_RETRY_MIN;
                }
                if applied || other {
                    let complaint = complaints.into_iter().next();
                    self.complaint = complaint.map(|c| format!("the proxy refuses a command: {c}"));
                }
                if other { Seen::Another(self.snapshot.pid) } else { Seen::Same }
            }
            Look::Absent { why } => {
                self.gone(now, why);
                Seen::Nothing
            }
            Look::Silent { why } => {
                // It may be busy, or stopped by a debugger. A second one could not have its ports.
                self.silence = Some(format!("the proxy does not answer: {why}"));
                Seen::Nothing
            }
        }
    }

    /// Takes in the end of a start.
    pub(super) fn ended_start(&mut self, now: Time, job: JobId, result: Started) {
        if self.job != Some(Job::Start(job)) {
            return;
        }
        self.job = None;
        self.look_at = now;
        match result {
            Started::Done => {
                self.started = true;
                self.silence = None;
            }
            Started::Failed { why } => self.silence = Some(why),
        }
    }

    /// A process has ended; says whether it was the proxy's.
    pub(super) fn exited(&mut self, now: Time, pid: u32) -> bool {
        if self.pid() != Some(pid) {
            return false;
        }
        self.gone(now, format!("its process {pid} has ended"));
        // What is asked of the dead is not waited for.
        self.job = None;
        self.look_at = now;
        true
    }

    fn gone(&mut self, now: Time, why: String) {
        if self.link == Link::Up {
            // At once, but for one that has just been started: it may end as soon again.
            self.start_at = self.start_at.max(now);
        }
        self.link = Link::Absent;
        self.started = false;
        self.snapshot = Snapshot::default();
        self.applied.clear();
        self.silence.get_or_insert_with(|| format!("no proxy runs: {why}"));
    }

    /// Whether the snapshot is not older than `since` and no commands are under way.
    pub(super) fn has_shown_since(&self, since: Time) -> bool {
        self.seen_at >= since && !matches!(self.job, Some(Job::Apply(_)))
    }

    /// Wants the next look soon.
    pub(super) fn look_soon(&mut self) {
        self.look_at = self.look_at.min(self.looked_at + HOLD_LOOK_INTERVAL);
    }

    /// Whether commands can be sent now.
    pub(super) fn is_free(&self) -> bool {
        self.is_up() && self.job.is_none()
    }

    /// Asks for what is due: a look, or a start if we may start it.
    pub(super) fn advance(&mut self, now: Time, may_start: bool, out: &mut Vec<Action>) {
        if self.job.is_some() {
            return;
        }
        // A look that is due comes before a start: perhaps somebody else was faster.
        if now >= self.look_at {
            let job = self.next_job();
            self.job = Some(Job::Look(job));
            out.push(Action::ObserveProxy { job });
        } else if self.link == Link::Absent && may_start && now >= self.start_at {
            let job = self.next_job();
            self.job = Some(Job::Start(job));
            self.start_at = now + self.start_pause;
            self.start_pause = self.start_pause.times(2).min(START_RETRY_MAX);
            out.push(Action::StartProxy { job });
        }
    }

    /// Asks for commands, unless the same ones were just asked for and may only need a moment. Says whether all that
    /// there was to ask for is asked for.
    #[must_use]
    pub(super) fn apply(&mut self, now: Time, commands: Vec<Command>, out: &mut Vec<Action>) -> bool {
        if commands.is_empty() {
            self.applied.clear();
            self.batches = 0;
            return true;
        }
        if commands == self.applied || self.batches >= BATCHES_MAX {
            if now < self.repeat_at {
                return false;
            }
            self.repeat_pause = self.repeat_pause.times(2).min(REPEAT_MAX);
        } else {
            self.repeat_pause = REPEAT_MIN;
        }
        self.batches = self.batches.saturating_add(1);
        self.repeat_at = now + self.repeat_pause;
        self.applied.clone_from(&commands);
        let job = self.next_job();
        self.job = Some(Job::Apply(job));
        out.push(Action::ApplyRoutes { job, commands });
        true
    }

    const fn next_job(&mut self) -> JobId {
        self.jobs += 1;
        JobId(self.jobs)
    }

    pub(super) fn deadline(&self, may_start: bool) -> Option<Deadline> {
        if self.job.is_some() {
            return None;
        }
        let look = Deadline { at: self.look_at, reason: String::from("look at the proxy") };
        let start = (self.link == Link::Absent && may_start)
            .then(|| Deadline { at: self.start_at, reason: String::from("start the proxy") });
        let repeat = (!self.applied.is_empty())
            .then(|| Deadline { at: self.repeat_at, reason: String::from("repeat commands without effect") });
        Deadline::earliest([Some(look), start, repeat])
    }
}
