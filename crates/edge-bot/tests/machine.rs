//! Transcripts of the edge machine: what is done to it, and what it does. `REWRITE=1` writes them afresh.

mod world;

use std::{collections::BTreeSet, fmt::Write as _};

use bots_core::machine::{Machine, Span};
use datadriven::TestCase;
use edge_bot::machine::{EdgeMachine, Role};
use world::{World, scope};

#[test]
fn transcripts_take_every_declared_edge() {
    let mut taken: BTreeSet<(Role, Role)> = BTreeSet::new();
    datadriven::walk("tests/machine", |file| {
        let mut world = World::new();
        file.run(|case| {
            world.log.clear();
            let shown = perform(&mut world, case);
            let mut out: String = world.log.drain(..).map(|line| line + "\n").collect();
            out.push_str(&shown);
            if out.is_empty() { String::from("(nothing)\n") } else { out }
        });
        taken.extend(world.edges);
    });
    let declared: BTreeSet<(Role, Role)> = EdgeMachine::TRANSITIONS.edges.iter().map(|e| (e.from, e.to)).collect();
    let missing: Vec<_> = declared.difference(&taken).collect();
    assert!(missing.is_empty(), "declared edges that no transcript takes: {missing:?}");
}

/// One directive; says what is to be shown beside what the bot did.
fn perform(world: &mut World, case: &TestCase) -> String {
    let arg = |name: &str| case.args.get(name).and_then(|v| v.first()).cloned();
    let has = |name: &str| case.args.contains_key(name);
    let text = case.input.trim().to_owned();
    let name = || arg("name").expect("name=");
    match case.directive.as_str() {
        "start" => world.start(!has("adopt-only"), has("stop-proxy")),
        "kill" => world.state = None,
        "run-proxy" => world.run_proxy(),
        "end-proxy" => world.end_proxy(),
        "silence-proxy" => world.proxy.as_mut().expect("a proxy").silent = true,
        "wake-proxy" => world.proxy.as_mut().expect("a proxy").silent = false,
        "start-fails" => world.start_fails = Some(text).filter(|t| !t.is_empty()),
        "host" => {
            let (host, address) = text.split_once(' ').expect("NAME ADDRESS");
            world.hosts.insert(host.to_owned(), address.to_owned());
        }
        "pg" => {
            let role = arg("role").unwrap_or_else(|| String::from("replica"));
            let state = arg("state").unwrap_or_else(|| String::from("running"));
            world.postgres(&name(), &role, &state, arg("host").as_deref());
        }
        "hands-over" => world.hands_over(&name()),
        "pg-gone" => world.delete(&scope("main").member(&name())),
        "leader" => world.put(&scope("main").leader(), &name()),
        "swap" => world.swap(&arg("from").expect("from="), &arg("to").expect("to=")),
        "no-leader" => world.delete(&scope("main").leader()),
        "web" => {
            let state = arg("state").unwrap_or_else(|| String::from("serving"));
            let load = arg("load").map_or(0, |l| l.parse().expect("a number"));
            world.web(&name(), &state, load);
        }
        "web-gone" => world.delete(&scope("web").member(&name())),
        "check" => world.check(&text, has("up")),
        "sessions" => {
            world.server(&text).sessions = arg("count").and_then(|n| n.parse().ok()).expect("count=");
        }
        "cut" => world.cut(),
        "heal" => world.cut = false,
        "namesake" => world.namesake = Some(String::from("somebody-else")),
        "stop" => world.shutdown(),
        "pass" => {
            world.settle();
            world.pass(Span::from_millis(arg("ms").and_then(|ms| ms.parse().ok()).expect("ms=")));
        }
        "why" => return why(world),
        "servers" => return world.servers(),
        other => panic!("no directive {other}"),
    }
    world.settle();
    serde_json::to_string(&world.state).expect("what a step leaves can be written into the step log");
    String::new()
}

fn why(world: &World) -> String {
    let report = EdgeMachine::report(world.state(), world.now);
    let mut out = format!("{}: {}\nwaits for {}\n", report.role, report.doing, report.waiting_for);
    for why_not in report.why_not {
        let _infallible = writeln!(out, "does not {}: {}", why_not.alternative, why_not.because);
    }
    for trouble in report.troubles {
        let _infallible = writeln!(out, "trouble: {trouble}");
    }
    out
}

/// The diagram in the documentation is the one that the machine asserts.
#[test]
fn documentation_shows_the_declared_transitions() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/machines/edge.md");
    let page = page();
    if std::env::var_os("REWRITE").is_some() {
        std::fs::write(path, &page).expect("write the page");
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(found, page, "run REWRITE=1 cargo nextest run -p edge-bot");
}

fn page() -> String {
    let mut page = String::from(
        "# The edge bot's states\n\n\
         Written by `REWRITE=1 cargo nextest run -p edge-bot` from `EdgeMachine::TRANSITIONS`; do not edit.\n\n\
         ```mermaid\n",
    );
    page.push_str(&EdgeMachine::TRANSITIONS.mermaid());
    page.push_str("```\n\n| from | to | when |\n|---|---|---|\n");
    for edge in EdgeMachine::TRANSITIONS.edges {
        let _infallible = writeln!(page, "| {} | {} | {} |", edge.from, edge.to, edge.when);
    }
    page
}
