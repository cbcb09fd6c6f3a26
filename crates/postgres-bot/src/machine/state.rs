//! The one `State` value: facts as observed, and the phase that the bot is in. Private to the machine.

use bots_core::{
    dcs::{Revision, View},
    leadership::Leadership,
    machine::{Deadline, Span, Time, Timers},
    membership::Membership,
    wire::{Lsn, Member, PostgresFacts, Timeline, tags},
};
use serde::Serialize;

use super::{
    dynamic::Dynamic,
    event::{Job, JobId, ProbeId, StopMode},
    failsafe::Failsafe,
    hung::Health,
    operator::Operator,
    pause::Pause,
    postgres::{DataDir, Postgres, Running as Runs, Server, Upstream},
    promise::Word,
    quorum::Voters,
    release::Release,
    role::Role,
    settings::{Rules, Settings},
    slots::Slots,
    synchrony::Synchrony,
    takeover::Promise,
    turn::DYING_MAX,
    watchdog::Device,
};

/// What the machine waits for with a clock in hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Timer {
    /// Try again what failed or could not be done yet.
    Retry,
    /// A stop or a recovery has taken long enough.
    Patience,
    /// Until then another goes first: the member that a switchover names, or the leader that handed over.
    OthersFirst,
    /// An operator has scheduled a switchover for then.
    Scheduled,
    /// Write a key again, or give the lock back again, if that did not go through.
    Rewrite,
    /// Look at the server's position for the `status` key again.
    ShareStatus,
    /// A replica that still does not stream is to be looked into.
    Stalled,
    /// A server that still does not answer is given up.
    Hung,
    /// An operator has scheduled a restart for then.
    ScheduledRestart,
    /// A restart on an operator's word has taken long enough.
    RestartPatience,
    /// Replication slots are to be looked at again.
    Slots,
    /// A stop waits no longer for the primary to let this standby go.
    Release,
    /// Look again whether the next step of the synchronous replication can be taken.
    Sync,
    /// Ask again whether a leader is there that nothing is received from, or etcd what it has not answered.
    Takeover,
}

/// A running job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Running {
    pub(super) id: JobId,
    pub(super) job: Job,
    pub(super) since: Time,
}

/// The steps of making a new cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) enum Bootstrap {
    /// Asking for the `initialize` key.
    Racing(bots_core::dcs::RequestId),
    /// `initdb`, first start, roles: in this order, one job after the other.
    Working { won: Revision, system_id: Option<String> },
    /// Recording identifier, configuration and lock in one transaction.
    Recording { won: Revision, request: bots_core::dcs::RequestId, system_id: String },
    /// Recorded; taking the mark off the data directory.
    Completing,
}

/// Why Postgres is made unwritable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) enum DemoteWhy {
    /// The lock is gone, or its lease runs out: at once.
    Fenced(String),
    /// The server cannot be made to run here: another shall lead.
    Unfit(String),
    /// An operator asked for it.
    Switchover { to: Option<String> },
}

/// The steps of a demotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum DemoteStep {
    /// A checkpoint first, so that the stop is short.
    Checkpointing,
    /// Waiting for the edges to hold new connections.
    Holding,
    /// Waiting for running transactions to end.
    Draining,
    /// Stopping the server.
    Stopping,
    /// The server is down: giving the lock to whoever comes.
    Yielding,
}

/// The steps of restarting a crashed primary in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Recovery {
    /// The lock is our own from before a restart of the bot: binding it to the new lease. The server may run, in its
    /// guard's care, under the old one.
    Reclaiming,
    /// The server has run on since before the restart: taking it over as it is.
    Adopting,
    /// Starting the server.
    Starting,
}

/// What a stopped member with suspect data does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Suspect {
    /// Nothing: it was stopped cleanly and handed over.
    No,
    /// It may hold writes that the new leader lacks.
    Maybe,
    /// Rewinding failed: only a new clone helps.
    Hopeless,
}

/// The steps down of a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum RestartStep {
    /// A checkpoint first, so that the stop is short.
    Checkpointing,
    /// Stopping the server.
    Stopping,
}

/// The phase: the role, with what belongs to it alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) enum Phase {
    Initializing,
    Waiting,
    Bootstrapping(Bootstrap),
    Cloning {
        source: String,
    },
    Starting {
        attempts: u32,
    },
    Replica {
        following: Option<Upstream>,
    },
    Candidate(Candidate),
    Promoting {
        from: Lsn,
        /// The timeline that it is promoted to.
        timeline: Timeline,
    },
    Primary(Primary),
    Restarting {
        /// It holds the lock, and its server takes writes until it is down.
        primary: bool,
        step: RestartStep,
    },
    Recovering {
        step: Recovery,
    },
    Demoting {
        why: DemoteWhy,
        step: DemoteStep,
        shutdown_checkpoint: Option<Lsn>,
    },
    Rejoining {
        suspect: Suspect,
        failures: u32,
    },
    Stopping {
        /// The lock was given back; the answer is awaited for a moment.
        yielded: bool,
        /// The server may have accepted writes when the stop began.
        writable: bool,
    },
}

/// What a candidate has found out so far.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Candidate {
    /// The question to the peers that is under way.
    pub(super) probe: Option<ProbeId>,
    /// Their answers.
    pub(super) answers: Option<std::collections::BTreeMap<String, super::event::PeerAnswer>>,
    /// Our own server was asked after the leader was gone: its position is final.
    pub(super) observed: bool,
    /// Who stands in the way, for the report.
    pub(super) behind: Option<String>,
    /// The members of the failsafe key are being asked for their support.
    pub(super) seeking: bool,
    /// The lock is ours, and a number for the new timeline has been asked for.
    pub(super) reservation: Option<Reservation>,
}

/// A number that etcd was asked to keep for the timeline to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Reservation {
    pub(super) request: bots_core::dcs::RequestId,
    /// The lock that it was asked for under.
    pub(super) fence: bots_core::leadership::Fence,
    pub(super) timeline: Timeline,
    /// The `sync` key that was written with it, if the mode wants one.
    pub(super) voters: Option<Voters>,
}

/// What a primary keeps track of.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Primary {
    /// The first checkpoint after the promotion is still to come: who rewinds must wait for it.
    pub(super) checkpoint_due: bool,
    /// The `status` key as we wrote it last.
    pub(super) shared: Option<String>,
    /// Started in place, perhaps after a promotion that nobody recorded.
    pub(super) restarted: bool,
    /// The key that a write under the lock is under way for.
    pub(super) writing: Option<(bots_core::dcs::RequestId, Writing)>,
    /// The request of an operator that was answered last, by its revision: the watch may still show it.
    pub(super) answered: Option<Revision>,
    /// The request that waits for a replica to be ready, and until when.
    pub(super) unready: Option<(Revision, Time)>,
}

/// What is known of how a replica follows its leader.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Stall {
    /// It has not followed well since then, though it is told to follow a leader that is up.
    pub(super) since: Option<Time>,
    /// Where it was then.
    pub(super) at: Lsn,
    /// It has streamed since then without a break.
    pub(super) streaming_since: Option<Time>,
    /// The question whether we can reach the leader at all.
    pub(super) probe: Option<ProbeId>,
    /// A rewind has ended well while this was the cluster's timeline, and nothing was streamed for long after it.
    pub(super) rewound: Option<Timeline>,
}

/// Which of a primary's keys is being written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) enum Writing {
    History,
    Status(String),
    Failover(Revision),
    Initialize,
}

/// Everything that the bot knows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct State {
    pub(super) settings: Settings,
    pub(super) dynamic: Dynamic,
    pub(super) view: View,
    pub(super) membership: Membership,
    pub(super) leadership: Leadership,
    pub(super) phase: Phase,
    pub(super) since: Time,
    /// The roles that the last turn went through, the one it ended in last; none if it stayed.
    pub(super) passed: Vec<Role>,
    pub(super) data: Option<DataDir>,
    pub(super) postgres: Postgres,
    pub(super) job: Option<Running>,
    pub(super) jobs: u64,
    pub(super) probes: u64,
    pub(super) timers: Timers<Timer>,
    /// The last thing that went wrong, for the report.
    pub(super) trouble: Option<String>,
    /// What ails the server or its disk.
    pub(super) health: Health,
    /// What is known of the watchdog device.
    pub(super) device: Device,
    /// A leaderless scope was first seen at this time.
    pub(super) leaderless_since: Option<Time>,
    /// Where the guard of a server that was told to take writes has its fence, as far as we have asked.
    pub(super) fence_set: Option<Time>,
    /// `InspectData` is under way.
    pub(super) inspecting: bool,
    /// The parameters and rules that the shell was told last.
    pub(super) configured: Option<(std::collections::BTreeMap<String, String>, Rules)>,
    /// The member value without its figures, as shared last.
    pub(super) shared_head: Option<String>,
    /// The switchover that we acted on last, by the revision of the request: none is tried twice.
    pub(super) tried: Option<Revision>,
    /// What the timeline of our last promotion comes from, until it is recorded.
    pub(super) unrecorded: Vec<bots_core::wire::HistoryLine>,
    /// The server follows a living leader in name only.
    pub(super) stall: Stall,
    /// When the server crashed under us as a primary, lately.
    pub(super) crashes: Vec<Time>,
    /// What operators have asked of this member.
    pub(super) operator: Operator,
    /// What is remembered about replication slots.
    pub(super) slots: Slots,
    /// What a pause must know.
    pub(super) pause: Pause,
    /// Which standbys commits wait for, and who may lead because of that.
    pub(super) synchrony: Synchrony,
    /// A stop that waits until no commit waits for this standby.
    pub(super) release: Option<Release>,
    /// What this member promises, or is about to, while it sees its leader gone.
    pub(super) promise: Option<Promise>,
    /// The last copy from a member other than the leader failed: the next one is the leader's.
    pub(super) copy_leader: bool,
    /// What this member has said to primaries and candidates.
    pub(super) word: Word,
    /// What it knows as a primary or candidate of what others said.
    pub(super) failsafe: Failsafe,
    /// The exit code and the line for the operator, if it is not an end that was asked for.
    pub(super) farewell: Option<(u8, String)>,
    /// `Exit` was asked for: nothing more is.
    pub(super) exited: bool,
}

impl State {
    /// A bot that has just been started and knows nothing.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let dynamic = Dynamic::from_value(&settings.bootstrap_config);
        let scope = settings.scope.clone();
        Self {
            view: View::of([scope.prefix()]),
            membership: Membership::new(scope.clone(), &settings.name, &settings.instance, dynamic.ttl),
            leadership: Leadership::new(scope.leader(), &settings.name),
            phase: Phase::Initializing,
            since: Time::ZERO,
            passed: Vec::new(),
            data: None,
            postgres: Postgres::Down,
            job: None,
            jobs: 0,
            probes: 0,
            timers: Timers::default(),
            trouble: None,
            health: Health::default(),
            device: Device::default(),
            leaderless_since: None,
            fence_set: None,
            inspecting: false,
            configured: None,
            shared_head: None,
            tried: None,
            unrecorded: Vec::new(),
            stall: Stall::default(),
            crashes: Vec::new(),
            operator: Operator::default(),
            slots: Slots::default(),
            pause: Pause::default(),
            synchrony: Synchrony::default(),
            release: None,
            promise: None,
            copy_leader: false,
            word: Word::default(),
            failsafe: Failsafe::default(),
            farewell: None,
            exited: false,
            dynamic,
            settings,
        }
    }

    /// The node of the diagram.
    #[must_use]
    pub const fn role(&self) -> Role {
        match &self.phase {
            Phase::Initializing => Role::Initializing,
            Phase::Waiting => Role::Waiting,
            Phase::Bootstrapping(_) => Role::Bootstrapping,
            Phase::Cloning { .. } => Role::Cloning,
            Phase::Starting { .. } => Role::Starting,
            Phase::Replica { .. } => Role::Replica,
            Phase::Candidate(_) => Role::Candidate,
            Phase::Promoting { .. } => Role::Promoting,
            Phase::Primary(_) => Role::Primary,
            Phase::Restarting { .. } => Role::Restarting,
            Phase::Recovering { .. } => Role::Recovering,
            Phase::Demoting { .. } => Role::Demoting,
            Phase::Rejoining { .. } => Role::Rejoining,
            Phase::Stopping { .. } => Role::Stopping,
        }
    }

    /// The roles that the last step went through, the one it ended in last; none if it stayed.
    #[must_use]
    pub fn passed(&self) -> &[Role] {
        &self.passed
    }

    /// The settings.
    #[must_use]
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The cluster's settings.
    #[must_use]
    pub const fn dynamic(&self) -> &Dynamic {
        &self.dynamic
    }

    /// What is known of etcd.
    #[must_use]
    pub const fn view(&self) -> &View {
        &self.view
    }

    /// The lease and the member key.
    #[must_use]
    pub const fn membership(&self) -> &Membership {
        &self.membership
    }

    /// The lock.
    #[must_use]
    pub const fn leadership(&self) -> &Leadership {
        &self.leadership
    }

    /// The server as last observed.
    #[must_use]
    pub const fn postgres(&self) -> &Postgres {
        &self.postgres
    }

    /// The data directory as last inspected.
    #[must_use]
    pub const fn data(&self) -> Option<&DataDir> {
        self.data.as_ref()
    }

    /// Since when the scope has had no leader, as far as it is seen; nothing while it has one.
    #[must_use]
    pub const fn leaderless_since(&self) -> Option<Time> {
        self.leaderless_since
    }

    /// The server is being stopped, or was stopped last, for want of the lock or its lease.
    #[must_use]
    pub const fn is_fenced(&self) -> bool {
        matches!(&self.phase, Phase::Demoting { why: DemoteWhy::Fenced(_), .. })
    }

    /// The live server's facts.
    #[must_use]
    pub const fn server(&self) -> Option<&Server> {
        self.postgres.server()
    }

    /// The last thing that went wrong.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Whether clients may write here at `now`: the role, the server and the lease all say so.
    #[must_use]
    pub fn accepts_writes(&self, now: Time) -> bool {
        (matches!(self.phase, Phase::Primary(_)) || self.is_about_to_hand_over())
            && self.server().is_some_and(|s| !s.in_recovery)
            && self.leads(now)
    }

    /// Whether this member leads at `now` for sure: its lease lives and holds the lock, or enough members vouch for it.
    #[must_use]
    pub fn leads(&self, now: Time) -> bool {
        self.leadership.fence(now, &self.membership).is_some() || self.is_vouched_for(now)
    }

    /// Whether a server that this bot started may accept writes by what it was told to do.
    pub(super) const fn may_be_writable(&self) -> bool {
        match &self.phase {
            Phase::Promoting { .. }
            | Phase::Primary(_)
            | Phase::Recovering { step: Recovery::Starting | Recovery::Adopting } => true,
            Phase::Restarting { primary, .. } => *primary,
            Phase::Demoting { why, step, .. } => {
                !matches!(why, DemoteWhy::Fenced(_)) && !matches!(step, DemoteStep::Yielding)
            }
            Phase::Stopping { writable, .. } => {
                *writable || matches!(&self.postgres, Postgres::Up(s) if !s.in_recovery)
            }
            Phase::Initializing
            | Phase::Waiting
            | Phase::Bootstrapping(_)
            | Phase::Cloning { .. }
            | Phase::Starting { .. }
            | Phase::Replica { .. }
            | Phase::Candidate(_)
            | Phase::Recovering { step: Recovery::Reclaiming }
            | Phase::Rejoining { .. } => false,
        }
    }

    /// When a server that may accept writes must be stopped unless the lease is renewed before.
    pub(super) fn fence_at(&self) -> Option<Time> {
        if !self.may_be_writable() || self.postgres == Postgres::Down && self.job.is_none() {
            return None;
        }
        if self.is_stopping_at_once() {
            return None;
        }
        let by_lease = self.lease_ends();
        Some(match self.word_ends() {
            None => by_lease,
            Some(by_word) if self.leadership.is_held() => by_lease.max(by_word),
            // The lease that we have now, if we have one, does not hold the lock.
            Some(by_word) => by_word,
        })
    }

    /// The server is being stopped, by force if need be.
    pub(super) const fn is_stopping_at_once(&self) -> bool {
        matches!(&self.job, Some(Running { job: Job::Stop { mode: StopMode::Immediate { .. } }, .. }))
    }

    /// When a server that is being killed under the lock will have been at it for too long.
    fn dies_until(&self) -> Option<Time> {
        match &self.job {
            Some(Running { job: Job::Stop { mode: StopMode::Immediate { kill_after } }, since, .. })
                if self.leadership.is_held() =>
            {
                Some(*since + *kill_after + DYING_MAX)
            }
            Some(_) | None => None,
        }
    }

    /// The server's processes have been killed, and do not go: none of them takes a write any more, and the lock that was theirs
    /// goes to others with the lease.
    pub(super) fn will_not_die(&self, now: Time) -> bool {
        self.dies_until().is_some_and(|until| until <= now)
    }

    /// The end of the lease, as far as anything may be begun under it: what is not stopped by then is stopped by force.
    fn lease_ends(&self) -> Time {
        self.membership.valid_until().unwrap_or(Time::ZERO) - self.fence_margin()
    }

    /// The lease lives, and the fence is not about to fall.
    pub(super) fn has_ample_lease(&self, now: Time) -> bool {
        now < self.lease_ends() && self.membership.lease(now).is_some()
    }

    /// The lock is held, and the fence is not about to fall: a server may be made writable.
    pub(super) fn may_use_lock(&self, now: Time) -> bool {
        self.has_ample_lease(now) && self.leadership.fence(now, &self.membership).is_some()
    }

    /// Whether nothing hangs on the lease but our place among the members: a replica whose leader lives, once the dust of a
    /// failover has settled. Its death is seen by who streams to it and by who connects to it. Nothing where it does not matter.
    pub(super) fn rests(&self, now: Time) -> Option<bool> {
        match &self.phase {
            Phase::Replica { .. } => {
                let led = self.leader().is_some_and(|leader| leader != self.settings.name);
                let settled = self.membership.is_resting() || now.since(self.since) >= self.dynamic.ttl;
                Some(led && settled)
            }
            Phase::Restarting { primary, .. } => (*primary).then_some(false),
            // No lock is asked for from here.
            Phase::Cloning { .. } | Phase::Starting { .. } | Phase::Rejoining { .. } | Phase::Stopping { .. } => None,
            Phase::Initializing
            | Phase::Waiting
            | Phase::Bootstrapping(_)
            | Phase::Candidate(_)
            | Phase::Promoting { .. }
            | Phase::Primary(_)
            | Phase::Recovering { .. }
            | Phase::Demoting { .. } => Some(false),
        }
    }

    /// Before the fence falls, this much of the lease is left: what stopping Postgres may take, and any drift of clocks.
    #[must_use]
    pub fn fence_margin(&self) -> Span {
        self.membership.lease_ttl().divided_by(5)
    }

    /// The guard acts this long before the lease may have run out: what killing a server may take on a busy machine, and
    /// any drift of clocks. Half of [`Self::fence_margin`], so that a bot that lives acts first, and more gently.
    #[must_use]
    pub fn guard_margin(&self) -> Span {
        self.fence_margin().divided_by(2)
    }

    /// Where the guard's fence belongs as long as this server may take writes.
    pub(super) fn guard_at(&self) -> Time {
        let by_lease = self.membership.valid_until().unwrap_or(Time::ZERO) - self.guard_margin();
        match self.guard_by_word() {
            None => by_lease,
            Some(by_word) if self.leadership.is_held() => by_lease.max(by_word),
            Some(by_word) => by_word,
        }
    }

    pub(super) fn deadline(&self) -> Option<Deadline> {
        let fence = self
            .fence_at()
            .map(|at| Deadline { at, reason: String::from("stop Postgres: its lease runs out unless renewed before") });
        let making = matches!(&self.phase, Phase::Bootstrapping(step) if !matches!(step, Bootstrap::Racing(_)));
        let bootstrap = making.then(|| Deadline {
            at: self.lease_ends(),
            reason: String::from("give the bootstrap up: its lease runs out unless renewed before"),
        });
        let reason = String::from("let the lease run out: what is left of Postgres cannot be killed");
        let dying = self.dies_until().filter(|_| !self.membership.is_lapsing()).map(|at| Deadline { at, reason });
        let own = [fence, bootstrap, self.timers.next(), self.failsafe_deadline(), self.word.deadline(), dying];
        Deadline::earliest(own.into_iter().chain([self.membership.deadline(), self.asks_for_lock_at()]))
    }

    /// Whether the view shows the lock under our present lease.
    pub(super) fn shows_our_lock(&self) -> bool {
        let found = self.view.get(&self.settings.scope.leader());
        found.is_some_and(|kv| kv.value == self.settings.name && kv.lease == self.membership.lease_id())
    }

    /// The other members, by name.
    pub(super) fn peers(&self) -> impl Iterator<Item = (&str, Member)> {
        let prefix = self.settings.scope.members_prefix();
        let me = self.settings.name.as_str();
        self.view
            .entries_below(&prefix)
            .into_iter()
            .filter_map(move |(name, kv)| Some((name, Member::from_json(&kv.value)?)))
            .filter(move |(name, _)| *name != me)
    }

    /// A member by name, with its Postgres facts.
    pub(super) fn member(&self, name: &str) -> Option<(Member, PostgresFacts)> {
        let member = Member::from_json(self.view.value(&self.settings.scope.member(name))?)?;
        let facts = member.facts()?;
        Some((member, facts))
    }

    /// Who holds the lock, as far as we know.
    pub(super) fn leader(&self) -> Option<&str> {
        self.leadership.holder(&self.view)
    }

    /// The leader as somebody to copy or follow: another member whose server accepts writes.
    pub(super) fn upstream(&self) -> Option<Upstream> {
        let name = self.leader().filter(|name| *name != self.settings.name)?;
        let (member, facts) = self.member(name)?;
        (member.head.role == "primary" && member.head.state == "running")
            .then(|| Upstream { name: name.to_owned(), conn_url: facts.conn_url })
    }

    /// Whom to copy: a member that offers itself and follows the leader closely, the leader otherwise.
    pub(super) fn copy_source(&self) -> Option<Upstream> {
        let leader = self.upstream()?;
        // A voter vouches for what it has: another may lack what this one has acknowledged before.
        if self.copy_leader || self.copies_leader_only() || self.is_voter(&self.settings.name) {
            return Some(leader);
        }
        let leaders = self.member(&leader.name).and_then(|(_, facts)| facts.timeline);
        let offers = self.peers().filter_map(|(name, member)| {
            let facts: PostgresFacts = member.facts()?;
            let streams = facts.replication_state.as_deref() == Some("streaming") && facts.timeline == leaders;
            let fit = member.head.state == "running" && streams && tags::is_set(&facts.tags, "clonefrom");
            fit.then(|| (facts.xlog_location, Upstream { name: name.to_owned(), conn_url: facts.conn_url }))
        });
        Some(offers.max_by_key(|(position, _)| *position).map_or(leader, |(_, offer)| offer))
    }

    /// The system identifier that the cluster recorded.
    pub(super) fn cluster_system_id(&self) -> Option<&str> {
        self.view.value(&self.settings.scope.initialize()).filter(|id| !id.is_empty())
    }

    /// The server runs on as it was before our start, as a primary or not, in its guard's care.
    pub(super) fn is_kept(&self, primary: bool) -> bool {
        let exited = !self.postgres.is_alive() && !matches!(self.phase, Phase::Initializing);
        matches!(&self.data, Some(DataDir::Present { running: Runs::Guarded { fenced }, was_primary, .. })
            if !exited && (*fenced, *was_primary) == (primary, primary) && (!primary || self.may_lead_on()))
    }

    /// Nothing speaks against a primary that goes on as it was.
    fn may_lead_on(&self) -> bool {
        self.leader() == Some(self.settings.name.as_str()) && !self.is_half_promoted() && !self.is_foreign()
    }

    /// The system identifier of our data directory.
    pub(super) fn own_system_id(&self) -> Option<&str> {
        match &self.data {
            Some(DataDir::Present { system_id, .. }) => Some(system_id),
            Some(DataDir::Empty | DataDir::Unfinished { .. }) | None => None,
        }
    }

    /// Our data directory belongs to another cluster than the one that is recorded.
    pub(super) fn is_foreign(&self) -> bool {
        matches!((self.own_system_id(), self.cluster_system_id()), (Some(own), Some(recorded)) if own != recorded)
    }

    /// What the member key says of the server.
    #[must_use]
    pub fn facts(&self) -> PostgresFacts {
        super::share::facts(self)
    }

    /// The member's tags as others see them: who must not lead says so, lest others wait for it; and so does who is about to be
    /// stopped.
    #[must_use]
    pub fn tags(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut shown = tags::shown(&self.settings.tags.0);
        if self.must_not_be_waited_for() {
            shown.insert(String::from("nosync"), serde_json::Value::Bool(true));
        }
        shown
    }

    /// A rewind is tried before a new copy.
    pub(super) fn uses_rewind(&self) -> bool {
        self.settings.use_pg_rewind.or(self.dynamic.use_pg_rewind).unwrap_or(true)
    }

    pub(super) fn invariants(&self) -> Result<(), String> {
        if let Some(running) = &self.job
            && matches!(running.job, Job::Promote { .. })
            && !matches!(self.phase, Phase::Promoting { .. })
        {
            return Err(format!("a promotion runs while {}", self.role()));
        }
        let takes_writes = match &self.phase {
            Phase::Promoting { .. } | Phase::Primary(_) => true,
            Phase::Recovering { step } => *step != Recovery::Reclaiming,
            _any_other => false,
        };
        if takes_writes && self.postgres.is_alive() && self.fence_set.is_none() {
            return Err(format!("a {} without a fence", self.role()));
        }
        if matches!(self.phase, Phase::Primary(_)) && self.data.as_ref().is_none_or(|d| *d == DataDir::Empty) {
            return Err(String::from("a primary without data"));
        }
        if matches!(self.phase, Phase::Replica { .. } | Phase::Candidate(_))
            && self.server().is_some_and(|s| !s.in_recovery)
        {
            return Err(format!("a {} whose server accepts writes", self.role()));
        }
        self.check_synchrony()
    }
}
