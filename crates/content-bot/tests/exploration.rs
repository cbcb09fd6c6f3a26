//! Random worlds: several content bots, pushes and force-pushes, crashes, cuts, lost answers, bad commits, damaged
//! mirrors. Safety holds after every step; when all is healed, the fleet comes to rest with the right commit live; and
//! every declared edge is taken.
//!
//! One seed decides everything: `SEED=17 cargo nextest run -p content-bot exploration` runs that world alone.

mod world;

use std::collections::{BTreeMap, BTreeSet};

use bots_core::{
    dcs::{Change, Revision},
    machine::{Machine, Span},
    wire::{ContentRevision, Pin, Purged, Quarantined, Refused, WebFacts},
};
use content_bot::machine::{
    Announcement, CanarySettings, ContentMachine, Event, ExportSettings, FetchResult, PURGE_ROUNDS, PollResult,
    PurgeSettings, Role,
};
use world::{Fate, Job, World, site};

const BOTS: [&str; 3] = ["one", "two", "three"];
const WEBS: [&str; 2] = ["w1", "w2"];
const SEEDS: u64 = 300;
const MOVES: u64 = 400;

/// After everything is healed: lease, back-off, poll, fetch and preparation all fit in.
const CONVERGENCE: Span = Span::from_secs(60);

#[test]
fn exploration() {
    let seeds: Vec<u64> = match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().expect("SEED is a number")],
        Err(_) => (0..SEEDS).collect(),
    };
    let mut edges = BTreeSet::new();
    for seed in &seeds {
        let run = std::panic::catch_unwind(|| Explorer::new(*seed).run());
        match run {
            Ok(taken) => edges.extend(taken),
            Err(_) => panic!("reproduce: SEED={seed} cargo nextest run -p content-bot exploration"),
        }
    }
    if seeds.len() > 1 {
        let declared = ContentMachine::TRANSITIONS.edges.iter().map(|e| (e.from, e.to));
        let untaken: Vec<_> = declared.filter(|edge| !edges.contains(edge)).collect();
        assert!(untaken.is_empty(), "declared, but never taken: {untaken:?}");
    }
}

/// What the origin would say of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quality {
    Good,
    Unfit,
    /// It is unfit in a way that shows only where it is served.
    Sick,
    /// No web bot can ever serve it.
    Refused,
}

struct Explorer {
    world: World,
    dice: u64,
    tip: Option<String>,
    commits: BTreeMap<String, Quality>,
    /// Commits that the origin gives out.
    reachable: BTreeSet<String>,
    seen: Revision,
    live: Option<ContentRevision>,
    pinned: Option<String>,
    slots: BTreeSet<&'static str>,
}

impl Explorer {
    fn new(seed: u64) -> Self {
        Self {
            world: World::new(),
            dice: seed,
            tip: None,
            commits: BTreeMap::new(),
            reachable: BTreeSet::new(),
            seen: Revision(1),
            live: None,
            pinned: None,
            slots: BTreeSet::new(),
        }
    }

    fn run(mut self) -> BTreeSet<(Role, Role)> {
        if self.dice % 2 == 1 {
            let (observe, timeout) = (Span::from_secs(2), Span::from_secs(20));
            self.world.canary = Some(CanarySettings { observe, timeout, failures_percent_max: 50 });
            self.world.purge = Some(PurgeSettings { again_after: Span::from_secs(3) });
            // Somebody serves all the time, so that nothing is published untried.
            self.slots.insert(WEBS[0]);
            self.web_follows(WEBS[0]);
        }
        if self.dice.is_multiple_of(3) {
            self.world.export = Some(ExportSettings { grace: Span::from_secs(20), tells: true, one_time: None });
        }
        for name in BOTS {
            self.world.start(name, "main", Vec::new());
        }
        for _move in 0..MOVES {
            self.disturb();
            self.check_publications();
        }
        self.heal();
        self.converge();
        self.world.edges
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.dice = self.dice.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.dice;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % sides
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        let sides = u64::try_from(from.len()).expect("small");
        from[usize::try_from(self.roll(sides)).expect("small")]
    }

    fn disturb(&mut self) {
        let name = self.pick(&BOTS);
        match self.roll(102) {
            0..45 => {
                for _ in 0..=self.roll(6) {
                    self.world.deliver(name);
                }
            }
            45..57 => self.end_job(name),
            57..65 => self.pass_time(),
            65..72 => self.push(),
            72..76 => {
                let delivery = Some(self.roll(20)).filter(|n| *n > 4).map(|n| format!("delivery-{n}"));
                let tip = self.tip.clone().filter(|_| self.roll(2) == 0);
                self.world.step(name, Event::PushReceived(Announcement { delivery, tip }));
            }
            76..85 => self.web_moves(),
            85..87 => {
                let fate = self.pick(&[Fate::Answered, Fate::Answered, Fate::AnswerLost, Fate::Lost]);
                self.world.fate = fate;
            }
            87..89 => self.world.cut(name),
            89..93 => self.world.heal(name),
            93..95 => self.restart(name),
            95 => {
                self.world.step(name, Event::ShutdownRequested);
            }
            96 => self.damage(name),
            97 => self.world.delete(&site().leader()),
            98 => self.lift_quarantine(),
            99 => self.pin(),
            100 => self.world.delete(&site().revision_pin()),
            _ => {
                self.world.namesake = Some(String::from("another")).filter(|_| self.roll(2) == 0);
            }
        }
    }

    fn end_job(&mut self, name: &str) {
        let jobs: Vec<Job> = self.world.bot(name).jobs.values().cloned().collect();
        let fails = self.roll(5) == 0;
        for job in jobs {
            match job {
                Job::Poll if fails => self.world.end_poll(name, PollResult::Failed { why: String::from("no route") }),
                Job::Poll => {
                    let tip = self.tip.clone();
                    let result = tip.map_or(PollResult::Missing, |sha| PollResult::Found { sha });
                    self.world.end_poll(name, result);
                }
                Job::Fetch(_) if fails => {
                    self.world.end_fetch(name, FetchResult::Failed { why: String::from("no route") });
                }
                Job::Read(sha) => {
                    let sick = self.commits.get(&sha) == Some(&Quality::Sick);
                    self.world.end_reading(name, 2, if sick { 2 } else { 0 }, sick.then_some("it answers 500"));
                }
                Job::Export(_) | Job::Tell if fails => {
                    self.world.end_export(name, Err(String::from("the disk is full")));
                    self.world.end_telling(name, Err(String::from("it says no")));
                }
                Job::Export(_) => self.world.end_export(name, Ok(())),
                Job::Tell => self.world.end_telling(name, Ok(())),
                Job::Purge if fails => self.world.end_purge(name, Err(String::from("no route"))),
                Job::Purge => self.world.end_purge(name, Ok(())),
                Job::Fetch(sha) => {
                    let result = match self.commits.get(&sha).filter(|_| self.reachable.contains(&sha)) {
                        Some(Quality::Good | Quality::Sick | Quality::Refused) => FetchResult::Complete,
                        Some(Quality::Unfit) => FetchResult::Unfit { reason: String::from("too large") },
                        None => FetchResult::Vanished,
                    };
                    self.world.end_fetch(name, result);
                }
            }
        }
    }

    fn pass_time(&mut self) {
        let ms = match self.roll(4) {
            0 => self.roll(50),
            1 => self.roll(1_000),
            2 => self.roll(3_000),
            _ => self.roll(12_000),
        };
        // Deliveries lag behind: only the clock moves, and leases run out.
        self.world.now += Span::from_millis(ms);
        let now = self.world.now;
        self.world.dcs.expire(now);
    }

    fn push(&mut self) {
        match self.roll(8) {
            0 => self.tip = None,
            1 if !self.commits.is_empty() => {
                let known: Vec<String> = self.commits.keys().cloned().collect();
                let at = self.roll(u64::try_from(known.len()).expect("small"));
                let old = known[usize::try_from(at).expect("small")].clone();
                self.reachable.insert(old.clone());
                self.tip = Some(old);
            }
            force => {
                if force == 2 {
                    self.reachable.clear();
                }
                let sha = format!("{:040x}", self.commits.len() + 1);
                let quality = match self.roll(10) {
                    0 | 1 => Quality::Unfit,
                    2 if self.world.canary.is_some() => Quality::Sick,
                    3 if self.world.canary.is_some() => Quality::Refused,
                    _ => Quality::Good,
                };
                self.commits.insert(sha.clone(), quality);
                self.reachable.insert(sha.clone());
                self.tip = Some(sha);
            }
        }
    }

    fn web_moves(&mut self) {
        let name = self.pick(&WEBS);
        let stays = self.world.canary.is_some() && name == WEBS[0];
        match self.roll(6) {
            1 | 2 if stays => {}
            0 => {
                self.slots.insert(name);
            }
            1 => {
                self.slots.remove(name);
            }
            2 => return self.world.delete(&world::web().member(name)),
            _ => {}
        }
        self.web_follows(name);
    }

    fn web_follows(&mut self, name: &'static str) {
        let slot = self.slots.contains(name).then_some(0);
        let prepared = self.world.candidate().or_else(|| self.world.live()).map(|r| r.sha);
        let canary = self.world.canary_key().filter(|canary| canary.member == format!("web/{name}"));
        let serving = canary.map(|canary| canary.sha).or_else(|| self.world.live().map(|r| r.sha));
        let refuses = |sha: &String| self.commits.get(sha) == Some(&Quality::Refused);
        let refused = prepared.clone().filter(refuses).map(|sha| Refused { sha, why: String::from("line 1") });
        let prepared = prepared.filter(|sha| !refuses(sha)).or_else(|| serving.clone());
        self.world.web_says(name, &WebFacts { slot, prepared, serving, refused, ..WebFacts::default() });
    }

    fn restart(&mut self, name: &str) {
        let disk = self.world.bot(name).disk.clone();
        self.world.start(name, "main", disk);
    }

    fn damage(&mut self, name: &str) {
        if let Some(commit) = self.world.bot(name).disk.pop() {
            self.world.step(name, Event::CommitDamaged { sha: commit.sha });
        }
    }

    fn lift_quarantine(&mut self) {
        let (_, marks) = self.world.dcs.list(&site().quarantine_prefix());
        if let Some(mark) = marks.first() {
            self.world.delete(&mark.key);
        }
    }

    fn pin(&mut self) {
        let known: Vec<String> = self.commits.keys().cloned().collect();
        if !known.is_empty() {
            let at = self.roll(u64::try_from(known.len()).expect("small"));
            let sha = known[usize::try_from(at).expect("small")].clone();
            let pin = Pin { sha, since_unix_ms: 0 };
            self.world.put(&site().revision_pin(), &serde_json::to_string(&pin).expect("JSON"));
        }
    }

    /// What went live since the last look: fit, one after the other, and nothing but what was pinned then.
    fn check_publications(&mut self) {
        let changes = self.world.changes(self.seen);
        self.seen = self.world.dcs.revision();
        for change in changes {
            match &change {
                Change::Put(kv) if kv.key == site().revision_pin() => {
                    self.pinned = Some(serde_json::from_str::<Pin>(&kv.value).expect("a pin").sha);
                }
                Change::Deleted { key, revision: _ } if *key == site().revision_pin() => self.pinned = None,
                Change::Put(_) | Change::Deleted { .. } => {}
            }
            let Change::Put(kv) = change else { continue };
            if kv.key == site().revision_live() {
                let live: ContentRevision = serde_json::from_str(&kv.value).expect("a revision");
                assert_eq!(self.commits.get(&live.sha), Some(&Quality::Good), "only a good commit goes live");
                assert!(
                    self.pinned.as_ref().is_none_or(|pin| *pin == live.sha),
                    "nothing but the pinned commit goes live"
                );
                let before = self.live.as_ref().map_or(0, |l| l.generation);
                assert!(live.generation > before, "generations grow: {before}, {}", live.generation);
                self.live = Some(live);
            } else if let Some(sha) = kv.key.strip_prefix(&site().quarantine_prefix()) {
                let mark: Quarantined = serde_json::from_str(&kv.value).expect("a mark");
                let quality = self.commits.get(sha);
                let gone = mark.reason.contains("did not serve it") || mark.reason.contains("went away");
                let late = self.world.canary.is_some() && gone;
                assert!(
                    late || quality != Some(&Quality::Good),
                    "only an unfit commit is quarantined: {}",
                    mark.reason
                );
            }
        }
    }

    fn check_purged(&mut self) {
        if self.world.purge.is_some() {
            let purged = self.world.dcs.get(&site().revision_purged()).expect("caches are purged");
            let purged: Purged = serde_json::from_str(&purged.value).expect("a purge");
            let generation = self.world.live().map_or(0, |live| live.generation);
            assert_eq!(purged, Purged { generation, rounds: PURGE_ROUNDS }, "caches know of the live revision");
        }
    }

    fn heal(&mut self) {
        self.world.fate = Fate::Answered;
        self.world.namesake = None;
        self.world.delete(&site().revision_pin());
        for name in BOTS {
            if self.world.bot(name).exited.is_some() {
                self.restart(name);
            }
            self.world.heal(name);
        }
    }

    fn converge(&mut self) {
        let until = self.world.now + CONVERGENCE;
        let mut rounds = 0;
        while self.world.now < until {
            rounds += 1;
            assert!(rounds < 2_000, "the fleet does not come to rest:\n{}", self.world.log.join("\n"));
            self.world.settle();
            for name in BOTS {
                let jobs: Vec<Job> = self.world.bot(name).jobs.values().cloned().collect();
                for _job in jobs {
                    self.end_job(name);
                }
            }
            for name in WEBS {
                self.web_follows(name);
            }
            self.world.settle();
            self.check_publications();
            self.world.advance(Span::from_millis(500));
        }
        let leaders = BOTS.iter().filter(|name| self.world.bots[**name].state.role().leads()).count();
        assert_eq!(leaders, 1, "one bot leads");
        let live = self.world.live().map(|l| l.sha);
        let candidate = self.world.candidate().map(|candidate| self.commits[&candidate.sha]);
        if live.is_none() && candidate == Some(Quality::Refused) {
            // Who serves nothing has not shown that it could: what it refuses is held, and no more.
            return;
        }
        assert_eq!(self.world.candidate(), None, "nothing is left half published");
        if self.world.export.is_some() {
            for name in BOTS {
                let (obtainable, exported) = (live.as_ref(), self.world.bots[name].state.exported());
                let reachable = obtainable.is_none_or(|sha| self.reachable.contains(sha));
                assert!(!reachable || exported == obtainable.map(String::as_str), "{name} exports the live commit");
            }
        }
        match self.tip.as_ref().map(|tip| (tip, self.commits[tip])) {
            Some((tip, Quality::Good)) => {
                let late = self.world.canary.is_some() && self.world.dcs.get(&site().quarantine(tip)).is_some();
                assert!(late || live.as_ref() == Some(tip), "the pushed commit is live");
                self.check_purged();
            }
            Some((tip, Quality::Unfit | Quality::Sick | Quality::Refused)) => {
                assert_ne!(live.as_ref(), Some(tip), "the unfit commit is not live");
                assert!(self.world.dcs.get(&site().quarantine(tip)).is_some(), "the unfit commit is quarantined");
            }
            None => {}
        }
    }
}
