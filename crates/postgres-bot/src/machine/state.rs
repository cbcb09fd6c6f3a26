//! The one `State` value: facts as observed, and the phase that the bot is in. Private to the machine.

use std::fmt;

use bots_core::{
    dcs::{Revision, View},
    leadership::Leadership,
    machine::{Deadline, Time, Timers},
    membership::Membership,
    wire::{Lsn, Member, PostgresFacts, Timeline, config::SyncMode, tags},
};
use serde::Serialize;

use super::{
    copies::Copies,
    dynamic::Dynamic,
    event::{Job, JobId, ProbeId},
    failsafe::Failsafe,
    fence::EARLIER_LEASE_ENDS,
    guard::GuardWatch,
    hung::Health,
    operator::Operator,
    pause::Pause,
    phase::{Bootstrap, DemoteWhy, Phase, Recovery},
    postgres::{DataDir, Disk, Postgres, Running as Runs, Server, Upstream},
    promise::Word,
    release::Release,
    role::Role,
    settings::{Rules, Settings},
    slots::Slots,
    synchrony::Synchrony,
    takeover::Promise,
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
    /// A guard that still does not answer is replaced.
    Guard,
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

impl fmt::Display for Timer {
    /// What an operator reads that the bot does next.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Retry => "try again",
            Self::Patience => "it has taken long enough",
            Self::OthersFirst => "another has had the first go",
            Self::Scheduled => "the switchover that was asked for is due",
            Self::Rewrite => "write to etcd again what did not go through",
            Self::ShareStatus => "share how far the log has come",
            Self::Stalled => "look why it does not stream",
            Self::Hung => "give the server up if it still does not answer",
            Self::Guard => "replace the guard if it still does not answer",
            Self::ScheduledRestart => "the restart that was asked for is due",
            Self::RestartPatience => "the restart has taken long enough",
            Self::Slots => "look at the replication slots",
            Self::Release => "stop without being let go by the primary",
            Self::Sync => "look at the synchronous standbys again",
            Self::Takeover => "ask again whether the leader is there",
        })
    }
}

/// A running job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Running {
    pub(super) id: JobId,
    pub(super) job: Job,
    pub(super) since: Time,
    /// A stop after which only the archiver is left: nothing can be written any more.
    pub(super) closed: bool,
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
    /// The cluster's timeline when the rewind that runs was begun.
    pub(super) rewinding: Option<Timeline>,
    /// A rewind that was begun while this was the cluster's timeline has ended well, and nothing was streamed for long after it.
    pub(super) rewound: Option<Timeline>,
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
    /// What is known of the guard.
    pub(super) guard: GuardWatch,
    /// A leaderless scope was first seen at this time.
    pub(super) leaderless_since: Option<Time>,
    /// Where the guard of a server that was told to take writes has its fence, as far as we have asked.
    pub(super) fence_set: Option<Time>,
    /// `InspectData` is under way.
    pub(super) inspecting: bool,
    /// The parameters and rules that the shell was told last.
    pub(super) configured: Option<(std::collections::BTreeMap<String, String>, Rules)>,
    /// The parameters that the server would not take, and why.
    pub(super) refused: std::collections::BTreeMap<String, String>,
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
    /// What is known of the copies of the leader's logical slots.
    pub(super) copies: Copies,
    /// What a pause must know.
    pub(super) pause: Pause,
    /// Which standbys commits wait for, and who may lead because of that.
    pub(super) synchrony: Synchrony,
    /// The mode that the lock was asked for in last.
    pub(super) asked_in: SyncMode,
    /// A stop that waits until no commit waits for this standby.
    pub(super) release: Option<Release>,
    /// What this member promises, or is about to, while it sees its leader gone.
    pub(super) promise: Option<Promise>,
    /// When it took its last promise back.
    pub(super) withdrawn: Revision,
    /// A leader that did not answer, and until when it is not asked again.
    pub(super) silent: Option<(String, Time)>,
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
            guard: GuardWatch::default(),
            leaderless_since: None,
            fence_set: None,
            inspecting: false,
            configured: None,
            refused: std::collections::BTreeMap::new(),
            shared_head: None,
            tried: None,
            unrecorded: Vec::new(),
            stall: Stall::default(),
            crashes: Vec::new(),
            operator: Operator::default(),
            slots: Slots::default(),
            copies: Copies::default(),
            pause: Pause::default(),
            synchrony: Synchrony::default(),
            asked_in: dynamic.synchronous_mode,
            release: None,
            promise: None,
            withdrawn: Revision(0),
            silent: None,
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

    /// Whether clients can write here at `now`: the role, the server, the lease and the disk all say so.
    #[must_use]
    pub fn accepts_writes(&self, now: Time) -> bool {
        self.serves_as_primary(now) && self.health.disk == Disk::Good
    }

    /// Whether clients read what was committed last here at `now`, and can write if the disk can: the role, the server and the lease say so.
    #[must_use]
    pub fn serves_as_primary(&self, now: Time) -> bool {
        (matches!(self.phase, Phase::Primary(_)) || self.is_about_to_hand_over())
            && self.server().is_some_and(|s| !s.in_recovery)
            && self.leads(now)
    }

    /// Whether reads are sent here that any replica may serve.
    #[must_use]
    pub fn serves_as_replica(&self) -> bool {
        self.server().is_some_and(|server| server.in_recovery) && !self.settings.tags.is_set("noloadbalance")
    }

    /// Whether this member leads at `now` for sure: its lease lives and holds the lock, or enough members vouch for it.
    #[must_use]
    pub fn leads(&self, now: Time) -> bool {
        self.leadership.fence(now, &self.membership).is_some() || self.is_vouched_for(now)
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
        let reason = format!("stop Postgres: {EARLIER_LEASE_ENDS}");
        let kept = self.kept_until().map(|at| Deadline { at, reason });
        let own = [fence, kept, bootstrap, self.timers.next(), self.failsafe_deadline(), self.word.deadline(), dying];
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
        matches!(&self.data, Some(DataDir::Present { running: Runs::Guarded { fence }, was_primary, .. })
            if !exited && (fence.is_some(), *was_primary) == (primary, primary) && (!primary || self.may_lead_on()))
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
