//! Transcripts of the machine: commands and what came of them, in `tests/machine/*.txt`. `REWRITE=1` rewrites them.
//!
//! One bot, the in-memory store, a clock that moves on command. The commands are in [`Player::play`].

mod common;

use std::fmt::Write as _;

use bots_core::{
    dcs::{DcsAction, DcsEvent, MemoryDcs, Transaction, Write},
    machine::{Machine, Span, Time},
    wire::{LoadChange, LoadHistory, LoadMessage, WebLoad},
};
use common::Bot;
use datadriven::TestCase;
use web_bot::machine::{Action, ConnectionBudget, Event, Mode, Role, Route, ScalingSettings, WebMachine};

#[test]
fn transcripts() {
    datadriven::walk("tests/machine", |file| {
        let mut player = Player { dcs: MemoryDcs::new(), ..Player::default() };
        file.run(|case| player.play(case));
    });
}

#[test]
fn the_diagram_in_the_docs_is_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/machines/web.md");
    let wanted = format!(
        "# The web bot's machine\n\nDrawn from the transition table in `crates/web-bot/src/machine/role.rs` by a test that \
         compares; `REWRITE=1 cargo nextest run -p web-bot the_diagram` draws it anew.\n\n```mermaid\n{}```\n",
        WebMachine::TRANSITIONS.mermaid(),
    );
    if std::env::var_os("REWRITE").is_some() {
        std::fs::create_dir_all(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/machines")).expect("make the folder");
        std::fs::write(path, &wanted).expect("write the diagram");
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(found, wanted, "run it with REWRITE=1");
}

#[derive(Default)]
struct Player {
    now: Time,
    dcs: MemoryDcs,
    bot: Option<Bot>,
    others: u64,
}

impl Player {
    fn play(&mut self, case: &mut TestCase) -> String {
        let mut log = String::new();
        match case.directive.as_str() {
            // start [app] [min=] [max=] [target=] [window=] [connections=] [share=]: a bot called web-1.
            "start" => self.start(case),
            // put [leased]: the input is a key in the scope web, site or main, and its value.
            "put" => self.put(case),
            "delete" => {
                let writes = vec![Write::delete(format!("/service/{}", case.input.trim()))];
                self.dcs.transact(self.now, &Transaction::new(Vec::new(), writes));
            }
            // history falls= rises= ago-s=: the record of so many changes of the count, all at one time.
            "history" => self.history(case),
            // live SHA-DIGIT GENERATION, candidate SHA-DIGIT GENERATION
            "live" | "candidate" => {
                let digit = case.input.trim().chars().next().expect("a digit");
                let generation = case.take_arg("generation").expect("generation=");
                let key = format!("/service/site/revision/{}", case.directive);
                let value = common::revision(&common::sha(digit), generation);
                self.dcs.transact(self.now, &Transaction::new(Vec::new(), vec![Write::put(key, value)]));
            }
            // sync: the store does all that is due, until nothing is.
            "sync" => self.sync(&mut log),
            // watch: the watches show what has happened; nothing else does.
            "watch" => while self.watch(&mut log) {},
            // answer [lost] [undone]: the oldest question is answered, or its answer is lost, done or not.
            "answer" => self.answer(case, &mut log),
            // pass SPAN-MS: time passes; leases are renewed and timers fire on the way.
            "pass" => self.pass(case, &mut log),
            "lease-lost" => {
                let bot = self.bot.as_mut().expect("started");
                let lease = bot.lease.take().expect("a lease");
                self.dcs.revoke(lease);
                self.step(Event::Dcs(DcsEvent::LeaseLost { lease, why: String::from("it ran out") }), &mut log);
            }
            "watch-lost" => {
                for prefix in self.bot.as_ref().expect("started").state().prefixes() {
                    self.step(Event::Dcs(DcsEvent::WatchLost { prefix, why: String::from("reset") }), &mut log);
                }
                self.bot.as_mut().expect("started").seen.clear();
            }
            "prepared" => {
                let (id, sha) = self.bot.as_mut().expect("started").preparing.pop_front().expect("a preparation");
                self.step(Event::ContentPrepared { id, sha }, &mut log);
            }
            "failed" => {
                let (id, sha) = self.bot.as_mut().expect("started").preparing.pop_front().expect("a preparation");
                self.step(Event::ContentFailed { id, sha, why: case.input.trim().to_owned() }, &mut log);
            }
            "refused" => {
                let (id, sha) = self.bot.as_mut().expect("started").preparing.pop_front().expect("a preparation");
                self.step(Event::ContentRefused { id, sha, why: case.input.trim().to_owned() }, &mut log);
            }
            "ready" => {
                let instance = case.take_arg("instance").expect("instance=");
                self.step(Event::AppReady { instance }, &mut log);
            }
            "exited" => {
                let instance = case.take_arg("instance").expect("instance=");
                self.step(Event::AppExited { instance, how: case.input.trim().to_owned() }, &mut log);
            }
            "not-started" => {
                let instance = case.take_arg("instance").expect("instance=");
                self.step(Event::AppNotStarted { instance, how: case.input.trim().to_owned() }, &mut log);
            }
            "hung" => {
                let instance = case.take_arg("instance").expect("instance=");
                self.step(Event::AppHung { instance, how: case.input.trim().to_owned() }, &mut log);
            }
            "load" => {
                let in_flight_milli = case.take_arg("milli").expect("milli=");
                self.step(Event::LoadMeasured(WebLoad { in_flight_milli, ..WebLoad::default() }), &mut log);
            }
            "stalled" => self.step(Event::ProcessorStalled, &mut log),
            "in-flight-ended" => {
                let id = self.bot.as_mut().expect("started").awaited.take().expect("asked for");
                self.step(Event::InFlightEnded { id }, &mut log);
            }
            // database answers|silent: what comes of asking the primary.
            "database" => {
                let id = self.bot.as_mut().expect("started").database_probe.take().expect("asked for");
                let answers = case.input.trim() == "answers";
                self.step(Event::DatabaseProbed { id, answers }, &mut log);
            }
            "probed" => {
                let instance = Some(case.input.trim().to_owned()).filter(|i| !i.is_empty());
                self.step(Event::NameProbed { instance }, &mut log);
            }
            // reconfigure N [cdn=]: the bot's file was read again, and says that the app is run in the way of that number.
            "reconfigure" => {
                let configuration = case.input.trim().parse().expect("a number");
                let cdn_url = case.try_take_arg("cdn").expect("an address");
                let bot = self.bot.as_mut().expect("started");
                let event = bot.reconfigured(|live| (live.configuration, live.cdn_url) = (configuration, cdn_url));
                self.step(event, &mut log);
            }
            "shutdown" => self.step(Event::ShutdownRequested, &mut log),
            "report" => return self.report(),
            other => panic!("no command {other}"),
        }
        case.expect_empty().expect("every argument has a meaning");
        let _ = writeln!(log, "{}", self.summary());
        log
    }

    fn start(&mut self, case: &mut TestCase) {
        let mode = if case.take_flag("app").expect("flag") { Mode::App } else { Mode::Static };
        let mut scaling = ScalingSettings::default();
        let mut take = |name: &str, field: &mut u32| {
            if let Some(value) = case.try_take_arg(name).expect("a number") {
                *field = value;
            }
        };
        take("min", &mut scaling.min);
        take("max", &mut scaling.max);
        take("target", &mut scaling.target_in_flight);
        take("window", &mut scaling.stable_window_s);
        let share_percent = case.try_take_arg("share").expect("a number").unwrap_or(100);
        let each = case.try_take_arg("connections").expect("a number");
        let connections = each.map(|per_instance| ConnectionBudget { per_instance, share_percent });
        let mut settings = common::settings("web-1", mode, scaling);
        settings.live.connections = connections;
        self.bot = Some(Bot::new(settings, "instance-1"));
    }

    fn put(&mut self, case: &mut TestCase) {
        let input = case.input.clone();
        let (key, value) = input.trim().split_once(' ').expect("a key and a value");
        let key = format!("/service/{key}");
        let write = if case.take_flag("leased").expect("flag") {
            self.others += 1;
            let lease = self.dcs.grant(self.now, Span::from_secs(100_000));
            Write::put_leased(key, value, lease)
        } else {
            Write::put(key, value)
        };
        self.dcs.transact(self.now, &Transaction::new(Vec::new(), vec![write]));
    }

    fn history(&mut self, case: &mut TestCase) {
        let mut take = |name: &str| case.try_take_arg::<u64>(name).expect("a number").unwrap_or(0);
        let (falls, rises, ago_s) = (take("falls"), take("rises"), take("ago-s"));
        let at_unix_ms = common::EPOCH_UNIX_MS + self.now.as_millis() - ago_s * 1_000;
        let changes =
            (0..falls + rises).map(|n| LoadChange { at_unix_ms, lowered: n < falls, forced: false }).collect();
        let value = serde_json::to_string(&LoadHistory { changes }).expect("json");
        let write = Write::put("/service/web/load/history", value);
        self.dcs.transact(self.now, &Transaction::new(Vec::new(), vec![write]));
    }

    fn step(&mut self, event: Event, log: &mut String) {
        let bot = self.bot.as_mut().expect("started");
        let actions = bot.step(self.now, event, &mut self.dcs);
        WebMachine::invariants(bot.state()).expect("invariants");
        for action in actions {
            let _ = writeln!(log, "{}", describe(&action));
        }
    }

    fn sync(&mut self, log: &mut String) {
        for _ in 0..200 {
            let bot = self.bot.as_mut().expect("started");
            let event = bot.granted(self.now, &mut self.dcs).or_else(|| bot.answered(self.now, &mut self.dcs));
            match event {
                Some(event) => self.step(event, log),
                None if self.watch(log) => {}
                None => return,
            }
        }
        panic!("the bot and the store never come to rest:\n{log}");
    }

    fn watch(&mut self, log: &mut String) -> bool {
        let bot = self.bot.as_mut().expect("started");
        let Some(event) = bot.watched(&self.dcs) else { return false };
        self.step(event, log);
        true
    }

    fn answer(&mut self, case: &mut TestCase, log: &mut String) {
        let lost = case.take_flag("lost").expect("flag");
        let undone = case.take_flag("undone").expect("flag");
        let bot = self.bot.as_mut().expect("started");
        let event = if lost {
            let (transaction, event) = bot.unanswered().expect("a question");
            if !undone {
                self.dcs.transact(self.now, &transaction);
            }
            event
        } else {
            bot.answered(self.now, &mut self.dcs).expect("a question")
        };
        self.step(event, log);
    }

    fn pass(&mut self, case: &mut TestCase, log: &mut String) {
        let end = self.now + Span::from_millis(case.take_arg("ms").expect("ms="));
        while self.now < end {
            let bot = self.bot.as_mut().expect("started");
            let timer = WebMachine::deadline(bot.state()).map(|d| d.at).filter(|at| *at <= end);
            let renewal = self.now + Span::from_secs(1);
            self.now = [timer, Some(renewal), Some(end)].into_iter().flatten().min().expect("an end").max(self.now);
            if let Some(event) = bot.renewed(self.now, Span::from_secs(5), &mut self.dcs) {
                self.step(event, log);
            }
            if timer == Some(self.now) {
                self.step(Event::TimerFired, log);
                let next = WebMachine::deadline(self.bot.as_ref().expect("started").state());
                assert!(next.as_ref().is_none_or(|d| d.at > self.now), "a timer that fires for ever: {next:?}");
            }
        }
    }

    fn report(&self) -> String {
        let report = WebMachine::report(self.bot.as_ref().expect("started").state(), self.now);
        let mut text = format!("{} for {} ms: {}\n", report.role, report.for_ms, report.doing);
        let _ = writeln!(text, "waits for {}", report.waiting_for);
        if let Some((ms, reason)) = &report.next_deadline {
            let _ = writeln!(text, "in {ms} ms: {reason}");
        }
        for why in &report.why_not {
            let _ = writeln!(text, "does not {}: {}", why.alternative, why.because);
        }
        for trouble in &report.troubles {
            let _ = writeln!(text, "trouble: {trouble}");
        }
        text
    }

    fn summary(&self) -> String {
        let Some(bot) = &self.bot else { return String::from("=") };
        let state = bot.state();
        let slot = state.slot().map_or_else(String::new, |slot| format!(" slot {slot}"));
        let leads = if state.leads(self.now) { ", leads" } else { "" };
        let exit = bot.exit.map_or_else(String::new, |code| format!(", exit {code}"));
        let welcome = state.role() != Role::Serving && state.takes_requests();
        let welcome = if welcome { ", takes requests" } else { "" };
        format!("= {} {}{slot}{leads}{exit}{welcome}, route {}", self.now, state.role(), route(state.route()))
    }
}

fn describe(action: &Action) -> String {
    match action {
        Action::Dcs(DcsAction::Transact { id, transaction }) => {
            let compare: Vec<String> = transaction.compare.iter().map(compare).collect();
            let then: Vec<String> = transaction.then.iter().map(write).collect();
            format!("? {} if {} then {}", id.0, compare.join(" and "), then.join(" and "))
        }
        Action::Dcs(other) => format!("{other:?}"),
        Action::SetRoute(to) => format!("route {}", route(to)),
        Action::PrepareContent { id, sha, pack_urls, origin, .. } => {
            let or = if origin.is_empty() { "" } else { " or the origin" };
            format!("prepare {id}: {} from {pack_urls:?}{or}", &sha[..2])
        }
        Action::RetainContent { shas } => {
            format!("retain {}", shas.iter().map(|s| &s[..2]).collect::<Vec<_>>().join(" "))
        }
        Action::StartApp { instance, sha, database_hosts, cdn_url, configuration } => {
            let way = if *configuration == 0 { String::new() } else { format!(" way {configuration}") };
            format!("start app {instance}: {} {database_hosts:?} {cdn_url:?}{way}", &sha[..2])
        }
        Action::ProbeDatabase { id, address } => format!("ask database {id}: {address}"),
        Action::ProbeName { .. } | Action::StopApp { .. } | Action::AwaitInFlight { .. } | Action::Exit { .. } => {
            format!("{action:?}")
        }
    }
}

fn compare(compare: &bots_core::dcs::Compare) -> String {
    use bots_core::dcs::Compare;
    let key = compare.key().trim_start_matches("/service/");
    match compare {
        Compare::Absent(_) => format!("{key} absent"),
        Compare::Present(_) => format!("{key} present"),
        Compare::ValueIs(_, value) => format!("{key} is {value}"),
        Compare::ModifiedAt(_, revision) => format!("{key} of {}", revision.0),
        Compare::CreatedAt(_, revision) => format!("{key} created {}", revision.0),
        Compare::LeaseIs(_, lease) => format!("{key} leased {}", lease.0),
    }
}

fn write(write: &Write) -> String {
    match write {
        Write::Put { key, value, lease } => {
            let lease = lease.map_or_else(String::new, |lease| format!(" leased {}", lease.0));
            format!("{} = {}{lease}", key.trim_start_matches("/service/"), abridged(value))
        }
        Write::Delete { key } => format!("delete {}", key.trim_start_matches("/service/")),
    }
}

/// A value without what is the same in all transcripts.
fn abridged(value: &str) -> String {
    let Ok(serde_json::Value::Object(mut fields)) = serde_json::from_str(value) else { return value.to_owned() };
    if let Some(changes) = fields.get("changes").and_then(serde_json::Value::as_array) {
        let lowered = changes.iter().filter(|change| change["lowered"] == true).count();
        return format!("{} changes, {lowered} down", changes.len());
    }
    for dull in
        ["kind", "node", "version", "api_url", "instance", "url", "since_unix_ms", "posted_by", "posted_unix_ms"]
    {
        fields.remove(dull);
    }
    for commit in ["serving", "prepared"] {
        if let Some(serde_json::Value::String(sha)) = fields.get_mut(commit) {
            sha.truncate(2);
        }
    }
    if let Some(serde_json::Value::String(sha)) = fields.get_mut("refused").and_then(|refused| refused.get_mut("sha")) {
        sha.truncate(2);
    }
    if let Some(load) = fields.get_mut("load") {
        *load = load["in_flight_milli"].clone();
    }
    serde_json::Value::Object(fields).to_string()
}

fn route(route: &Route) -> String {
    match route {
        Route::Refuse { state } => format!("refuse ({state})"),
        Route::Hold => String::from("hold"),
        Route::Static { sha, closing } => format!("files {}{}", &sha[..2], if *closing { " closing" } else { "" }),
        Route::App { instance, sha, closing } => {
            format!("app {instance} {}{}", &sha[..2], if *closing { " closing" } else { "" })
        }
    }
}

/// etcd takes no transaction with more operations than it allows, and the in-memory store takes none either.
#[test]
fn a_change_of_hundreds_of_slots_is_made_in_several_turns() {
    let scaling = ScalingSettings { min: 250, max: 300, ..ScalingSettings::default() };
    let bot = Bot::new(common::settings("web-1", Mode::Static, scaling), "instance-1");
    let mut player = Player { dcs: MemoryDcs::new(), bot: Some(bot), ..Player::default() };
    let mut log = String::new();
    let messages = |player: &Player| {
        let (_, found) = player.dcs.list("/service/web/load/");
        found.iter().filter(|kv| serde_json::from_str::<LoadMessage>(&kv.value).is_ok()).count()
    };
    player.sync(&mut log);
    assert_eq!(messages(&player), 250, "{log}");

    let fewer = Write::put("/service/web/config", r#"{"scaling":{"min":1,"max":20}}"#);
    player.dcs.transact(player.now, &Transaction::new(Vec::new(), vec![fewer]));
    player.sync(&mut log);
    assert_eq!(messages(&player), 20, "{log}");
}

#[test]
fn roles_are_nouns_in_lower_case() {
    assert_eq!(Role::Serving.to_string(), "serving");
}
