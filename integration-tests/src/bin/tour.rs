//! `make tour`: the demo's fleet is put through what can happen to it; every outcome is checked from outside and timed.

use std::{
    fs,
    os::unix::fs::symlink,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bots_core::wire::PushHint;
use clap::Parser;
use fleet::{
    Fleet,
    bots::ContentBot,
    cache::was_kept,
    clients::{Clients, Connects},
    demo::{SERVING_MIN, cache, serving_pages, shown_everywhere, sign, start},
    fleet::{MAIN, SITE, WEB},
    http::{Http, Load},
    program::{asked_to_stop, print},
    sql::{Login, Writer},
    wait::{millis, timed, until},
};
use serde::Serialize;

/// No step takes this long unless something is wrong.
const STEP_DEADLINE: Duration = Duration::from_secs(60);

/// Visitors while content is flipped: enough to catch a dropped request, too few to be load.
const GENTLE_CLIENTS: usize = 3;
const GENTLE_PAUSE: Duration = Duration::from_millis(30);

/// Visitors that are load: far above what the serving bots are to carry.
const HEAVY_CLIENTS: usize = 32;
const HEAVY_PAUSE: Duration = Duration::from_millis(1);

/// Clients of the edge that retry nothing: enough for a transaction to be under way at any moment.
const EDGE_CLIENTS: usize = 4;

/// What a content bot counts of announcements.
const PUSHES: &str = "content_pushes_total";
const PUSHES_REFUSED: &str = "content_pushes_refused_total";

/// Drives a fleet through crashes, losses, switchovers, pushes and load, and checks every outcome.
#[derive(Debug, Parser)]
struct Args {
    /// Where the report goes
    #[arg(long, default_value = "target/tour/report.json")]
    report: PathBuf,
    /// Leave the scratch folder behind
    #[arg(long)]
    keep: bool,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Step {
    name: &'static str,
    ok: bool,
    milliseconds: u64,
    /// What the time is of.
    measured: &'static str,
    /// What was seen.
    note: String,
}

/// What one step measured and saw.
struct Seen {
    milliseconds: u64,
    note: String,
}

/// The fleet and what a visitor has left there.
struct Tour {
    fleet: Fleet,
    http: Http,
    /// Writes all the time, until it is counted.
    writer: Option<Writer>,
    entries: Vec<String>,
    /// The bot that was killed with its server.
    lost: String,
    load: Option<Load>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let toured = tokio::select! {
        toured = Box::pin(run(&args)) => toured,
        asked = asked_to_stop() => asked.map(|()| false),
    };
    match toured {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("tour: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<bool> {
    let mut steps = Vec::new();
    let toured = Box::pin(tour(args, &mut steps)).await;
    print(&table(&steps))?;
    if let Some(folder) = args.report.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(&steps).context("write the report as JSON")?;
    fs::write(&args.report, json + "\n").with_context(|| format!("write {}", args.report.display()))?;
    toured?;
    print(&format!("every step held; the report is in {}\n", args.report.display()))?;
    Ok(steps.iter().all(|step| step.ok))
}

/// The whole tour; ends at the first step that does not hold.
async fn tour(args: &Args, steps: &mut Vec<Step>) -> Result<()> {
    let say = |line: &str| drop(print(&format!("  {line}\n")));
    let began = Instant::now();
    let fleet = start(say).await;
    let seen = fleet
        .as_ref()
        .map(|_| Seen { milliseconds: millis(began.elapsed()), note: String::from("12 bots and servers") });
    record(steps, "start the fleet", "from nothing to healthy", seen.map_err(|e| anyhow::anyhow!("{e:#}")))?;
    let mut fleet = fleet?;
    if args.keep {
        fleet.scratch.keep();
    }
    let writer = Some(Writer::start(&fleet.guestbook()).await?);
    let (http, entries, lost, load) = (Http::new(), Vec::new(), String::new(), None);
    let mut tour = Tour { fleet, http, writer, entries, lost, load };
    tour.step(steps, "write an entry", "until every serving bot shows it", async |t| t.write_entry().await).await?;
    tour.step(steps, "push new content", "from push until every serving bot serves it", async |t| {
        t.push_content().await
    })
    .await?;
    tour.step(steps, "push a bad commit", "from push until it is quarantined", async |t| t.push_bad_commit().await)
        .await?;
    tour.step(steps, "crash the primary's server", "longest time without a write", async |t| t.crash_server().await)
        .await?;
    tour.step(steps, "lose the primary's node", "longest time without a write", async |t| t.lose_node().await).await?;
    tour.step(steps, "switch over", "longest time without a write", async |t| t.switch_over().await).await?;
    tour.step(steps, "switch over through the edge", "longest that a transaction took", async |t| {
        t.switch_over_through_the_edge().await
    })
    .await?;
    tour.step(steps, "bring the node back", "until it streams and has caught up", async |t| t.bring_back().await)
        .await?;
    tour.step(steps, "load the site", "until an idle bot has woken and serves", async |t| t.load_site().await).await?;
    tour.step(steps, "push under load", "from push until every bot serves it", async |t| t.push_under_load().await)
        .await?;
    tour.step(steps, "end the load", "until the woken bots are idle again", async |t| t.end_load().await).await?;
    tour.step(steps, "count what is left", "to read it all", async |t| t.count().await).await?;
    let seen = tour.fleet.stop_and_tell().await.map(|stopped| {
        let (last, waited) = stopped.longest;
        let note = format!("no process is left; longest waited for: {last}, {} ms", millis(waited));
        Seen { milliseconds: millis(stopped.took), note }
    });
    record(steps, "stop the fleet", "until the last process has gone", seen)
}

impl Tour {
    async fn step(
        &mut self,
        steps: &mut Vec<Step>,
        name: &'static str,
        measured: &'static str,
        act: impl AsyncFnOnce(&mut Self) -> Result<Seen>,
    ) -> Result<()> {
        let seen = Box::pin(act(self)).await;
        record(steps, name, measured, seen)
    }

    async fn write_entry(&mut self) -> Result<Seen> {
        let (count, milliseconds) = timed(self.visit("the first entry")).await?;
        Ok(Seen { milliseconds, note: format!("shown by {count} bots") })
    }

    /// Also what a cache has kept is new: the content bot has purged it. The push is announced by a signed webhook, whose delivery
    /// is written down, so that nobody can play it back.
    async fn push_content(&mut self) -> Result<Seen> {
        self.unsigned_is_refused().await?;
        let told = self.content()?.bot.metric(PUSHES).await?;
        let page = format!("{}/", cache(&self.fleet)?.url);
        self.http.page(&page).await?;
        ensure!(was_kept(&self.http.page(&page).await?), "the cache keeps the page");
        let visitors = Load::start(GENTLE_CLIENTS, GENTLE_PAUSE, serving_pages(&self.fleet).await?);
        let began = Instant::now();
        let sha = self.push("These words were pushed by the tour.").await?;
        let count = self.served_by(SERVING_MIN, &sha).await?;
        let milliseconds = millis(began.elapsed());
        let http = &self.http;
        until("the cache has the push", STEP_DEADLINE, || async {
            let answer = http.page(&page).await.map_err(|e| format!("{e:#}"))?;
            if answer.revision() == sha { Ok(()) } else { Err(format!("it has {}", answer.revision())) }
        })
        .await?;
        let in_the_cache = millis(began.elapsed());
        let accepted = self.content()?.bot.metric(PUSHES).await? - told;
        ensure!(accepted == 1, "{accepted} announcements were accepted, of one signed push");
        let store = &self.fleet.store;
        until("the delivery is written down", STEP_DEADLINE, || async {
            let now = store.look(SITE).await?;
            let hint: PushHint = now.value("push").and_then(|v| serde_json::from_str(v).ok()).unwrap_or_default();
            if hint.tip.as_ref() == Some(&sha) && !hint.deliveries.is_empty() {
                Ok(())
            } else {
                Err(format!("{hint:?}"))
            }
        })
        .await?;
        let tally = visitors.finish().await;
        ensure!(tally.failed == 0, "visitors met {} failures, the first: {:?}", tally.failed, tally.first_failure);
        let answered = tally.answered;
        let note =
            format!("{count} bots flipped; {answered} visits, none failed; purged from the cache: {in_the_cache} ms");
        Ok(Seen { milliseconds, note })
    }

    /// Who does not know the secret cannot make the content bot look.
    async fn unsigned_is_refused(&self) -> Result<()> {
        let bot = &self.content()?.bot;
        let (accepted, refused) = (bot.metric(PUSHES).await?, bot.metric(PUSHES_REFUSED).await?);
        let url = format!("{}/push", bot.api_url);
        let answer = self.http.send(hyper::Method::POST, &url, None, bytes::Bytes::new()).await?;
        ensure!(answer.status == 401, "an unsigned announcement is answered with {}: {}", answer.status, answer.text);
        ensure!(bot.metric(PUSHES_REFUSED).await? == refused + 1, "it does not count as refused");
        ensure!(bot.metric(PUSHES).await? == accepted, "it counts as accepted");
        Ok(())
    }

    /// A link out of the site: nobody serves it, everybody can learn why, and the push that mends it goes live.
    async fn push_bad_commit(&mut self) -> Result<Seen> {
        let origin = self.fleet.origin()?;
        let good = self.fleet.store.scope(SITE).await?.live().context("a revision is live")?.sha;
        let link = origin.work().join("passwords.txt");
        symlink("../../../etc/passwd", &link).context("make a link")?;
        let began = Instant::now();
        let bad = origin.push("A link that leaves the site").await?;
        let fleet = &self.fleet;
        let why = until("the commit is quarantined", STEP_DEADLINE, || async {
            let why = fleet.botctl(["content", "why", SITE, &bad]).await.map_err(|e| format!("{e:#}"))?;
            if why.stdout.contains("is quarantined") { Ok(why.stdout) } else { Err(why.stdout + &why.stderr) }
        })
        .await?;
        let milliseconds = millis(began.elapsed());
        ensure!(why.contains("leaves the site"), "botctl names no reason: {why}");
        self.served_by(SERVING_MIN, &good).await?;
        fs::remove_file(&link).context("remove the link")?;
        let mend = origin.push("Without the link").await?;
        self.served_by(SERVING_MIN, &mend).await?;
        Ok(Seen { milliseconds, note: String::from("every bot went on with the commit before; the mend went live") })
    }

    /// Every bot replaces the app by one of the new commit, while it answers all that it can.
    async fn push_under_load(&mut self) -> Result<Seen> {
        let (began, before) = (Instant::now(), self.load()?.tally());
        let sha = self.push("These words were pushed under load.").await?;
        let count = self.served_by(self.fleet.web.len(), &sha).await?;
        let milliseconds = millis(began.elapsed());
        let seconds = began.elapsed().as_secs_f64();
        let tally = self.load()?.tally();
        ensure!(tally.failed == 0, "{} requests failed, the first: {:?}", tally.failed, tally.first_failure);
        let answered = tally.answered.saturating_sub(before.answered);
        // Whole requests a second are shown.
        #[expect(clippy::cast_precision_loss, reason = "far fewer requests than a float can count")]
        let rate = answered as f64 / seconds;
        Ok(Seen { milliseconds, note: format!("{count} bots flipped at {rate:.0} requests a second, none failed") })
    }

    /// Adds a line to the site's page and pushes it; yields the commit.
    async fn push(&self, words: &str) -> Result<String> {
        let origin = self.fleet.origin()?;
        let page = fs::read_to_string(origin.work().join("index.html")).context("read the site's page")?;
        ensure!(page.contains("</body>"), "the site's page has a body");
        origin.write("index.html", &page.replace("</body>", &format!("<p>{words}</p>\n</body>")))?;
        origin.push(words).await
    }

    /// Waits until all that serve, `min` at least, serve this commit; yields how many that are.
    async fn served_by(&self, min: usize, sha: &str) -> Result<usize> {
        until("every serving bot serves the push", STEP_DEADLINE, || async {
            let pages = serving_pages(&self.fleet).await.map_err(|e| format!("{e:#}"))?;
            for page in &pages {
                let answer = self.http.page(page).await.map_err(|e| format!("{e:#}"))?;
                if answer.revision() != sha {
                    return Err(format!("{page} serves {}", answer.revision()));
                }
            }
            if pages.len() < min { Err(format!("{} serve", pages.len())) } else { Ok(pages.len()) }
        })
        .await
    }

    async fn crash_server(&mut self) -> Result<Seen> {
        let primary = self.fleet.postgres_up(STEP_DEADLINE).await?;
        let bot = self.fleet.postgres_bot(&primary)?;
        let crashed = Instant::now();
        let old = bot.crash_postmaster()?;
        until("a new server runs", STEP_DEADLINE, || async {
            match self.fleet.store.look(MAIN).await?.primary() {
                // In place, or at another member.
                Some(now) if now != primary || bot.postmaster().is_some_and(|pid| pid != old) => Ok(()),
                Some(_) | None => Err(String::from("the old one, or none")),
            }
        })
        .await?;
        self.writer()?.writes_after(Instant::now(), STEP_DEADLINE).await?;
        let milliseconds = self.writer()?.longest_gap_since(crashed);
        self.visit("after the crash").await?;
        let now = self.fleet.postgres_up(STEP_DEADLINE).await?;
        let how = if now == primary { "it came back in place" } else { "another took over" };
        Ok(Seen { milliseconds, note: format!("{primary}: {how}") })
    }

    async fn lose_node(&mut self) -> Result<Seen> {
        let primary = self.fleet.postgres_up(STEP_DEADLINE).await?;
        // Replication is asynchronous: what the visitors wrote so far is on every replica before the node goes.
        let replicas = self.replicas_of(&primary);
        for replica in &replicas {
            self.fleet.caught_up(replica, STEP_DEADLINE).await?;
        }
        let clients = Clients::start(&self.at_the_edge()?, EDGE_CLIENTS, Connects::EachTime).await?;
        let killed = Instant::now();
        self.fleet.postgres_bot_mut(&primary)?.kill_node();
        let new = self.fleet.new_primary(&primary, STEP_DEADLINE).await?;
        self.writer()?.writes_after(Instant::now(), STEP_DEADLINE).await?;
        let milliseconds = self.writer()?.longest_gap_since(killed);
        clients.commit_after(Instant::now(), STEP_DEADLINE).await?;
        let at_the_edge = clients.longest_gap_since(killed);
        clients.finish().await?;
        self.visit("after the loss").await?;
        self.lost.clone_from(&primary);
        let note = format!("{new} leads in place of {primary}; through the edge: {at_the_edge} ms");
        Ok(Seen { milliseconds, note })
    }

    async fn switch_over(&mut self) -> Result<Seen> {
        let old = self.fleet.postgres_up(STEP_DEADLINE).await?;
        let began = Instant::now();
        let done = self.fleet.botctl(["switchover", "main", "--force"]).await?;
        ensure!(done.code == Some(0), "botctl switchover ends with {:?}: {}", done.code, done.stderr);
        self.fleet.new_primary(&old, STEP_DEADLINE).await?;
        self.writer()?.writes_after(Instant::now(), STEP_DEADLINE).await?;
        let milliseconds = self.writer()?.longest_gap_since(began);
        self.visit("after the switchover").await?;
        self.fleet.postgres_up(STEP_DEADLINE).await?;
        Ok(Seen { milliseconds, note: done.stdout.trim().to_owned() })
    }

    /// Clients that know of the edge alone, connect anew for every transaction and retry nothing.
    async fn switch_over_through_the_edge(&mut self) -> Result<Seen> {
        let old = self.fleet.acknowledged(STEP_DEADLINE).await?;
        let clients = Clients::start(&self.at_the_edge()?, EDGE_CLIENTS, Connects::EachTime).await?;
        let done = self.fleet.botctl(["switchover", "main", "--force"]).await?;
        ensure!(done.code == Some(0), "botctl switchover ends with {:?}: {}", done.code, done.stderr);
        let new = self.fleet.new_primary(&old, STEP_DEADLINE).await?;
        clients.commit_after(Instant::now(), STEP_DEADLINE).await?;
        let tally = clients.finish().await?;
        self.visit("after the switchover through the edge").await?;
        self.fleet.postgres_up(STEP_DEADLINE).await?;
        ensure!(tally.failed == 0, "{} transactions failed, the first: {:?}", tally.failed, tally.first_failure);
        let note = format!("{new} leads in place of {old}; {} transactions, none failed", tally.committed);
        Ok(Seen { milliseconds: tally.longest_ms, note })
    }

    async fn bring_back(&mut self) -> Result<Seen> {
        let lost = self.lost.clone();
        let began = Instant::now();
        self.fleet.postgres_bot_mut(&lost)?.bot.start()?;
        self.fleet.caught_up(&lost, STEP_DEADLINE).await?;
        let milliseconds = millis(began.elapsed());
        let primary = self.fleet.postgres_up(STEP_DEADLINE).await?;
        ensure!(primary != lost, "{lost} leads, it should follow");
        Ok(Seen { milliseconds, note: format!("{lost} follows {primary}") })
    }

    async fn load_site(&mut self) -> Result<Seen> {
        let quiet = self.serving_names().await?;
        let began = Instant::now();
        let load = self.load.insert(Load::start(HEAVY_CLIENTS, HEAVY_PAUSE, serving_pages(&self.fleet).await?));
        let (fleet, http) = (&self.fleet, &self.http);
        let woken = until("an idle bot wakes", STEP_DEADLINE, || async {
            let now = fleet.store.look(WEB).await?;
            let woken =
                now.serving().into_iter().find(|bot| !quiet.contains(&bot.name)).ok_or_else(|| now.summary())?;
            http.page(&woken.page()).await.map(|_| woken).map_err(|e| format!("{e:#}"))
        })
        .await?;
        let milliseconds = millis(began.elapsed());
        load.aim(serving_pages(fleet).await?);
        let count = fleet.web.len();
        until("every bot serves", STEP_DEADLINE, || async {
            let now = fleet.store.look(WEB).await?;
            if now.serving().len() == count { Ok(()) } else { Err(now.summary()) }
        })
        .await?;
        load.aim(serving_pages(fleet).await?);
        Ok(Seen { milliseconds, note: format!("{} was first, then all {count} served", woken.name) })
    }

    async fn end_load(&mut self) -> Result<Seen> {
        let load = self.load.take().context("there is load")?;
        let began = Instant::now();
        let tally = load.finish().await;
        let store = &self.fleet.store;
        let count = self.fleet.web.len();
        until("the fleet is quiet again", STEP_DEADLINE, || async {
            let now = store.look(WEB).await?;
            let idle = now.members().values().filter(|m| m.head.state == "idle").count();
            if now.serving().len() == SERVING_MIN && idle == count - SERVING_MIN { Ok(()) } else { Err(now.summary()) }
        })
        .await?;
        let milliseconds = millis(began.elapsed());
        ensure!(
            tally.failed == 0,
            "{} of the load's requests failed, the first: {:?}",
            tally.failed,
            tally.first_failure
        );
        Ok(Seen { milliseconds, note: format!("{} answers under load, none failed", tally.answered) })
    }

    async fn count(&mut self) -> Result<Seen> {
        let began = Instant::now();
        let count = shown_everywhere(&self.fleet, &self.http, &self.entries, STEP_DEADLINE).await?;
        let milliseconds = millis(began.elapsed());
        let tally = self.writer.take().context("the writer is counted once")?.finish().await?;
        let lost = match tally.lost {
            0 => String::from("none lost"),
            lost => format!("{lost} lost with the node, unreplicated"),
        };
        let note = format!("{} entries at {count} bots; {} writes, {lost}", self.entries.len(), tally.acknowledged);
        Ok(Seen { milliseconds, note })
    }

    /// A visitor writes `text`, and sees it together with all that was written before.
    async fn visit(&mut self, text: &str) -> Result<usize> {
        sign(&self.fleet, &self.http, text, STEP_DEADLINE).await?;
        self.entries.push(text.to_owned());
        shown_everywhere(&self.fleet, &self.http, &self.entries, STEP_DEADLINE).await
    }

    /// The login of the database at the edge's port for the primary.
    fn at_the_edge(&self) -> Result<Login> {
        Ok(self.fleet.guestbook().at(self.fleet.edge()?.primary))
    }

    fn content(&self) -> Result<&ContentBot> {
        self.fleet.content.first().context("there is a content bot")
    }

    fn load(&self) -> Result<&Load> {
        self.load.as_ref().context("there is load")
    }

    fn writer(&self) -> Result<&Writer> {
        self.writer.as_ref().context("the writer writes until it is counted")
    }

    fn replicas_of(&self, primary: &str) -> Vec<String> {
        self.fleet.postgres.iter().map(|p| p.bot.name.clone()).filter(|name| name != primary).collect()
    }

    async fn serving_names(&self) -> Result<Vec<String>> {
        Ok(self.fleet.store.scope(WEB).await?.serving().into_iter().map(|bot| bot.name).collect())
    }
}

/// Takes a step down in the report, and passes its failure on.
fn record(steps: &mut Vec<Step>, name: &'static str, measured: &'static str, seen: Result<Seen>) -> Result<()> {
    let (ok, milliseconds, note) = match &seen {
        Ok(seen) => (true, seen.milliseconds, seen.note.clone()),
        Err(error) => (false, 0, format!("{error:#}").lines().next().unwrap_or_default().to_owned()),
    };
    print(&format!("{} {name}: {milliseconds} ms {measured}; {note}\n", if ok { "ok    " } else { "FAILED" }))?;
    steps.push(Step { name, ok, milliseconds, measured, note });
    seen.map(drop).context(name)
}

fn table(steps: &[Step]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(["STEP", "HELD", "TIME", "OF", "SEEN"]);
    for step in steps {
        let held = if step.ok { "yes" } else { "NO" };
        table.add_row([step.name, held, &format!("{} ms", step.milliseconds), step.measured, &step.note]);
    }
    let lines: String = table.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    format!("\n{lines}\n")
}
