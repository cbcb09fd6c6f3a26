//! `make bench-content`: from `git push` to the last of eight web bots that serves it, told by a signed webhook, and, in the same
//! run, found by a poll of ten seconds.
//!
//! The clock starts when `git push` is started, so that git's own work is in the figures; it stops when a client has read a
//! page of the new commit from the last bot. Clients read every bot about every two milliseconds.

use std::{
    fs,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use fleet::{
    Fleet,
    bots::{ContentBot, Serves},
    fleet::{SITE, WEB, plain_site},
    git::Origin,
    http::Http,
    program::{print, run_program},
    usage::round,
};
use futures_util::future::try_join_all;
use serde::Serialize;

/// What the poll that we compare with is set to; git-sync's and our own default.
const POLL_INTERVAL_S: u64 = 10;

/// How long one push may take to be everywhere.
const PATIENCE: Duration = Duration::from_secs(40);

/// Between two reads of one bot: the error of every figure.
const READ_EVERY: Duration = Duration::from_millis(2);

/// Between two pushes: longer than the bots space their looks.
const PAUSE: Duration = Duration::from_millis(400);

/// Measures how long a push takes to be on every page.
#[derive(Debug, Parser)]
struct Args {
    /// How many pushes are announced
    #[arg(long, default_value_t = 60)]
    pushes: u32,
    /// How many pushes are left to the poll
    #[arg(long, default_value_t = 8)]
    polls: u32,
    /// How many web bots serve
    #[arg(long, default_value_t = 8)]
    web: usize,
    /// Where the figures go
    #[arg(long, default_value = "target/bench/content.json")]
    report: PathBuf,
}

/// One push.
#[derive(Debug, Clone, Copy)]
struct Push {
    git_ms: f64,
    first_ms: f64,
    last_ms: f64,
}

impl Push {
    fn skew_ms(self) -> f64 {
        self.last_ms - self.first_ms
    }
}

/// `target/bench/content.json`.
#[derive(Debug, Serialize)]
struct Report {
    pushes: usize,
    web_bots: usize,
    /// From the start of `git push` until the last bot serves the commit, told by a webhook.
    p50_ms: f64,
    p95_ms: f64,
    max_ms: f64,
    /// What of that is git's own: until `git push` has ended.
    git_p50_ms: f64,
    /// Between the first and the last bot.
    skew_p50_ms: f64,
    skew_p95_ms: f64,
    /// The same, found by a poll.
    polls: usize,
    poll_interval_s: u64,
    poll_p50_ms: f64,
    poll_max_ms: f64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    run_program("bench-content", run(&args)).await
}

async fn run(args: &Args) -> Result<()> {
    ensure!(args.pushes > 0 && args.polls > 0 && args.web > 0, "--pushes, --polls and --web: give at least 1");
    let fleet = start(args.web).await?;
    print(&format!("  {} pushes, told by a signed webhook\n", args.pushes))?;
    let mut told = Vec::new();
    for number in 0..args.pushes {
        tokio::time::sleep(PAUSE).await;
        told.push(push(&fleet, &format!("told {number}")).await?);
    }
    let accepted = fleet.content.first().context("a content bot")?.bot.metric("content_pushes_total").await?;
    ensure!(accepted >= u64::from(args.pushes), "{accepted} announcements were accepted, of {} pushes", args.pushes);
    fleet.origin()?.keep_quiet()?;
    print(&format!("  {} pushes, found by a poll every {POLL_INTERVAL_S} s\n", args.polls))?;
    let mut polled = Vec::new();
    for number in 0..args.polls {
        // Evenly spread over the interval, for the poll that found the last one has just been.
        let share = u64::from((number * 7 + 3) % args.polls.max(1)) * 1_000 * POLL_INTERVAL_S / u64::from(args.polls);
        tokio::time::sleep(Duration::from_millis(share)).await;
        polled.push(push(&fleet, &format!("polled {number}")).await?);
    }
    let report = report(args, &told, &polled);
    if let Some(folder) = args.report.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(&report).context("write the figures as JSON")?;
    fs::write(&args.report, json + "\n").with_context(|| format!("write {}", args.report.display()))?;
    print(&table(&report))?;
    fleet.stop().await
}

/// etcd, a content bot, and `web` bots that all serve.
async fn start(web: usize) -> Result<Fleet> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.store.put(WEB, "config", &format!(r#"{{"scaling":{{"min":{web},"max":{web}}}}}"#)).await?;
    let seed = fleet.scratch.dir("seed", None)?;
    plain_site(&seed, "the first words")?;
    let origin = Origin::new(&fleet.scratch, fleet.logs(), "site", &seed).await?;
    let (place, signed) = (fleet.place(), fleet.signed_pushes()?);
    let mut content = ContentBot::polling(&place, (SITE, "content-1"), &origin.url(), POLL_INTERVAL_S, &signed)?;
    content.bot.start()?;
    origin.notify(content.bot.api_url.trim_start_matches("http://"), &fleet.push_secret_file()?)?;
    fleet.content.push(content);
    fleet.origin = Some(origin);
    fleet.add_web(web, &Serves::Files)?;
    fleet.serving(web, PATIENCE).await?;
    Ok(fleet)
}

/// Pushes a page that says `words`, and reads every bot until it is there.
async fn push(fleet: &Fleet, words: &str) -> Result<Push> {
    let origin = fleet.origin()?;
    plain_site(origin.work(), words)?;
    let sha = origin.commit(words).await?;
    let began = Instant::now();
    let git = async {
        origin.push_branch().await?;
        Ok(began.elapsed())
    };
    let pages = fleet.web.iter().map(|web| format!("{}/", web.url));
    let readers = try_join_all(pages.map(|page| read_until(page, sha.clone(), began)));
    let (git, served) = tokio::try_join!(git, readers)?;
    let first = served.iter().min().copied().unwrap_or_default();
    let last = served.iter().max().copied().unwrap_or_default();
    Ok(Push { git_ms: ms(git), first_ms: ms(first), last_ms: ms(last) })
}

async fn read_until(page: String, sha: String, began: Instant) -> Result<Duration> {
    let http = Http::new();
    loop {
        let answer = http.page(&page).await?;
        if answer.revision() == sha {
            return Ok(began.elapsed());
        }
        ensure!(began.elapsed() < PATIENCE, "{page} does not serve {sha} within {PATIENCE:?}");
        tokio::time::sleep(READ_EVERY).await;
    }
}

fn report(args: &Args, told: &[Push], polled: &[Push]) -> Report {
    let of = |pushes: &[Push], figure: fn(Push) -> f64, percent| {
        percentile(pushes.iter().copied().map(figure).collect(), percent)
    };
    Report {
        pushes: told.len(),
        web_bots: args.web,
        p50_ms: of(told, |p| p.last_ms, 50),
        p95_ms: of(told, |p| p.last_ms, 95),
        max_ms: of(told, |p| p.last_ms, 100),
        git_p50_ms: of(told, |p| p.git_ms, 50),
        skew_p50_ms: of(told, Push::skew_ms, 50),
        skew_p95_ms: of(told, Push::skew_ms, 95),
        polls: polled.len(),
        poll_interval_s: POLL_INTERVAL_S,
        poll_p50_ms: of(polled, |p| p.last_ms, 50),
        poll_max_ms: of(polled, |p| p.last_ms, 100),
    }
}

/// The least figure that `percent` of all do not exceed.
fn percentile(mut figures: Vec<f64>, percent: usize) -> f64 {
    figures.sort_by(f64::total_cmp);
    let rank = (figures.len() * percent).div_ceil(100).max(1);
    round(figures.get(rank - 1).copied().unwrap_or_default())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1_000.0
}

fn table(report: &Report) -> String {
    let Report { pushes, web_bots, p50_ms, p95_ms, max_ms, git_p50_ms, skew_p50_ms, skew_p95_ms, .. } = report;
    let Report { polls, poll_interval_s, poll_p50_ms, poll_max_ms, .. } = report;
    let all = format!("until the last of {web_bots} bots serves it");
    format!(
        "\nTOLD BY A SIGNED WEBHOOK ({pushes} pushes)\n  {all:<38}  p50 {p50_ms:.0} ms, p95 {p95_ms:.0} ms, max {max_ms:.0} ms\n  \
         {:<38}  p50 {git_p50_ms:.0} ms\n  {:<38}  p50 {skew_p50_ms:.1} ms, p95 {skew_p95_ms:.1} ms\n\
         FOUND BY A POLL EVERY {poll_interval_s} S ({polls} pushes)\n  {all:<38}  p50 {poll_p50_ms:.0} ms, max {poll_max_ms:.0} ms\n\n",
        "of this, until `git push` has ended", "between the first and the last bot",
    )
}
