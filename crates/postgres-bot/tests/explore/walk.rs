//! One random walk: chance decides what happens next, and then all faults end and the bot must come to rest.

use std::collections::{BTreeMap, BTreeSet};

use bots_core::{
    dcs::LeaseId,
    machine::{Machine, Span},
    wire::{Lsn, PostgresFacts, ScheduledRestart, Timeline, TimelineRecord},
};
use postgres_bot::machine::{
    Command, Event, JobError, JobId, PeerAnswer, Postgres, PostgresBot, ProbeId, RemoveData, Restart, Role, Running,
    Server, Settings, Standby, WaitsFor,
};
use serde_json::json;

use crate::{
    disk::{Data, Disk},
    world::{Fate, SYSTEM_ID, World, member, server, settings},
};

/// Steps of a walk before its first healing.
const STEPS: usize = 300;
/// See [`STEPS`]: those after it, as a leader most of the time.
const STEPS_AS_LEADER: usize = 60;
/// Half a second each: the longest wait is that for a data directory that could not be set aside.
const SETTLE_ROUNDS_MAX: usize = 200;

/// SplitMix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        let at = usize::try_from(self.below(u64::try_from(from.len()).expect("short"))).expect("short");
        from[at].clone()
    }
}

pub(crate) struct Walk {
    world: World,
    disk: Disk,
    random: Random,
    settings: Settings,
    edges: BTreeSet<(Role, Role)>,
    /// Nothing but what a real world could show.
    plausible: bool,
}

impl Walk {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x1000_0001));
        let mut settings = settings("pg1");
        if random.one_in(12) {
            settings.tags.0.insert(String::from("nofailover"), json!(true));
        }
        settings.use_pg_rewind = Some(!random.one_in(6));
        let remove = random.one_in(6);
        settings.remove_data = RemoveData { on_rewind_failure: Some(remove), on_diverged_timelines: Some(!remove) };
        let timeout = random.pick(&[0, 3, 300]);
        settings.bootstrap_config = json!({
            "ttl": random.pick(&[2, 5, 30]),
            "primary_start_timeout": timeout,
            "synchronous_mode": random.pick(&["off", "off", "on", "quorum"]),
            "synchronous_mode_strict": random.one_in(3),
            "takeover": random.one_in(2),
        });
        let data =
            random.pick(&[Data::Empty, Data::Empty, Data::Standby, Data::Primary, Data::Unfinished { cloning: false }]);
        let mut world = World::new(settings.clone());
        if data != Data::Empty && random.one_in(2) || random.one_in(4) {
            world.put("initialize", SYSTEM_ID);
        }
        if random.one_in(3) {
            world.put("leader", random.pick(&["pg1", "pg2"]));
        }
        let disk = Disk { data, timeline: 1, position: 0x300 };
        Self { world, disk, plausible: !random.one_in(3), random, settings, edges: BTreeSet::new() }
    }

    pub(crate) fn run(mut self) -> BTreeSet<(Role, Role)> {
        // Few walks come to lead by themselves; after the first healing most do.
        for steps in [STEPS, STEPS_AS_LEADER] {
            for _ in 0..steps {
                if self.world.exited {
                    self.restart();
                }
                self.happen();
                self.world.log.clear();
            }
            self.heal();
        }
        self.edges.extend(&self.world.edges);
        self.edges
    }

    /// All faults end. Beside a leader, the bot follows; without one, it leads. Whatever happened before.
    fn heal(&mut self) {
        self.world.renewing = true;
        for (key, value) in
            [("initialize", SYSTEM_ID), ("failover", "{}"), ("history", "[]"), ("config", r#"{"ttl":5}"#)]
        {
            self.world.put(key, value);
        }
        let current = Timeline(self.disk.timeline);
        let record = TimelineRecord { current, reserved: current, ..TimelineRecord::default() };
        self.world.put("timelines", &serde_json::to_string(&record).expect("a record"));
        let facts = PostgresFacts { timeline: Some(current), ..PostgresFacts::default() };
        self.world.put("members/pg2", &member("pg2", "primary", "running", facts).to_json());
        self.world.put("leader", "pg2");
        self.settle(Role::Replica);
        self.world.delete("members/pg2");
        self.world.delete("leader");
        self.settle(if self.settings.tags.nofailover() { Role::Replica } else { Role::Primary });
    }

    /// Everything goes well until the bot is where it should be.
    fn settle(&mut self, goal: Role) {
        for _ in 0..SETTLE_ROUNDS_MAX {
            if self.world.exited {
                self.restart();
            }
            let world = &mut self.world;
            if !world.state.view().is_watched() {
                world.list();
            }
            world.watch();
            world.grant();
            while !world.exited && world.answer(Fate::Answered).is_some() {}
            if std::mem::take(&mut world.naming) {
                world.step(Event::NameProbed { instance: None });
            }
            if std::mem::take(&mut world.inspecting) {
                world.step(Event::DataInspected(self.disk.inspected(world.shown_running())));
            }
            if world.running {
                world.observe(Postgres::Up(server(!world.takes_writes(), self.disk.timeline, self.disk.position)));
            }
            if let Some(id) = world.probe.take() {
                world.step(Event::PeersProbed { id, answers: BTreeMap::new() });
            }
            if let Some((_, job)) = world.job.clone() {
                let good = world.may_end_well();
                self.disk.after(&job, good);
                if good {
                    world.job_done(self.disk.timeline, self.disk.position, true);
                } else {
                    world.job_failed("the server is gone");
                }
            }
            world.watch();
            if world.role() == goal && world.job.is_none() {
                return;
            }
            world.pass(Span::from_millis(500));
        }
        panic!("{}, and not {goal}, after all faults have ended\n{:#?}", self.world.role(), self.world.state);
    }

    fn restart(&mut self) {
        self.edges.extend(&self.world.edges);
        let instance = format!("pg1-{}", self.random.below(1_000));
        self.world.restart(Settings { instance, ..self.settings.clone() });
        self.world.list();
    }

    /// One thing happens: mostly what the bot waits for, now and then anything else.
    fn happen(&mut self) {
        let due = self.random.below(100);
        match due {
            0..55 => self.answer_something(),
            55..72 => self.pass_time(),
            72..82 => self.others_act(),
            82..88 => self.lease_acts(),
            88..96 => self.server_acts(),
            96 if self.random.one_in(2) => self.world.step(Event::ShutdownRequested),
            96 => self.crash_the_bot(),
            _ if self.plausible => self.answer_something(),
            _ => self.nonsense(),
        }
        if self.random.one_in(2) {
            self.world.watch();
        }
    }

    fn answer_something(&mut self) {
        let random = &mut self.random;
        match random.below(7) {
            0 | 1 => {
                let unlucky = random.pick(&[Fate::AnswerLost, Fate::QuestionLost]);
                let fate = if random.one_in(8) { unlucky } else { Fate::Answered };
                self.world.answer(fate);
            }
            2 if !self.world.state.view().is_watched() => self.world.list(),
            2 => self.world.grant(),
            3 if self.world.inspecting => {
                self.world.inspecting = false;
                let left_behind = !self.world.running && random.one_in(10);
                let running =
                    if left_behind { Running::LeftBehind { fence: None } } else { self.world.shown_running() };
                let found = self.disk.inspected(running);
                self.world.step(Event::DataInspected(found));
            }
            3 if self.world.naming => {
                self.world.naming = false;
                let instance = random.one_in(20).then(|| String::from("another"));
                self.world.step(Event::NameProbed { instance });
            }
            4 => self.probe(),
            5 => self.observe(),
            _ => self.end_job(),
        }
    }

    fn end_job(&mut self) {
        let Some((_, job)) = self.world.job.clone() else { return };
        let good = self.world.may_end_well() && !self.random.one_in(5);
        self.disk.after(&job, good);
        self.disk.position += self.random.pick(&[0, 0, 0x40]);
        if good {
            let clean = !self.random.one_in(4);
            self.world.job_done(self.disk.timeline, self.disk.position, clean);
        } else {
            let elsewhere = self.random.one_in(2);
            self.world.job_failed(if elsewhere { "the source failed" } else { "no such luck" });
        }
    }

    fn probe(&mut self) {
        let Some(id) = self.world.probe.take() else { return };
        let mut answers = BTreeMap::new();
        if self.random.one_in(2) {
            let answer = PeerAnswer {
                is_primary: self.random.one_in(8),
                timeline: Timeline(u32::try_from(self.random.below(4)).expect("small")),
                position: Lsn(self.disk.position + 0x40 - self.random.below(3) * 0x40),
                may_lead: !self.random.one_in(4),
                priority: self.random.pick(&[1, 1, 2]),
                sure: !self.random.one_in(8),
            };
            answers.insert(String::from("pg2"), answer);
        }
        self.world.step(Event::PeersProbed { id, answers });
    }

    fn observe(&mut self) {
        if !self.world.running || self.world.closed {
            return;
        }
        let seen = match self.random.below(8) {
            0 => Postgres::Silent,
            1 => Postgres::Starting,
            _ => {
                self.disk.position += self.random.pick(&[0, 0x20]);
                Postgres::Up(self.facts())
            }
        };
        self.world.observe(seen);
    }

    /// What the server says of itself, and of a standby that it may have.
    fn facts(&mut self) -> Server {
        let mut server = server(!self.world.takes_writes(), self.disk.timeline, self.disk.position);
        if !server.in_recovery {
            let names = self.world.configured().get("synchronous_standby_names").cloned().unwrap_or_default();
            server.waits_for = WaitsFor { names, in_force: !self.random.one_in(4) };
            if !self.random.one_in(4) {
                let flushed = Lsn(self.disk.position - self.random.pick(&[0, 0, 0x20]));
                let standby = Standby { streams: !self.random.one_in(6), flushed };
                server.standbys.insert(String::from("pg2"), standby);
            }
        }
        server
    }

    fn pass_time(&mut self) {
        let next = PostgresBot::deadline(&self.world.state).map_or(0, |d| d.at.since(self.world.now).as_millis());
        let ms = self.random.pick(&[1, 10, 250, 500, 1_000, 2_500, 7_000, next, next]);
        self.world.pass(Span::from_millis(ms));
    }

    fn lease_acts(&mut self) {
        match self.random.below(6) {
            0 => self.world.renewing = false,
            1..4 => self.world.renewing = true,
            4 => self.world.expire(),
            _ => self.world.tell_lease_lost(),
        }
    }

    fn server_acts(&mut self) {
        match self.random.below(4) {
            0 if self.world.running => self.world.server_exits("signal 9"),
            1 => self.world.break_watch(),
            2 if self.world.may_close() => self.world.server_closes(self.disk.position),
            _ => self.observe(),
        }
    }

    fn others_act(&mut self) {
        let random = &mut self.random;
        let free = self.world.dcs.get("/service/main/leader").is_none();
        match random.below(14) {
            13 if random.one_in(2) => self.world.put_leased("leader", "pg2"),
            13 => self.world.put_promise("pg3"),
            12 => self.edge_acts(),
            11 if random.one_in(2) => self.operator_acts(),
            11 if free || !self.plausible => {
                let record = random.pick(&[
                    r#"{"leader":"pg2","sync_standby":"pg1,pg3","quorum":1}"#,
                    r#"{"leader":"pg2","sync_standby":"pg1","quorum":0}"#,
                    r#"{"leader":"pg2","sync_standby":null,"quorum":0}"#,
                ]);
                self.world.put("sync", record);
            }
            0 | 1 if free || !self.plausible => self.world.put("leader", "pg2"),
            2 | 3 if random.one_in(2) => self.world.delete("leader"),
            4..7 => {
                let facts = PostgresFacts {
                    timeline: Some(Timeline(self.disk.timeline + u32::try_from(random.below(2)).expect("small"))),
                    replication_state: random.one_in(2).then(|| String::from("streaming")),
                    checkpoint_after_promote: random.one_in(4).then_some(false),
                    ..PostgresFacts::default()
                };
                let state = random.pick(&["running", "running", "running", "starting"]);
                let role = random.pick(&["primary", "primary", "replica"]);
                self.world.put("members/pg2", &member("pg2", role, state, facts).to_json());
            }
            7 => self.world.delete("members/pg2"),
            8 => {
                if random.one_in(2) {
                    // Somebody who could take over.
                    let facts = PostgresFacts {
                        timeline: Some(Timeline(self.disk.timeline)),
                        replication_state: Some(String::from("streaming")),
                        ..PostgresFacts::default()
                    };
                    self.world.put("members/pg2", &member("pg2", "replica", "running", facts).to_json());
                }
                let wish = random.pick(&[
                    json!({"leader": "pg1"}),
                    json!({"leader": "pg1", "member": "pg2"}),
                    json!({"leader": "pg1", "scheduled_at": "2026-01-01T00:01:00Z"}),
                    json!({"member": "pg1"}),
                    json!({"leader": "pg2", "member": "pg2"}),
                    json!({}),
                ]);
                self.world.put("failover", &wish.to_string());
            }
            9 => {
                let line = json!([[self.disk.timeline, self.disk.position, "x"]]);
                let what = random.pick(&["[]", "[]", "rubbish"]);
                let history = if random.one_in(3) { line.to_string() } else { what.to_owned() };
                self.world.put("history", &history);
            }
            10 => {
                let ttl = random.pick(&[2, 5, 60]);
                self.world.put(
                    "config",
                    &json!({
                        "ttl": ttl, "primary_start_timeout": random.pick(&[0, 2, 300]), "pause": random.one_in(10),
                        "synchronous_mode": random.pick(&["off", "quorum"]), "takeover": random.one_in(2),
                    })
                    .to_string(),
                );
            }
            _ if random.one_in(8) => {
                let id = random.pick(&[SYSTEM_ID, SYSTEM_ID, "99", ""]);
                self.world.put("initialize", id);
            }
            _ => {}
        }
    }

    /// An edge comes, goes, holds connections for our term or for another one.
    fn edge_acts(&mut self) {
        let random = &mut self.random;
        let term = self.world.dcs.get("/service/main/leader").map_or(0, |kv| kv.modified.0);
        let term = if random.one_in(4) { random.below(40) } else { term };
        let stand =
            random.pick(&[json!({}), json!({"holds": term}), json!({"holds": term, "drained": term}), json!(7)]);
        match random.below(4) {
            0 => self.world.delete("edges/edge/edge-1"),
            _ => self.world.put("edges/edge/edge-1", &stand.to_string()),
        }
    }

    /// An operator asks something of this member.
    fn operator_acts(&mut self) {
        let wish = ScheduledRestart { timeout: self.random.pick(&[None, Some(2)]), ..ScheduledRestart::default() };
        let later = Some(1_767_225_600_000 + self.world.now.as_millis() + self.random.below(20_000));
        let at_unix_ms = self.random.pick(&[None, None, None, later]);
        let command = match self.random.below(6) {
            0..3 => Command::Restart(Restart { wish, at_unix_ms, below_version: None }),
            3 => Command::DropRestart,
            force => Command::Reinitialize { force: force == 4, from_leader: self.random.one_in(2) },
        };
        let id = self.world.next_command();
        self.world.step(Event::Commanded { id, command });
    }

    /// The process is gone without a word, and its server with it or not.
    fn crash_the_bot(&mut self) {
        if let Some((_, job)) = self.world.job.take() {
            self.disk.after(&job, false);
        }
        if self.random.one_in(2) {
            self.world.expire();
        }
        if self.random.one_in(2) {
            return self.restart();
        }
        self.edges.extend(&self.world.edges);
        let instance = format!("pg1-{}", self.random.below(1_000));
        self.world.restart_beside_server(Settings { instance, ..self.settings.clone() });
        self.world.list();
    }

    /// What cannot be: ends of jobs that nobody began, answers that nobody asked for, looks at what is not there.
    fn nonsense(&mut self) {
        let id = self.random.below(20);
        let event = match self.random.below(7) {
            0 => Event::JobEnded {
                id: JobId(1_000 + id),
                result: Err(JobError { why: String::from("what job?"), elsewhere: false }),
            },
            1 => Event::PeersProbed { id: ProbeId(1_000 + id), answers: BTreeMap::new() },
            2 => Event::NameProbed { instance: self.random.pick(&[None, Some(String::from("pg1-a"))]) },
            3 => Event::TimerFired,
            4 => Event::Dcs(bots_core::dcs::DcsEvent::LeaseLost { lease: LeaseId(77), why: String::from("not ours") }),
            5 => Event::Dcs(bots_core::dcs::DcsEvent::Answered {
                id: bots_core::dcs::RequestId(100_000 + id),
                outcome: bots_core::dcs::Outcome::Unknown(String::from("who asked?")),
            }),
            _ => {
                // Promoted by hand. What was not taken over yet is looked at when it is.
                if !self.world.running || self.world.kept.is_some() {
                    return;
                }
                self.world.writable = true;
                Event::PostgresObserved(Postgres::Up(server(false, self.disk.timeline + 1, self.disk.position)))
            }
        };
        self.world.step(event);
    }
}
