//! What a seed stands for: which bots there are, what the world is like, and which faults befall it. Swarm testing: every
//! seed has a random subset of the faults at random rates, for a world with all of them looks the same every time.

use std::collections::BTreeMap;

use bots_core::machine::Span;

use crate::rng::Rng;

/// Something bad that happens now and then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// kill -9 of a bot; its server dies with it; it is started again later.
    KillBot,
    /// A whole machine loses power and comes back later.
    PowerLoss,
    /// A machine stands still for a while, or a bot alone, or the guard of a server.
    Freeze,
    /// A bot is asked to stop, ends in good order, and is started again later.
    Shutdown,
    /// A machine cannot reach etcd, or hears nothing from it.
    CutFromStore,
    /// Two machines, or one and all others, cannot reach each other.
    CutFromPeers,
    /// etcd has no quorum.
    StoreOutage,
    /// etcd takes long to answer.
    SlowStore,
    /// Watches break.
    BreakWatches,
    /// etcd forgets its history.
    CompactStore,
    /// A postmaster dies.
    CrashPostmaster,
    /// An operator asks for a switchover.
    Switchover,
    /// An operator restarts a server, has one made anew, or pauses the cluster or resumes it.
    Operator,
    /// The branch is moved to a commit that is no descendant; the old one vanishes.
    ForcePush,
    /// The git server does not answer.
    OriginDown,
    /// A commit that must not be published is pushed.
    BadCommit,
    /// The user's web process dies.
    CrashApp,
    /// Load jumps.
    LoadSurge,
    /// The Postgres leader cannot reach etcd for longer than its lease, and perhaps not all of the others.
    CutLeader,
    /// A Postgres server lives and does not answer for a while.
    SilenceServer,
    /// The disk of a data directory takes no writes for a while, as the bot sees it.
    StallDisk,
    /// A web bot can prepare nothing for a while: its disk takes nothing, or its way to all that has content is cut.
    StarveContent,
    /// An operator changes the `synchronous_mode` of the Postgres cluster, or how strict it is, or how many standbys it asks for.
    ChangeMode,
    /// An operator pins a commit of the site, or takes the pin away.
    Pin,
}

/// All faults, in the order of their declaration.
pub const FAULTS: [Fault; 18] = [
    Fault::KillBot,
    Fault::PowerLoss,
    Fault::Freeze,
    Fault::Shutdown,
    Fault::CutFromStore,
    Fault::CutFromPeers,
    Fault::StoreOutage,
    Fault::SlowStore,
    Fault::BreakWatches,
    Fault::CompactStore,
    Fault::CrashPostmaster,
    Fault::Switchover,
    Fault::Operator,
    Fault::ForcePush,
    Fault::OriginDown,
    Fault::BadCommit,
    Fault::CrashApp,
    Fault::LoadSurge,
];

/// How many bots of each kind there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cast {
    /// Postgres bots.
    pub postgres: u64,
    /// Content bots.
    pub content: u64,
    /// Web bots.
    pub web: u64,
}

/// A range of milliseconds that delays are drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delay {
    /// At least this.
    pub low: u64,
    /// At most this.
    pub high: u64,
}

impl Delay {
    /// A delay.
    pub const fn draw(self, rng: &mut Rng) -> Span {
        rng.span(self.low, self.high)
    }
}

/// All that is decided before a world begins.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The bots.
    pub cast: Cast,
    /// How long faults happen.
    pub chaos: Span,
    /// Which ones, and how far apart.
    pub faults: BTreeMap<Fault, Span>,
    /// One way between a bot and etcd.
    pub store_delay: Delay,
    /// One way between two machines.
    pub peer_delay: Delay,
    /// Requests to etcd that never arrive, out of a thousand.
    pub requests_lost: u64,
    /// Answers of etcd that never arrive, out of a thousand.
    pub replies_lost: u64,
    /// Requests that etcd carries out after their sender has given up, out of a thousand.
    pub requests_late: u64,
    /// Steps that come late because the bot's machine is busy, out of a thousand.
    pub stalls: u64,
    /// Jobs of the bots that fail, out of a thousand.
    pub jobs_fail: u64,
    /// How much longer jobs take than they should, in percent.
    pub jobs_slow: u64,
    /// How long WAL is under way to a standby.
    pub wal_delay: Delay,
    /// A standby that was just started has not replayed up to so many of its last records.
    pub unreplayed_max: u64,
    /// How long it takes to replay them.
    pub replay: Delay,
    /// Clocks run wrong.
    pub drift: bool,
    /// The mean pause between two writes of clients.
    pub write_pause: Span,
    /// The length of leases in seconds.
    pub ttl_s: u64,
    /// The cluster's `maximum_lag_on_failover`.
    pub lag_max: u64,
    /// The cluster's `primary_start_timeout` in seconds.
    pub start_timeout_s: u64,
    /// Whether `pg_rewind` is used.
    pub rewind: bool,
    /// Whether web bots supervise an app.
    pub app: bool,
    /// Whether a commit is tried on one web bot before all serve it.
    pub canary: bool,
    /// The cluster's `synchronous_mode`, if it has one.
    pub sync: Option<&'static str>,
    /// Its `synchronous_mode_strict`.
    pub strict: bool,
    /// Its `synchronous_node_count`.
    pub sync_count: u64,
    /// Its `takeover`; in quorum mode alone.
    pub takeover: bool,
    /// A guard that has told a bot of its server stands still from then on for a while.
    pub tired_guards: bool,
    /// Whether the primary leads on without etcd, while enough members vouch for it. Such worlds lose etcd for longer.
    pub failsafe: bool,
    /// Steps of which only the first actions are carried out, because the bot dies between two of them, out of a thousand.
    pub cut_short: u64,
    /// Answers, questions of members and webhooks that are delivered a second time, out of a thousand.
    pub repeated: u64,
    /// Whether machines have a watchdog device.
    pub device: bool,
}

impl Plan {
    /// What the next numbers of `rng` stand for.
    #[must_use]
    pub fn draw(rng: &mut Rng) -> Self {
        let cast = Self::cast(rng);
        // How likely a fault is part of the seed: some worlds are nearly quiet, some are mad.
        let density = rng.between(100, 550);
        let mut faults = BTreeMap::new();
        for fault in FAULTS {
            let (drawn, pause) = (rng.chance(density), rng.span(2_500, 30_000));
            if drawn {
                faults.insert(fault, pause);
            }
        }
        // A condition holds in a part of the seeds, and then to a varying degree.
        let some = |rng: &mut Rng, most: u64| if rng.chance(300) { rng.between(1, most) } else { 0 };
        let slow_network = rng.chance(250);
        let far = if slow_network { 80 } else { 8 };
        let sync = *rng.pick(&[None, None, Some("on"), Some("quorum"), Some("quorum")]).unwrap_or(&None);
        let takeover = rng.chance(600) && sync == Some("quorum");
        let mut plan = Self {
            cast,
            canary: density % 2 == 1,
            chaos: rng.span(15_000, 50_000),
            faults,
            store_delay: Delay { low: 1, high: rng.between(2, far) },
            peer_delay: Delay { low: 1, high: rng.between(2, far) },
            requests_lost: some(rng, 80),
            replies_lost: some(rng, 80),
            requests_late: some(rng, 60),
            stalls: some(rng, 40),
            jobs_fail: some(rng, 200),
            jobs_slow: 100 + some(rng, 300),
            wal_delay: Delay { low: 1, high: rng.between(5, 400) },
            unreplayed_max: 3,
            replay: Delay { low: 1, high: 900 },
            drift: rng.chance(500),
            write_pause: rng.span(60, 600),
            ttl_s: *rng.pick(&[5, 5, 5, 3, 2, 10]).unwrap_or(&5),
            lag_max: *rng.pick(&[1_048_576, 1_048_576, 65_536, 0]).unwrap_or(&1_048_576),
            start_timeout_s: *rng.pick(&[300, 300, 5, 0]).unwrap_or(&300),
            rewind: rng.chance(800),
            app: rng.chance(500),
            sync,
            takeover,
            strict: rng.chance(250),
            sync_count: *rng.pick(&[1, 1, 1, 2]).unwrap_or(&1),
            failsafe: cast.postgres > 0 && rng.chance(600),
            cut_short: 0,
            repeated: 0,
            device: true,
            tired_guards: false,
        };
        if plan.failsafe {
            plan.faults.insert(Fault::CutLeader, rng.span(6_000, 25_000));
        }
        if cast.postgres > 0 && rng.chance(200) {
            plan.faults.insert(Fault::SilenceServer, rng.span(5_000, 30_000));
        }
        if cast.postgres > 0 && rng.chance(150) {
            plan.faults.insert(Fault::StallDisk, rng.span(5_000, 30_000));
        }
        if cast.web > 0 && rng.chance(400) {
            plan.faults.insert(Fault::StarveContent, rng.span(8_000, 30_000));
        }
        if cast.postgres > 0 && rng.chance(250) {
            plan.faults.insert(Fault::ChangeMode, rng.span(2_500, 15_000));
        }
        plan.cut_short = some(rng, 60);
        plan.repeated = some(rng, 100);
        plan.device = rng.chance(700);
        plan
    }

    /// The same with a Postgres cluster that is synchronous, and nothing else: in quorum mode with takeover, writes are many and
    /// long under way, machines lose power often, and standbys take long to replay what they have.
    #[must_use]
    pub fn made_synchronous(mut self) -> Self {
        self.cast = Cast { postgres: self.cast.postgres.max(3), content: 0, web: 0 };
        self.sync = self.sync.or(Some("quorum"));
        self.takeover = self.sync == Some("quorum");
        self.write_pause = Span::from_millis(40);
        self.wal_delay.high = 400;
        self.unreplayed_max = 30;
        self.replay.high = 6_000;
        self.faults.insert(Fault::PowerLoss, Span::from_secs(5));
        self.faults.insert(Fault::CutFromPeers, Span::from_secs(6));
        self
    }

    /// The same, and the mode changes all the time, while much of what is asked of etcd comes late or is not answered.
    #[must_use]
    pub fn made_changing(mut self) -> Self {
        self.faults.insert(Fault::ChangeMode, Span::from_millis(2_500));
        self.requests_late = self.requests_late.max(60);
        self.replies_lost = self.replies_lost.max(40);
        self
    }

    /// The same with a Postgres cluster and nothing else, without watchdog devices: bots are killed often, leaders are cut from etcd often,
    /// and a guard that has told a bot of its server stands still from then on for a while.
    #[must_use]
    pub fn made_with_tired_guards(mut self) -> Self {
        self.cast = Cast { postgres: self.cast.postgres.max(3), content: 0, web: 0 };
        (self.tired_guards, self.device) = (true, false);
        self.faults.insert(Fault::KillBot, Span::from_secs(4));
        self.faults.insert(Fault::CutLeader, Span::from_secs(6));
        self
    }

    /// The same with a site and nothing else, of which an operator pins one commit after the other.
    #[must_use]
    pub fn made_with_pins(mut self) -> Self {
        self.cast = Cast { postgres: 0, content: self.cast.content.max(1), web: self.cast.web.max(2) };
        (self.sync, self.takeover, self.failsafe) = (None, false, false);
        let of_postgres = [Fault::CutLeader, Fault::SilenceServer, Fault::StallDisk, Fault::ChangeMode];
        self.faults.retain(|fault, _| !of_postgres.contains(fault));
        self.faults.insert(Fault::Pin, Span::from_secs(3));
        self
    }

    /// Small worlds go deeper in the same time: most seeds have one kind of bot or two, some have all three.
    fn cast(rng: &mut Rng) -> Cast {
        let members = *rng.pick(&[3, 3, 3, 3, 3, 3, 2, 4]).unwrap_or(&3);
        let (content, web) = (rng.between(1, 2), rng.between(2, 4));
        match rng.below(10) {
            0..=4 => Cast { postgres: members, content: 0, web: 0 },
            5..=7 => Cast { postgres: 0, content, web },
            _ => Cast { postgres: 3, content, web },
        }
    }
}
