//! Transcripts of the content machine: what is done to it, and what it does. `REWRITE=1` writes them afresh.

mod world;

use std::fmt::Write as _;

use bots_core::{
    machine::{Machine, Span},
    wire::{Refused, WebFacts, WebLoad},
};
use content_bot::machine::{
    Announcement, CanarySettings, Commit, ContentMachine, Event, ExportSettings, FetchResult, PollResult, PurgeSettings,
};
use datadriven::TestCase;
use world::{Fate, World, brief, sha, site, web};

#[test]
fn transcripts() {
    datadriven::walk("tests/machine", |file| {
        let mut world = World::new();
        file.run(|case| {
            world.log.clear();
            let shown = perform(&mut world, case);
            let mut out: String = world.log.drain(..).map(|line| brief(&line) + "\n").collect();
            out.push_str(&brief(&shown));
            if out.is_empty() { String::from("(nothing)\n") } else { out }
        });
    });
}

/// One directive; says what is to be shown beside what the bots did.
fn perform(world: &mut World, case: &TestCase) -> String {
    let arg = |name: &str| case.args.get(name).and_then(|v| v.first()).cloned();
    let bot = arg("bot").unwrap_or_else(|| String::from("one"));
    let has = |name: &str| case.args.contains_key(name);
    let text = || case.input.trim().to_owned();
    match case.directive.as_str() {
        "start" => {
            let holds = case.args.get("holds").cloned().unwrap_or_default();
            let commit = |c: &String| Commit { sha: sha(c), subject: format!("subject of {c}") };
            world.start(&bot, &arg("ref").unwrap_or_else(|| String::from("main")), holds.iter().map(commit).collect());
        }
        "polled" => {
            let result = match arg("found") {
                Some(letter) => PollResult::Found { sha: sha(&letter) },
                None if has("missing") => PollResult::Missing,
                None => PollResult::Failed { why: text() },
            };
            world.end_poll(&bot, result);
        }
        "fetched" => {
            let result = match () {
                () if has("complete") => FetchResult::Complete,
                () if has("vanished") => FetchResult::Vanished,
                () if has("unfit") => FetchResult::Unfit { reason: text() },
                () if has("doubtful") => FetchResult::Doubtful { reason: text() },
                () => FetchResult::Failed { why: text() },
            };
            world.end_fetch(&bot, result);
        }
        "damaged" => {
            let sha = sha(&arg("commit").expect("commit=a"));
            world.bot(&bot).disk.retain(|c| c.sha != sha);
            world.step(&bot, Event::CommitDamaged { sha });
        }
        "push" => {
            let tip = arg("tip").map(|letter| sha(&letter));
            world.step(&bot, Event::PushReceived(Announcement { delivery: arg("delivery"), tip }));
        }
        "stop" => world.step(&bot, Event::ShutdownRequested),
        "crash" => {
            world.bots.remove(&bot);
        }
        "cut" => world.cut(&bot),
        "heal" => world.heal(&bot),
        "fate" => {
            world.fate = match text().as_str() {
                "answered" => Fate::Answered,
                "answer lost" => Fate::AnswerLost,
                other => panic!("no fate {other}"),
            };
        }
        "namesake" => world.namesake = Some(String::from("somebody-else")),
        "web" => {
            let slot = arg("slot").map(|s| s.parse().expect("a number"));
            let (prepared, serving) = (arg("prepared").map(|c| sha(&c)), arg("serving").map(|c| sha(&c)));
            let refused = arg("refused").map(|c| Refused { sha: sha(&c), why: text() });
            let trouble = arg("trouble").map(|_| text());
            let number = |name: &str| arg(name).map(|n| n.parse().expect("a number"));
            let load = number("requests").map(|requests| WebLoad {
                requests,
                errors: number("errors").unwrap_or(0),
                ..WebLoad::default()
            });
            let facts = WebFacts { slot, prepared, serving, refused, trouble, load, ..WebFacts::default() };
            world.web_says(&bot, &facts);
        }
        "web-gone" => world.delete(&web().member(&bot)),
        "put" => {
            let text = text();
            let (key, value) = text.split_once(' ').expect("KEY VALUE");
            world.put(&site().key(key), value);
        }
        "delete" => world.delete(&site().key(&text())),
        "advance" => world.advance(Span::from_millis(arg("ms").and_then(|ms| ms.parse().ok()).expect("ms=1000"))),
        "why" => return why(world, &bot),
        "ready" => {
            let (now, state) = (world.now, &world.bot(&bot).state);
            return String::from(if state.is_stale(now) { "stale\n" } else { "fresh\n" });
        }
        "member" => {
            return world.dcs.get(&site().member(&bot)).map_or(String::from("(none)\n"), |kv| kv.value.clone() + "\n");
        }
        "canary" => {
            let (observe, timeout) = (Span::from_secs(2), Span::from_secs(20));
            world.canary = Some(CanarySettings { observe, timeout, failures_percent_max: 10 });
        }
        "purge" => world.purge = Some(PurgeSettings { again_after: Span::from_secs(5) }),
        "read" => {
            let number = |name: &str| arg(name).map_or(0, |n| n.parse().expect("a number"));
            let why = Some(text()).filter(|why| !why.is_empty());
            world.end_reading(&bot, number("asked"), number("failed"), why.as_deref());
        }
        "purged" => {
            let why = Some(text()).filter(|why| !why.is_empty());
            world.end_purge(&bot, why.map_or(Ok(()), Err));
        }
        "export" => {
            let one_time = arg("once").map(|s| Span::from_secs(s.parse().expect("once=60")));
            world.export = Some(ExportSettings { grace: Span::from_secs(60), tells: has("tells"), one_time });
        }
        "exported" => {
            let why = Some(text()).filter(|why| !why.is_empty());
            world.end_export(&bot, why.map_or(Ok(()), Err));
        }
        "told" => {
            let why = Some(text()).filter(|why| !why.is_empty());
            world.end_telling(&bot, why.map_or(Ok(()), Err));
        }
        "keys" => return keys(world),
        "missed" => {
            let state = &world.bot(&bot).state;
            return format!("{} missed, {} replayed\n", state.pushes_missed(), state.pushes_replayed());
        }
        other => panic!("no directive {other}"),
    }
    world.settle();
    String::new()
}

/// etcd shows a key late. Whatever a leader does meanwhile carries what it has seen of it, and is refused.
#[test]
fn what_a_leader_has_not_seen_yet_stops_what_it_does() {
    let pin = (site().revision_pin(), format!(r#"{{"sha":"{}"}}"#, sha("c")));
    let trial = (site().revision_canary(), format!(r#"{{"sha":"{}","member":"web/w2"}}"#, sha("a")));
    let check = |canary: bool, is_posted: bool, (key, value): &(String, String), does: &str| {
        let mut world = World::new();
        let (observe, timeout) = (Span::from_secs(2), Span::from_secs(20));
        world.canary = canary.then_some(CanarySettings { observe, timeout, failures_percent_max: 10 });
        for (name, prepared) in [("w1", Some(sha("a"))), ("w2", None)] {
            world.web_says(name, &WebFacts { slot: Some(0), prepared, ..WebFacts::default() });
        }
        world.start("one", "main", Vec::new());
        world.settle();
        world.end_poll("one", PollResult::Found { sha: sha("a") });
        world.settle();
        if is_posted {
            world.end_fetch("one", FetchResult::Complete);
            // Almost as long as the web bots may take.
            world.advance(Span::from_millis(9_900));
            world.now += Span::from_millis(200);
        }
        world.log.clear();
        world.put(key, value);
        match is_posted {
            true => world.step("one", Event::TimerFired),
            false => world.end_fetch("one", FetchResult::Complete),
        }
        let done: Vec<&String> = world.log.iter().filter(|line| line.contains(" > revision/")).collect();
        let refused = done.len() == 1 && done[0].contains(does) && done[0].ends_with("(refused)");
        assert!(refused, "{does} must be refused: {:?}", world.log);
        world.settle();
        assert_eq!(world.live(), None, "{does}");
        assert_eq!(world.dcs.get(key).map(|kv| kv.value.as_str()), Some(value.as_str()), "{does}");
    };
    check(false, false, &pin, "revision/candidate = ");
    check(false, true, &pin, "revision/live = ");
    check(true, true, &pin, "revision/canary = ");
    check(true, true, &trial, "revision/canary = ");
    check(true, false, &trial, "revision/candidate = ");
}

fn why(world: &mut World, bot: &str) -> String {
    let report = world.report(bot);
    let mut out = format!("{}: {}\nwaits for {}\n", report.role, report.doing, report.waiting_for);
    if let Some((ms, reason)) = report.next_deadline {
        let _infallible = writeln!(out, "next in {}: {reason}", Span::from_millis(ms));
    }
    for why_not in report.why_not {
        let _infallible = writeln!(out, "does not {}: {}", why_not.alternative, why_not.because);
    }
    for trouble in report.troubles {
        let _infallible = writeln!(out, "trouble: {trouble}");
    }
    out
}

fn keys(world: &World) -> String {
    let (_, entries) = world.dcs.list(&site().prefix());
    let shown = entries.iter().filter(|kv| !kv.key.contains("/members/"));
    shown.map(|kv| format!("{} = {}\n", site().strip(&kv.key).unwrap_or(&kv.key), kv.value)).collect()
}

/// The diagram in the documentation is the one that the machine asserts.
#[test]
fn documentation_shows_the_declared_transitions() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/machines/content.md");
    let page = page();
    if std::env::var_os("REWRITE").is_some() {
        std::fs::create_dir_all(std::path::Path::new(path).parent().expect("a folder")).expect("docs/machines");
        std::fs::write(path, &page).expect("write the page");
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(found, page, "run REWRITE=1 cargo nextest run -p content-bot");
}

fn page() -> String {
    let mut page = String::from(
        "# The content bot's states\n\n\
         Written by `REWRITE=1 cargo nextest run -p content-bot` from `ContentMachine::TRANSITIONS`; do not edit.\n\n\
         ```mermaid\n",
    );
    page.push_str(&ContentMachine::TRANSITIONS.mermaid());
    page.push_str("```\n\n| from | to | when |\n|---|---|---|\n");
    for edge in ContentMachine::TRANSITIONS.edges {
        let _infallible = writeln!(page, "| {} | {} | {} |", edge.from, edge.to, edge.when);
    }
    page
}
