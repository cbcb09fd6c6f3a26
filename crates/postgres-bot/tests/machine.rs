//! Transcripts of the postgres machine: what happens to it, and what it does. `REWRITE=1` writes them afresh.

mod world;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use bots_core::{
    dcs::{Outcome, Revision},
    leadership::generation,
    machine::{Machine, Span},
    wire::{EdgeStand, Lsn, ParameterChange, PostgresFacts, ScheduledRestart, Timeline, rfc3339_from_unix_ms},
};
use datadriven::TestCase;
use postgres_bot::machine::{
    Ask, AskedId, Command, CommandId, DataDir, Disk, Event, LeaderSlot, LeaderSlots, PeerAnswer, Postgres, PostgresBot,
    RemoveData, ReplicationSlot, Restart, Role, Running, Server, Settings, SlotKind, Standby, WaitsFor, Xid,
};
use serde_json::json;
use world::{Fate, SYSTEM_ID, World, member, scope, server, settings};

#[test]
fn transcripts() {
    datadriven::walk("tests/machine", |file| {
        let mut world = World::new(settings("pg1"));
        let mut reported = String::new();
        file.run(|case| {
            world.log.clear();
            let args = Args(case);
            let mut shown = perform(&mut world, &args);
            if !args.has("late") {
                world.watch();
            }
            if args.has("quietly") {
                reported = report(&world);
                return String::from("...\n");
            }
            shown.extend(world.log.drain(..).map(|line| line + "\n"));
            let report = report(&world);
            if report != reported {
                shown.push_str(&report);
                reported = report;
            }
            if shown.is_empty() { String::from("(nothing)\n") } else { shown }
        });
    });
}

struct Args<'c>(&'c TestCase);

impl Args<'_> {
    fn has(&self, name: &str) -> bool {
        self.0.args.contains_key(name)
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.0.args.get(name)?.first().map(String::as_str)
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.text(name).map(|text| text.parse().expect("a number"))
    }

    /// The server's timeline and position; positions are hexadecimal.
    fn server(&self) -> (u32, u64) {
        let timeline = self.number("tl").map_or(1, |tl| u32::try_from(tl).expect("a timeline"));
        (timeline, self.text("lsn").map_or(0x300, hex))
    }

    fn input(&self) -> &str {
        self.0.input.trim()
    }
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text, 16).expect("a position in hexadecimal")
}

/// One directive; says what is to be shown before what the bot did.
fn perform(world: &mut World, args: &Args<'_>) -> String {
    match args.0.directive.as_str() {
        "new" => *world = World::new(configured(args)),
        "given" => return given(world, args),
        "restart" => {
            let settings = Settings { instance: String::from("pg1-b"), ..configured(args) };
            if args.has("guarded") {
                world.restart_beside_server(settings);
            } else {
                world.restart(settings);
            }
        }
        "lease" => world.grant(),
        "grant-by-hand" => world.grants_at_once = false,
        "lease-expires" => world.expire(),
        "lease-lost" => world.tell_lease_lost(),
        "etcd-silent" => world.renewing = false,
        "etcd-answers" => {
            world.renewing = true;
            world.renew();
        }
        "listed" => world.list(),
        "watch-lost" => world.break_watch(),
        "watch" | "report" => {}
        "share-by-hand" => world.shares_at_once = false,
        "answer" => return answer(world, args),
        "name" => {
            let instance = if args.has("nobody") { None } else { Some(args.input().to_owned()) };
            world.step(Event::NameProbed { instance });
        }
        "inspected" => {
            let running = if args.has("running") { Running::LeftBehind { fence: None } } else { world.shown_running() };
            world.step(Event::DataInspected(data_dir(args, running)));
        }
        "unusable" => {
            let code = u8::try_from(args.number("code").expect("code=4")).expect("a code");
            world.step(Event::DataUnusable { why: args.input().to_owned(), code });
        }
        "done" => {
            assert!(world.may_end_well(), "{:?} cannot end well without a server", world.job);
            let (timeline, position) = args.server();
            world.job_done(timeline, position, !args.has("dirty"));
        }
        "failed" => world.job_failed(args.input()),
        "observed" => {
            let (timeline, position) = args.server();
            world.observe(match () {
                () if args.has("silent") => Postgres::Silent,
                () if args.has("starting") => Postgres::Starting,
                () if args.has("down") => Postgres::Down,
                () => {
                    let up = server(args.has("standby"), timeline, position);
                    let change = ParameterChange { old_value: String::from("100"), new_value: String::from("200") };
                    let pending_restart =
                        args.text("pending").map(|name| (name.to_owned(), change)).into_iter().collect();
                    let slots = args.has("slots").then(|| slots(args));
                    // Who streams from a primary, and up to where it has flushed: `pg2=(500)`.
                    let flushed = args.0.args.iter().filter(|(name, _)| name.starts_with("pg"));
                    let standby = |said: &[String]| Standby { streams: true, flushed: Lsn(hex(&said[0])) };
                    let standbys = flushed.filter(|_| !args.has("slots"));
                    let standbys = standbys.map(|(name, said)| (name.clone(), standby(said))).collect();
                    let told = || world.configured().get("synchronous_standby_names").cloned().unwrap_or_default();
                    let names = args.text("names").map_or_else(told, str::to_owned);
                    let waits_for = WaitsFor { names, in_force: args.has("in_force") };
                    let (streaming, restores) = (args.has("streaming"), args.has("restores"));
                    Postgres::Up(Server { streaming, restores, pending_restart, slots, standbys, waits_for, ..up })
                }
            });
        }
        "disk" => world.step(Event::DiskObserved(match () {
            () if args.has("stalled") => Disk::Stalled,
            () if args.has("full") => Disk::Full { dir: String::from("the data directory"), bytes_free: 512 },
            () => Disk::Good,
        })),
        "guard" => world.step(Event::GuardObserved { answers: !args.has("silent") }),
        "watchdog-seen" => world.step(Event::WatchdogSeen(well(args, ()))),
        "watchdog-used" => world.step(Event::WatchdogUsed(well(args, args.number("s").unwrap_or(3)))),
        "closed" if !world.may_close() => return String::from("(no primary is being stopped)\n"),
        "closed" => world.server_closes(args.server().1),
        "exited" => world.server_exits(args.input()),
        "probed" => probed(world, args),
        "leader-slots" => {
            let Some(id) = world.slots_asked.take() else { return String::from("(the leader was not asked)\n") };
            let there = |(name, slot): (String, ReplicationSlot)| {
                let (confirmed, catalog_xmin) = (slot.confirmed.expect(".c500"), slot.catalog_xmin.expect(".x735"));
                (name, LeaderSlot { confirmed, catalog_xmin })
            };
            let feedback = args.number("feedback").map(|number| Xid(u32::try_from(number).expect("a number")));
            let fetched = args.0.args.get("fetched").cloned().unwrap_or_default();
            let seen = LeaderSlots { feedback, slots: slots(args).into_iter().map(there).collect(), fetched };
            world.step(Event::LeaderSlotsSeen { id, seen: Ok(seen) });
        }
        "advance" => world.pass(Span::from_millis(args.number("ms").expect("ms=500"))),
        "freeze" => world.now += Span::from_millis(args.number("ms").expect("ms=60000")),
        "fire" => world.step(PostgresBot::timer_fired()),
        "asked" => {
            let ask = match (args.text("lead"), args.text("stand")) {
                (Some(leader), _) => {
                    let generation = Revision(args.number("r").unwrap_or(0));
                    Ask::Lead { leader: leader.to_owned(), generation }
                }
                (None, candidate) => Ask::Stand { candidate: candidate.expect("lead= or stand=").to_owned() },
            };
            world.step(Event::MemberAsked { id: AskedId(1), ask });
        }
        "word" => {
            let Some(id) = world.asking else { return String::from("(nobody was asked)\n") };
            let answer = if args.has("no") { Err(args.input().to_owned()) } else { Ok(()) };
            let member = args.text("of").expect("of=pg2").to_owned();
            world.step(Event::MemberAnswered { id, member, answer });
        }
        "restart-postgres" => return command(world, Command::Restart(restart_wish(args))),
        "drop-restart" => return command(world, Command::DropRestart),
        "reinitialize" => {
            let (force, from_leader) = (args.has("force"), args.has("from_leader"));
            return command(world, Command::Reinitialize { force, from_leader });
        }
        "reload" => return command(world, Command::Reload(configured(args).live())),
        "answers" => return answers(world),
        "copied" => {
            let kb = |name: &str| args.number(name).expect("done=1 total=2") * 1_024;
            world.step(Event::CopyProgressed { bytes_done: kb("done"), bytes_total: kb("total") });
        }
        "shutdown" => world.step(Event::ShutdownRequested),
        "leader" if args.has("gone") => world.delete("leader"),
        "leader" if args.has("leased") => world.put_leased("leader", args.text("name").expect("name=pg2")),
        "promise" if args.has("gone") => world.delete(&format!("promises/{}", args.text("name").expect("name=pg3"))),
        "promise" => world.put_promise(args.text("name").expect("name=pg3")),
        "leader" => world.put("leader", args.text("name").expect("name=pg2")),
        "member" if args.has("gone") => world.delete(&format!("members/{}", args.text("name").expect("name=pg2"))),
        "member" => put_member(world, args),
        "edge" if args.has("gone") => world.delete(&edge(args)),
        "edge" => {
            let stand = edge_stand(world, args);
            world.put(&edge(args), &stand);
        }
        "put" => world.put(args.text("key").expect("key=config"), args.input()),
        "delete" => world.delete(args.text("key").expect("key=config")),
        "keys" => return keys(world),
        "deadline" => return deadline(world),
        "checks" => return checks(world),
        other => panic!("no directive {other}"),
    }
    String::new()
}

/// `slots=(NAME[.POSITION][.active][.lost][.logical][.cPOSITION][.xNUMBER],...)`: kept from, confirmed, and the catalog's transaction.
fn slots(args: &Args<'_>) -> BTreeMap<String, ReplicationSlot> {
    let logical = || SlotKind::Logical { database: String::from("app"), plugin: String::from("pgoutput") };
    let slot = |text: &String| {
        let words: Vec<&str> = text.split('.').collect();
        let (name, says) = (words[0].to_owned(), |word: &str| words.contains(&word));
        let kind = if says("logical") { logical() } else { SlotKind::Physical };
        let restart = words.get(1).and_then(|word| u64::from_str_radix(word, 16).ok()).map(Lsn);
        let (active, lost) = (says("active"), says("lost"));
        let said = |sign: char| words.iter().skip(2).find_map(|word| word.strip_prefix(sign));
        let confirmed = said('c').and_then(|word| u64::from_str_radix(word, 16).ok()).map(Lsn);
        let catalog_xmin = said('x').and_then(|word| word.parse().ok()).map(Xid);
        (name, ReplicationSlot { kind, active, restart, confirmed, lost, catalog_xmin })
    };
    args.0.args.get("slots").into_iter().flatten().filter(|text| !text.is_empty()).map(slot).collect()
}

/// Where an edge stands.
fn edge(args: &Args<'_>) -> String {
    format!("edges/edge/{}", args.text("name").expect("name=edge-1"))
}

/// What it says: of the present term, or whatever the transcript has it say.
fn edge_stand(world: &World, args: &Args<'_>) -> String {
    let term = world.dcs.get(&scope().leader()).map(generation);
    let stand = EdgeStand { holds: term.filter(|_| args.has("holds")), drained: term.filter(|_| args.has("drained")) };
    if args.input().is_empty() { stand.to_json() } else { args.input().to_owned() }
}

/// A restart, at once or at a second of the first day of 2026.
fn restart_wish(args: &Args<'_>) -> Restart {
    // 2026-01-01T00:00:00Z
    let at_unix_ms = args.number("at_s").map(|secs| 1_767_225_600_000 + secs * 1_000);
    let wish = ScheduledRestart {
        schedule: at_unix_ms.map(rfc3339_from_unix_ms).unwrap_or_default(),
        role: args.text("role").map(str::to_owned),
        restart_pending: args.has("pending"),
        timeout: args.number("timeout"),
        ..ScheduledRestart::default()
    };
    Restart { wish, at_unix_ms, below_version: args.number("below").and_then(|n| u32::try_from(n).ok()) }
}

/// Gives a command; says what is answered at once.
fn command(world: &mut World, command: Command) -> String {
    let id = world.next_command();
    world.step(Event::Commanded { id, command });
    world.state.answer(id).map_or_else(|| String::from("(no answer yet)\n"), |answer| format!("answer: {answer:?}\n"))
}

/// All answers so far.
fn answers(world: &World) -> String {
    let known = (1..20).filter_map(|n| Some((n, world.state.answer(CommandId(n))?)));
    known.map(|(n, answer)| format!("{n}: {answer:?}\n")).collect()
}

/// How a device is: what is wrong with it is the input.
fn well<T>(args: &Args<'_>, good: T) -> Result<T, String> {
    if args.input().is_empty() { Ok(good) } else { Err(args.input().to_owned()) }
}

fn configured(args: &Args<'_>) -> Settings {
    let mut settings = settings(args.text("name").unwrap_or("pg1"));
    if let Some(mode) = args.text("watchdog") {
        settings.watchdog.mode = serde_json::from_value(json!(mode)).expect("off, automatic or required");
        settings.watchdog.safety_margin =
            args.text("margin").map(|margin| margin.parse().expect("a number of seconds"));
    }
    for tag in ["nofailover", "clonefrom", "noloadbalance"] {
        if args.has(tag) {
            settings.tags.0.insert(tag.to_owned(), json!(true));
        }
    }
    if let Some(priority) = args.number("priority") {
        settings.tags.0.insert(String::from("failover_priority"), json!(priority));
    }
    settings.use_pg_rewind = args.has("no_rewind").then_some(false);
    settings.remove_data = RemoveData {
        on_rewind_failure: args.has("remove_on_failure").then_some(true),
        on_diverged_timelines: args.has("remove_on_diverged").then_some(true),
    };
    if !args.input().is_empty() {
        settings.bootstrap_config = serde_json::from_str(args.input()).expect("a configuration");
    }
    settings
}

/// A bot in the middle of its life, without the way there.
fn given(world: &mut World, args: &Args<'_>) -> String {
    *world = World::new(configured(args));
    world.put("config", &world.state.settings().bootstrap_config.to_string());
    world.put("initialize", SYSTEM_ID);
    let (timeline, position) = args.server();
    let present = |was_primary: bool, running| DataDir::Present {
        system_id: SYSTEM_ID.to_owned(),
        timeline: Timeline(timeline),
        was_primary,
        rewound: false,
        running,
    };
    let leads = args.has("primary");
    if leads {
        world.put("leader", "pg1");
    } else {
        let facts = PostgresFacts {
            timeline: Some(Timeline(timeline)),
            xlog_location: Some(Lsn(position)),
            ..PostgresFacts::default()
        };
        world.put("members/pg2", &member("pg2", "primary", "running", facts).to_json());
        world.put("leader", "pg2");
    }
    world.put("status", &json!({"optime": position}).to_string());
    world.list();
    world.grant();
    world.step(Event::DataInspected(present(leads, Running::No)));
    world.watch();
    while !world.asked.is_empty() || world.job.is_some() {
        world.answer(Fate::Answered);
        world.watch();
        world.job_done(timeline, position, true);
        world.watch();
    }
    world.grants_at_once = !args.has("grant_by_hand");
    world.pass(Span::from_secs(20));
    world.grant();
    while world.answer(Fate::Answered).is_some() {
        world.watch();
    }
    world.log.clear();
    String::new()
}

fn answer(world: &mut World, args: &Args<'_>) -> String {
    let fate = match () {
        () if args.has("lost") => Fate::AnswerLost,
        () if args.has("unknown") => Fate::QuestionLost,
        () => Fate::Answered,
    };
    match world.answer(fate) {
        None => String::from("(no open question)\n"),
        Some(Outcome::Done(_)) => String::from("answered: done\n"),
        Some(Outcome::Refused { found, .. }) => {
            let short = |key: &str| scope().strip(key).unwrap_or(key).to_owned();
            let found: Vec<String> = found.iter().map(|kv| format!("{} is `{}`", short(&kv.key), kv.value)).collect();
            format!(
                "answered: refused; {}\n",
                if found.is_empty() { String::from("no such keys") } else { found.join(", ") }
            )
        }
        Some(Outcome::Unknown(_)) => String::from("answered: unknown\n"),
    }
}

fn data_dir(args: &Args<'_>, running: Running) -> DataDir {
    let system_id = args.text("id").unwrap_or(SYSTEM_ID).to_owned();
    match () {
        () if args.has("empty") => DataDir::Empty,
        () if args.has("unfinished") => DataDir::Unfinished {
            system_id: args.has("id").then_some(system_id),
            cloning: args.has("cloning"),
            running,
        },
        () => DataDir::Present {
            system_id,
            timeline: Timeline(args.server().0),
            was_primary: args.has("primary"),
            rewound: args.has("rewound"),
            running,
        },
    }
}

/// `probed pg2=(TIMELINE,POSITION[,primary][,nolead][,unsure])`
fn probed(world: &mut World, args: &Args<'_>) {
    let Some(id) = world.probe.take() else { return world.log.push(String::from("(nobody was asked)")) };
    let answer = |said: &Vec<String>| PeerAnswer {
        timeline: Timeline(said[0].parse().expect("a timeline")),
        position: Lsn(hex(&said[1])),
        is_primary: said.iter().any(|word| word == "primary"),
        may_lead: !said.iter().any(|word| word == "nolead"),
        priority: said.iter().find_map(|word| word.strip_prefix("first")?.parse().ok()).unwrap_or(1),
        sure: !said.iter().any(|word| word == "unsure"),
    };
    let peers = args.0.args.iter().filter(|(_, said)| said.len() >= 2);
    let answers: BTreeMap<String, PeerAnswer> = peers.map(|(name, said)| (name.clone(), answer(said))).collect();
    world.step(Event::PeersProbed { id, answers });
}

fn put_member(world: &mut World, args: &Args<'_>) {
    let (timeline, position) = args.server();
    let role = args.text("role").unwrap_or("replica");
    let mut tags = serde_json::Map::new();
    for tag in ["nofailover", "clonefrom"] {
        if args.has(tag) {
            tags.insert(tag.to_owned(), json!(true));
        }
    }
    let facts = PostgresFacts {
        timeline: Some(Timeline(timeline)),
        xlog_location: Some(Lsn(position)),
        replication_state: args.has("streaming").then(|| String::from("streaming")),
        checkpoint_after_promote: args.has("checkpoint_due").then_some(false),
        tags,
        ..PostgresFacts::default()
    };
    let name = args.text("name").expect("name=pg2");
    if args.has("raw") {
        return world.put(&format!("members/{name}"), args.input());
    }
    let value = member(name, role, args.text("state").unwrap_or("running"), facts).to_json();
    let value = if args.has("other") { value.replace("-a\"", "-x\"") } else { value };
    let value = args
        .text("host")
        .map_or_else(|| value.clone(), |host| value.replace(&format!("//{name}:"), &format!("//{host}:")));
    world.put(&format!("members/{name}"), &value);
}

fn keys(world: &World) -> String {
    let (_, entries) = world.dcs.list(&scope().prefix());
    let shown = entries.iter().filter(|kv| !kv.key.contains("/members/"));
    let line = |key: &str, value: &str, leased: bool| {
        format!(
            "{} = `{value}`{}\n",
            scope().strip(key).unwrap_or(key),
            if leased { " while a lease lasts" } else { "" }
        )
    };
    shown.map(|kv| line(&kv.key, &kv.value, kv.lease.is_some())).collect()
}

/// The report, without how long the bot has been in its role.
fn report(world: &World) -> String {
    let report = PostgresBot::report(&world.state, world.now);
    let mut out = format!("= {}: {}; waits for {}\n", report.role, report.doing, report.waiting_for);
    for why_not in report.why_not {
        let _infallible = writeln!(out, "  does not {}: {}", why_not.alternative, why_not.because);
    }
    for trouble in report.troubles {
        let _infallible = writeln!(out, "  trouble: {trouble}");
    }
    out
}

/// What the health checks go by.
fn checks(world: &World) -> String {
    let (state, now) = (&world.state, world.now);
    let (writes, leads) = (state.accepts_writes(now), state.leads(now));
    let (primary, replica) = (state.serves_as_primary(now), state.serves_as_replica());
    format!("takes writes: {writes}; serves reads as primary: {primary}, as replica: {replica}; leads: {leads}\n")
}

/// The next deadline.
fn deadline(world: &World) -> String {
    match PostgresBot::report(&world.state, world.now).next_deadline {
        Some((ms, reason)) => format!("in {}: {reason}\n", Span::from_millis(ms)),
        None => String::from("no deadline\n"),
    }
}

/// The diagram in the documentation is the one that the machine asserts.
#[test]
fn documentation_shows_the_declared_transitions() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/machines/postgres.md");
    let page = page();
    if std::env::var_os("REWRITE").is_some() {
        std::fs::write(path, &page).expect("write the page");
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(found, page, "run REWRITE=1 cargo nextest run -p postgres-bot");
}

fn page() -> String {
    let table = PostgresBot::TRANSITIONS;
    let mut page = String::from(
        "# The postgres bot's states\n\n\
         Written by `REWRITE=1 cargo nextest run -p postgres-bot` from `PostgresBot::TRANSITIONS`; do not edit.\n\n\
         | role | what it is |\n|---|---|\n",
    );
    let roles: BTreeSet<Role> = table.edges.iter().flat_map(|edge| [edge.from, edge.to]).collect();
    for role in roles {
        let _infallible = writeln!(page, "| {role} | {} |", role.meaning());
    }
    let _infallible = write!(page, "\n```mermaid\n{}```\n", table.mermaid());
    page.push_str("\n| from | to | when |\n|---|---|---|\n");
    for edge in table.edges {
        let _infallible = writeln!(page, "| {} | {} | {} |", edge.from, edge.to, edge.when);
    }
    page
}
