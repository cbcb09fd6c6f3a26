//! Several bots on one in-memory store, and everything that may happen to them.

use std::collections::{BTreeMap, BTreeSet};

use bots_core::{
    dcs::{DcsEvent, MemoryDcs, Transaction, Write},
    machine::{Machine, Span, Time},
    wire::WebLoad,
};
use web_bot::machine::{Action, ConnectionBudget, Event, Mode, Role, Route, ScalingSettings, WebMachine};

use crate::{
    BOTS, MAX, TTL,
    common::{self, Bot},
};

/// A small, plain generator (SplitMix64): the same numbers for ever.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % sides
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.roll(n) == 0
    }
}

pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) dice: Dice,
    pub(crate) mode: Mode,
    pub(crate) now: Time,
    pub(crate) dcs: MemoryDcs,
    pub(crate) bots: Vec<Bot>,
    pub(crate) instances: u64,
    pub(crate) generation: u64,
    pub(crate) live: BTreeSet<String>,
    /// The commit that may go live next.
    pub(crate) candidate: Option<String>,
    /// Transactions whose asker was told that the answer is lost; they may still arrive.
    pub(crate) late: Vec<Transaction>,
    /// Somebody has deleted a lock by hand: two may believe that they hold it until they look. What they do under it is
    /// refused, and that is judged all the same.
    pub(crate) locks_broken: bool,
    /// Bots that cannot renew their lease, and whose name another process takes when it has run out.
    pub(crate) usurped: BTreeSet<usize>,
    pub(crate) taken: BTreeSet<(Role, Role)>,
    pub(crate) log: Vec<String>,
}

impl World {
    pub(crate) fn new(seed: u64, mode: Mode) -> Self {
        let bots = (0..BOTS).map(|n| new_bot(n, mode, 0)).collect();
        let mut world = Self {
            seed,
            dice: Dice(seed),
            mode,
            now: Time::ZERO,
            dcs: MemoryDcs::new(),
            bots,
            instances: 0,
            generation: 0,
            live: BTreeSet::new(),
            candidate: None,
            late: Vec::new(),
            locks_broken: false,
            usurped: BTreeSet::new(),
            taken: BTreeSet::new(),
            log: Vec::new(),
        };
        world.put("main/members/pg-1", r#"{"state":"running","role":"primary","conn_url":"postgres://pg-1:5432/x"}"#);
        world
    }

    pub(crate) fn put(&mut self, key: &str, value: &str) {
        self.write(Write::put(format!("/service/{key}"), value));
    }

    pub(crate) fn write(&mut self, write: Write) {
        self.dcs.transact(self.now, &Transaction::new(Vec::new(), vec![write]));
    }

    /// Something happens.
    pub(crate) fn disturb(&mut self) {
        if self.dice.one_in(3) {
            self.now += Span::from_millis(self.dice.roll(500));
            self.dcs.expire(self.now);
        }
        let n = usize::try_from(self.dice.roll(BOTS as u64)).expect("small");
        match self.dice.roll(100) {
            0..=22 => self.watch(n),
            23..=45 => self.answer(n),
            46..=52 => self.lease(n),
            53..=56 => self.renew_all(),
            57..=66 => self.timer(n),
            67..=74 => self.prepare(n),
            75..=82 => self.app(n),
            83..=86 => {
                let in_flight_milli = self.dice.roll(30) * 1_000;
                self.step(n, Event::LoadMeasured(WebLoad { in_flight_milli, rps: 1, p99_us: 1, ..WebLoad::default() }));
            }
            87..=88 => self.in_flight(n),
            89 if self.dice.one_in(2) => self.step(n, Event::ProcessorStalled),
            89 => self.in_flight(n),
            90 if self.dice.one_in(3) => self.crash(n),
            91 => self.publish(),
            92..=93 if self.dice.one_in(2) => self.meddle(),
            92 => {
                self.usurped.insert(n);
            }
            98 => {
                self.usurped.insert(n);
            }
            93 => self.lose_watch(n),
            94 => {
                if self.dice.one_in(3) {
                    self.step(n, Event::ShutdownRequested);
                } else {
                    self.reconfigure(n);
                }
            }
            95 => {
                if let Some(index) = self.late.len().checked_sub(1) {
                    let transaction = self.late.swap_remove(index);
                    self.transact(&transaction);
                }
            }
            96..=97 => {
                if let Some(id) = self.bots[n].database_probe.take() {
                    let answers = self.dice.one_in(2);
                    self.step(n, Event::DatabaseProbed { id, answers });
                }
                if self.bots[n].probed.take().is_some() {
                    let instance = self.dice.one_in(2).then(|| String::from("somebody-else"));
                    self.step(n, Event::NameProbed { instance });
                }
            }
            _ => self.renew_all(),
        }
    }

    pub(crate) fn step(&mut self, n: usize, event: Event) {
        if self.bots[n].exit.is_some() {
            self.crash(n);
            return;
        }
        self.log.push(format!("{} web-{n} {}", self.now, label(&event)));
        let fired = event == Event::TimerFired;
        let (now, bot) = (self.now, &mut self.bots[n]);
        let actions = bot.step(now, event, &mut self.dcs);
        let state = self.bots[n].state();
        for pair in state.path().windows(2) {
            self.taken.insert((pair[0], pair[1]));
        }
        if let Err(broken) = WebMachine::invariants(state) {
            self.fail(&broken);
        }
        if fired && WebMachine::deadline(state).is_some_and(|d| d.at <= now) {
            self.fail("a timer that fires for ever");
        }
        for action in &actions {
            self.judge(n, action);
        }
        self.judge_fleet();
    }

    pub(crate) fn fail(&self, what: &str) -> ! {
        let tail = self.log.len().saturating_sub(40);
        panic!("seed {}: {what}\n{}", self.seed, self.log[tail..].join("\n"));
    }

    /// S4: what is served was published. S3: the count changes under the lock only.
    pub(crate) fn judge(&self, n: usize, action: &Action) {
        match action {
            Action::SetRoute(route) => {
                if route.sha().is_some_and(|sha| !self.live.contains(sha)) {
                    self.fail(&format!("web-{n} serves what never was live: {route:?}"));
                }
                if let Route::App { instance, .. } = route
                    && self.bots[n].apps.get(instance) != Some(&false)
                {
                    self.fail(&format!("web-{n} sends requests to an app that is stopped or gone: {route:?}"));
                }
            }
            Action::StopApp { instance, .. } => {
                let routed = matches!(self.bots[n].state().route(), Route::App { instance: at, .. } if at == instance);
                if routed {
                    self.fail(&format!("web-{n} stops the app that requests go to"));
                }
            }
            Action::Dcs(bots_core::dcs::DcsAction::Transact { transaction, .. }) => {
                let message = |key: &str| key.contains("/load/") && !key.ends_with("/claim");
                let counts = transaction.then.iter().any(|write| match write {
                    Write::Put { key, .. } | Write::Delete { key } => message(key),
                });
                if counts && !transaction.compare.iter().any(|c| c.key() == "/service/web/leader") {
                    self.fail(&format!("web-{n} changes the count without the lock"));
                }
            }
            _ => {}
        }
    }

    /// S5 and S6: for sure means that the lease lives by the bot's own clock.
    pub(crate) fn judge_fleet(&self) {
        let mut holders: BTreeMap<u32, usize> = BTreeMap::new();
        let mut leaders = 0;
        for (n, bot) in self.bots.iter().enumerate().filter(|(_, bot)| bot.exit.is_none()) {
            let state = bot.state();
            leaders += u32::from(state.leads(self.now));
            let Some(slot) = state.slot_for_sure(self.now) else { continue };
            if let Some(other) = holders.insert(slot, n).filter(|_| !self.locks_broken) {
                self.fail(&format!("web-{other} and web-{n} both answer load message {slot}"));
            }
        }
        if holders.keys().any(|slot| *slot >= MAX) {
            self.fail("more bots serve than may");
        }
        if leaders > 1 && !self.locks_broken {
            self.fail("two leaders");
        }
    }

    pub(crate) fn transact(&mut self, transaction: &Transaction) {
        self.dcs.transact(self.now, transaction);
    }

    pub(crate) fn watch(&mut self, n: usize) {
        if let Some(event) = self.bots[n].watched(&self.dcs) {
            self.step(n, event);
        }
    }

    pub(crate) fn answer(&mut self, n: usize) {
        if !self.dice.one_in(8) {
            if let Some(event) = self.bots[n].answered(self.now, &mut self.dcs) {
                self.step(n, event);
            }
            return;
        }
        let Some((transaction, event)) = self.bots[n].unanswered() else { return };
        match self.dice.roll(3) {
            0 => self.transact(&transaction),
            1 => self.late.push(transaction),
            _ => {}
        }
        self.step(n, event);
    }

    pub(crate) fn lease(&mut self, n: usize) {
        if let Some(event) = self.bots[n].granted(self.now, &mut self.dcs) {
            self.step(n, event);
        } else {
            self.renew(n);
        }
    }

    pub(crate) fn renew(&mut self, n: usize) {
        if self.usurped.contains(&n) {
            if self.bots[n].lease.is_some_and(|lease| self.dcs.lease_lives(lease)) {
                return;
            }
            self.usurped.remove(&n);
            if self.dice.one_in(2) {
                // The bot drains by the time it learns that its lease is gone.
                (0..MAX).for_each(|slot| self.write(Write::delete(format!("/service/web/load/{slot:04}"))));
                self.watch(n);
            }
            let value =
                r#"{"kind":"web","state":"idle","role":"member","instance":"somebody-else","api_url":"http://x"}"#;
            self.put(&format!("web/members/web-{n}"), value);
        }
        if let Some(event) = self.bots[n].renewed(self.now, TTL, &mut self.dcs) {
            self.step(n, event);
        }
    }

    pub(crate) fn renew_all(&mut self) {
        for n in 0..BOTS {
            self.renew(n);
        }
    }

    pub(crate) fn timer(&mut self, n: usize) {
        if WebMachine::deadline(self.bots[n].state()).is_some_and(|d| d.at <= self.now) {
            self.step(n, Event::TimerFired);
        }
    }

    pub(crate) fn prepare(&mut self, n: usize) {
        let Some((id, sha)) = self.bots[n].preparing.pop_front() else { return };
        // What all are to serve in the end can be served.
        if self.dice.one_in(12) && sha != common::sha('f') {
            self.step(n, Event::ContentRefused { id, sha, why: String::from("never") });
        } else if self.dice.one_in(5) {
            self.step(n, Event::ContentFailed { id, sha, why: String::from("no") });
        } else {
            self.step(n, Event::ContentPrepared { id, sha });
        }
    }

    pub(crate) fn app(&mut self, n: usize) {
        let Some((instance, stopping)) = self.bots[n].apps.iter().next_back().map(|(i, s)| (*i, *s)) else { return };
        if stopping || self.dice.one_in(4) {
            self.bots[n].apps.remove(&instance);
            self.step(n, Event::AppExited { instance, how: String::from("exit code 1") });
        } else if self.dice.one_in(4) {
            self.step(n, Event::AppHung { instance, how: String::from("no answer") });
        } else {
            self.step(n, Event::AppReady { instance });
        }
    }

    pub(crate) fn in_flight(&mut self, n: usize) {
        if let Some(id) = self.bots[n].awaited.take() {
            self.step(n, Event::InFlightEnded { id });
        }
    }

    /// Another way to run the app, or the same, with or without a bound on its connections.
    pub(crate) fn reconfigure(&mut self, n: usize) {
        let (news, bounded) = (self.dice.roll(2), self.dice.one_in(2));
        let event = self.bots[n].reconfigured(|live| {
            live.configuration += news;
            live.connections = bounded.then_some(ConnectionBudget { per_instance: 5, share_percent: 100 });
        });
        self.step(n, event);
    }

    pub(crate) fn lose_watch(&mut self, n: usize) {
        for prefix in self.bots[n].state().prefixes() {
            self.bots[n].seen.remove(&prefix);
            self.step(n, Event::Dcs(DcsEvent::WatchLost { prefix, why: String::from("reset") }));
        }
    }

    /// The process is gone; its lease lives on; a new process of the same name starts.
    pub(crate) fn crash(&mut self, n: usize) {
        self.instances += 1;
        self.log.push(format!("{} web-{n} starts anew", self.now));
        self.bots[n] = new_bot(n, self.mode, self.instances);
    }

    pub(crate) fn publish(&mut self) {
        let digit = char::from_digit(u32::try_from(self.dice.roll(16)).expect("small"), 16).expect("a digit");
        if self.dice.one_in(3)
            && let Some(sha) = self.candidate.take()
        {
            self.live.insert(sha.clone());
            self.put("site/revision/live", &common::revision(&sha, self.generation));
            self.write(Write::delete("/service/site/revision/candidate"));
            return;
        }
        self.generation += 1;
        let (sha, generation) = (common::sha(digit), self.generation);
        if self.dice.one_in(2) {
            self.put("site/revision/candidate", &common::revision(&sha, generation));
            self.candidate = Some(sha);
        } else {
            self.live.insert(sha.clone());
            self.put("site/revision/live", &common::revision(&sha, generation));
        }
    }

    /// Somebody else's hand in the store.
    pub(crate) fn meddle(&mut self) {
        let slot = self.dice.roll(3);
        match self.dice.roll(8) {
            0 | 6 | 7 => self.write(Write::delete(format!("/service/web/load/{slot:04}"))),
            lock @ 1..=2 if self.seed.is_multiple_of(5) => {
                self.locks_broken = true;
                let key = if lock == 1 { format!("load/{slot:04}/claim") } else { String::from("leader") };
                self.write(Write::delete(format!("/service/web/{key}")));
            }
            3 => self.put("web/config", r#"{"scaling":{"stable_window_s":1}}"#),
            4 => self.put("web/config", r#"{"scaling":{"min":0},"cdn_url":7}"#),
            5 if self.dice.one_in(4) => self.write(Write::delete("/service/main/leader")),
            5 => self.put("main/leader", "pg-1"),
            _ => {
                let conn_url = format!("postgres://pg-{slot}:5432/x");
                self.put(
                    "main/members/pg-2",
                    &format!(r#"{{"state":"running","role":"replica","conn_url":"{conn_url}"}}"#),
                );
            }
        }
    }

    /// No more faults: everything is answered, nothing fails. Within bounded time the fleet serves what it should.
    pub(crate) fn heal(&mut self) {
        self.usurped.clear();
        self.live.insert(common::sha('f'));
        self.generation += 1;
        let live = common::revision(&common::sha('f'), self.generation);
        self.put("site/revision/live", &live);
        self.put("web/config", r#"{"scaling":{"stable_window_s":2}}"#);
        self.put("main/leader", "pg-1");
        let load = WebLoad { in_flight_milli: 3_000, rps: 1, p99_us: 1, ..WebLoad::default() };
        let end = self.now + Span::from_secs(60);
        while self.now < end {
            self.now += Span::from_millis(250);
            self.dcs.expire(self.now);
            for n in 0..BOTS {
                self.serve_everything(n, load);
            }
        }
        let serving: Vec<&Bot> = self.bots.iter().filter(|b| b.role() == Role::Serving).collect();
        let right = serving.iter().all(|b| b.state().route().sha() == Some(common::sha('f').as_str()));
        let idle = self.bots.iter().filter(|b| b.role() == Role::Idle).count();
        if serving.len() != 1 || !right || idle != BOTS - 1 {
            let roles: Vec<String> =
                self.bots.iter().map(|b| format!("{:?}", WebMachine::report(b.state(), self.now))).collect();
            self.fail(&format!("healed, and yet not one bot serves the live commit:\n{}", roles.join("\n")));
        }
    }

    /// Nothing fails but the app, whose instances start, stop, hang and die in their own time.
    pub(crate) fn serve_meanwhile(&mut self, n: usize, load: WebLoad) {
        self.answer_everything(n);
        let apps: Vec<(u64, bool)> = self.bots[n].apps.iter().map(|(i, s)| (*i, *s)).collect();
        for (instance, stopping) in apps {
            match self.dice.roll(30) {
                0 => self.end_app(n, instance),
                1 if stopping => self.end_app(n, instance),
                1 => self.step(n, Event::AppHung { instance, how: String::from("no answer") }),
                2..9 if !stopping => self.step(n, Event::AppReady { instance }),
                _ => {}
            }
        }
        self.look_at_clock(n, load);
    }

    pub(crate) fn end_app(&mut self, n: usize, instance: u64) {
        self.bots[n].apps.remove(&instance);
        self.step(n, Event::AppExited { instance, how: String::from("exit code 0") });
    }

    pub(crate) fn serve_everything(&mut self, n: usize, load: WebLoad) {
        self.answer_everything(n);
        let apps: Vec<(u64, bool)> = self.bots[n].apps.iter().map(|(i, s)| (*i, *s)).collect();
        for (instance, stopping) in apps {
            if stopping {
                self.end_app(n, instance);
            } else {
                self.step(n, Event::AppReady { instance });
            }
        }
        self.look_at_clock(n, load);
    }

    pub(crate) fn answer_everything(&mut self, n: usize) {
        for _ in 0..100 {
            let bot = &mut self.bots[n];
            let event = bot
                .granted(self.now, &mut self.dcs)
                .or_else(|| bot.answered(self.now, &mut self.dcs))
                .or_else(|| bot.watched(&self.dcs))
                .or_else(|| bot.probed.take().map(|_| Event::NameProbed { instance: None }))
                .or_else(|| bot.preparing.pop_front().map(|(id, sha)| Event::ContentPrepared { id, sha }))
                .or_else(|| bot.database_probe.take().map(|id| Event::DatabaseProbed { id, answers: true }))
                .or_else(|| bot.awaited.take().map(|id| Event::InFlightEnded { id }));
            match event {
                Some(event) => self.step(n, event),
                None => break,
            }
        }
    }

    pub(crate) fn look_at_clock(&mut self, n: usize, load: WebLoad) {
        self.renew(n);
        if self.bots[n].role() == Role::Serving {
            self.step(n, Event::LoadMeasured(load));
        }
        self.timer(n);
        if self.bots[n].exit.is_some() {
            self.crash(n);
        }
    }
}

fn new_bot(n: usize, mode: Mode, instance: u64) -> Bot {
    let scaling = ScalingSettings { max: MAX, stable_window_s: 3, ..ScalingSettings::default() };
    let mut settings = common::settings(&format!("web-{n}"), mode, scaling);
    settings.live.drain_timeout = Span::from_secs(20);
    Bot::new(settings, &format!("web-{n}-{instance}"))
}

fn label(event: &Event) -> String {
    match event {
        Event::Dcs(DcsEvent::Listed { prefix, revision, .. }) => format!("lists {prefix} at {}", revision.0),
        Event::Dcs(DcsEvent::Changed { changes, .. }) => {
            let keys: Vec<&str> = changes
                .iter()
                .map(|change| match change {
                    bots_core::dcs::Change::Put(kv) => kv.key.as_str(),
                    bots_core::dcs::Change::Deleted { key, .. } => key.as_str(),
                })
                .collect();
            format!("sees {keys:?}")
        }
        other => format!("{other:?}"),
    }
}
