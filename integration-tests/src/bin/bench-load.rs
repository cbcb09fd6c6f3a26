//! `make bench-load`: how soon an idle bot answers under load, how often bots come and go when load swings, and whether
//! a request is lost while bots come, go, flip and restart under a thousand requests a second.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bots_core::wire::{ACTIONS_PER_HOUR_MAX, ContentRevision};
use clap::{Parser, Subcommand};
use fleet::{
    bots::{Bot, Place},
    etcd::EtcdCluster,
    free_port,
    git::Origin,
    ground::Site,
    http::{Http, Load},
    program::{print, run_program},
    scratch::Scratch,
    store::{ScopeNow, Store},
    usage::round,
    wait::{millis, until},
};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bots in the fleet, and how long one answer of the app takes.
const BOTS: usize = 4;
const SERVICE: Duration = Duration::from_millis(40);

/// Clients of an overload: three bots' worth at eight requests in flight each.
const OVERLOAD: usize = 24;

/// Clients that ask a thousand times a second between them, with this pause each.
const STEADY: usize = 64;
const STEADY_PAUSE: Duration = Duration::from_millis(18);

/// Fewer answers a second than this do not show that none fails under load.
const STEADY_RPS_MIN: f64 = 1_000.0;

/// How often one fleet is overloaded: three bots are sent to rest after each, and a scaler sends thirty to rest within an hour.
const TRIALS_PER_FLEET: usize = 8;

/// How long load comes, and goes, when it swings.
const SWING: Duration = Duration::from_secs(4);

/// Every step ends within this.
const DEADLINE: Duration = Duration::from_secs(60);

/// Measures waking, swinging and losing nothing.
#[derive(Debug, Parser)]
struct Args {
    /// How often an idle fleet is overloaded
    #[arg(long, default_value_t = 10)]
    trials: usize,
    /// How long load swings
    #[arg(long, default_value_t = 60)]
    swing_seconds: u64,
    /// Where the figures go
    #[arg(long, default_value = "target/bench/load.json")]
    report: PathBuf,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// The app that the bots run
    App,
}

#[derive(Debug, Serialize)]
struct Report {
    wake_p50_ms: u64,
    wake_p95_ms: u64,
    wake_ms: Vec<u64>,
    swing_seconds: u64,
    swing_starts: u64,
    swing_stops: u64,
    swing_actions_per_minute: f64,
    /// The scaler's budget, which ends such a swing.
    budget_per_hour: usize,
    steady_answered: u64,
    steady_failed: u64,
    steady_rps: f64,
    first_failure: Option<String>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    match args.part {
        Some(Part::App) => run_program("bench-load", app()).await,
        None => run_program("bench-load", run(&args)).await,
    }
}

/// Answers every request with the page of its commit, after a while. `/fast` takes no while.
async fn app() -> Result<()> {
    let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is set for apps"));
    let page = fs::read_to_string(Path::new(&variable("CONTENT_DIR")?).join("index.html")).context("read the page")?;
    let port: u16 = variable("PORT")?.parse().context("read PORT")?;
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\ncontent-type: text/html\r\n\r\n", page.len());
    let answer: Arc<str> = (head + &page).into();
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.context("listen")?;
    loop {
        let (mut stream, _) = listener.accept().await.context("accept")?;
        let answer = Arc::clone(&answer);
        tokio::spawn(async move {
            let mut read = [0; 8_192];
            // The bot in front asks one thing at a time, without a body.
            while let Ok(n @ 1..) = stream.read(&mut read).await {
                if !read[..n].starts_with(b"GET /fast") {
                    tokio::time::sleep(SERVICE).await;
                }
                if stream.write_all(answer.as_bytes()).await.is_err() {
                    break;
                }
            }
        });
    }
}

/// etcd, a repository and the bots.
struct Stand {
    bots: Vec<Bot>,
    store: Store,
    origin: Origin,
    generation: u64,
    http: Http,
    _etcd: EtcdCluster,
    _scratch: Scratch,
}

async fn run(args: &Args) -> Result<()> {
    let mut wake_ms = Vec::new();
    while wake_ms.len() < args.trials {
        let stand = Stand::start().await?;
        let trials = TRIALS_PER_FLEET.min(args.trials - wake_ms.len());
        stand.wake(trials, &mut wake_ms).await?;
    }
    let (swing_starts, swing_stops) = Stand::start().await?.swing(Duration::from_secs(args.swing_seconds)).await?;
    let mut stand = Stand::start().await?;
    let began = Instant::now();
    let tally = stand.steady().await?;
    let seconds = began.elapsed().as_secs_f64();
    let mut sorted = wake_ms.clone();
    sorted.sort_unstable();
    let at =
        |percent: usize| sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied().unwrap_or(0);
    let report = Report {
        wake_p50_ms: at(50),
        wake_p95_ms: at(95),
        wake_ms,
        swing_seconds: args.swing_seconds,
        swing_starts,
        swing_stops,
        swing_actions_per_minute: round((swing_starts + swing_stops) as f64 * 60.0 / args.swing_seconds.max(1) as f64),
        budget_per_hour: ACTIONS_PER_HOUR_MAX,
        steady_answered: tally.answered,
        steady_failed: tally.failed,
        steady_rps: round(tally.answered as f64 / seconds),
        first_failure: tally.first_failure,
    };
    if let Some(folder) = args.report.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(&report).context("write the figures as JSON")?;
    fs::write(&args.report, json.clone() + "\n").with_context(|| format!("write {}", args.report.display()))?;
    print(&format!("{json}\n"))?;
    ensure!(report.steady_failed == 0, "{} requests failed: {:?}", report.steady_failed, report.first_failure);
    let rate = report.steady_rps;
    ensure!(rate >= STEADY_RPS_MIN, "none failed, of {rate} a second: it takes {STEADY_RPS_MIN} to prove anything");
    Ok(())
}

impl Stand {
    async fn start() -> Result<Self> {
        let scratch = Scratch::new()?;
        let logs = scratch.dir("logs", None)?;
        let etcd = EtcdCluster::start(&scratch, &logs, &[Site::default()])?;
        let store = Store::new(&etcd.hosts())?;
        until("etcd answers", DEADLINE, || async { store.look("web").await }).await?;
        let seed = scratch.dir("seed", None)?;
        fs::write(seed.join("index.html"), "<p>first</p>\n").context("write a page")?;
        let origin = Origin::new(&scratch, &logs, "site", &seed).await?;
        let me = std::env::current_exe().context("find this program")?;
        let place = Place::plain(&scratch, &logs, etcd.hosts());
        let bots = (1..=BOTS).map(|number| {
            let name = format!("web-{number}");
            let data_dir = scratch.dir(&format!("{name}-data"), None)?;
            let rest = format!(
                "data_dir: {}\nttl_s: 5\ncontent:\n  scope: site\nscaling:\n  min: 1\n  max: {BOTS}\n  target_in_flight: 8\n  \
                 stable_window_s: 3\nweb:\n  listen: 127.0.0.1:{}\n  mode: app\n  health_path: /fast\n  command: ['{}', app]\n",
                data_dir.display(),
                free_port()?,
                me.display(),
            );
            Bot::new(&place, ("web", &name), "web-bot", &rest, None)
        });
        let mut bots = bots.collect::<Result<Vec<Bot>>>()?;
        for bot in &mut bots {
            bot.start()?;
        }
        let http = Http::new();
        let mut stand = Self { bots, store, origin, generation: 0, http, _etcd: etcd, _scratch: scratch };
        stand.publish().await?;
        stand.quiet().await?;
        Ok(stand)
    }

    /// Makes the branch's newest commit live.
    async fn publish(&mut self) -> Result<String> {
        self.generation += 1;
        let sha = fs::read_to_string(self.origin.bare().join("refs/heads/main")).context("read the branch")?;
        let live = ContentRevision {
            sha: sha.trim().to_owned(),
            generation: self.generation,
            reference: String::from("main"),
            origin: self.origin.url(),
            subject: String::from("bench"),
            detected_unix_ms: 0,
        };
        self.store.put("site", "revision/live", &serde_json::to_string(&live).context("a revision as JSON")?).await?;
        Ok(live.sha)
    }

    /// Waits until one bot serves and all others are idle.
    async fn quiet(&self) -> Result<()> {
        until("the fleet is quiet", DEADLINE, || async {
            let now = self.store.look("web").await?;
            let idle = now.members().values().filter(|m| m.head.state == "idle").count();
            if now.serving().len() == 1 && idle == BOTS - 1 { Ok(()) } else { Err(now.summary()) }
        })
        .await
    }

    /// From the beginning of an overload to the first answer of a bot that was idle.
    async fn wake(&self, trials: usize, times: &mut Vec<u64>) -> Result<()> {
        for _ in 0..trials {
            self.quiet().await?;
            let quiet = names(&self.store.scope("web").await?);
            let pages = self.pages("/").await?;
            let began = Instant::now();
            let load = Load::start(OVERLOAD, Duration::ZERO, pages);
            until("an idle bot answers", DEADLINE, || async {
                let now = self.store.look("web").await?;
                let woken = now.serving().into_iter().find(|bot| !quiet.contains(&bot.name));
                let woken = woken.ok_or_else(|| now.summary())?;
                self.http.page(&format!("{}/fast", woken.url)).await.map(drop).map_err(|e| format!("{e:#}"))
            })
            .await?;
            times.push(millis(began.elapsed()));
            let (trial, took) = (times.len(), times.last().copied().unwrap_or(0));
            print(&format!("  overload {trial}: a bot has woken after {took} ms\n"))?;
            let tally = load.finish().await;
            ensure!(tally.failed == 0, "{} requests failed: {:?}", tally.failed, tally.first_failure);
        }
        Ok(())
    }

    /// Lets load come and go, and counts how often bots start and stop serving.
    async fn swing(&self, length: Duration) -> Result<(u64, u64)> {
        self.quiet().await?;
        print("  load swings\n")?;
        let began = Instant::now();
        let (mut before, mut starts, mut stops) = (names(&self.store.scope("web").await?), 0, 0);
        let mut load = None;
        while began.elapsed() < length {
            let high = (began.elapsed().as_millis() / SWING.as_millis()).is_multiple_of(2);
            match load.take() {
                None if high => load = Some(Load::start(OVERLOAD, Duration::ZERO, self.pages("/").await?)),
                Some(running) if !high => {
                    let tally = Load::finish(running).await;
                    ensure!(tally.failed == 0, "{} requests failed: {:?}", tally.failed, tally.first_failure);
                }
                other => load = other,
            }
            if let Some(load) = &load {
                load.aim(self.pages("/").await?);
            }
            let now = names(&self.store.scope("web").await?);
            starts += now.iter().filter(|name| !before.contains(name)).count() as u64;
            stops += before.iter().filter(|name| !now.contains(name)).count() as u64;
            before = now;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if let Some(load) = load {
            load.finish().await;
        }
        Ok((starts, stops))
    }

    /// A thousand requests a second through scale-out, flip, restart of a bot, and scale-in.
    async fn steady(&mut self) -> Result<fleet::http::LoadTally> {
        self.quiet().await?;
        print("  a thousand requests a second, and everything that may happen\n")?;
        let steady = Load::start(STEADY, STEADY_PAUSE, self.pages("/fast").await?);
        let heavy = Load::start(OVERLOAD, Duration::ZERO, self.pages("/").await?);
        let aim = async |stand: &Self| -> Result<usize> {
            let pages = stand.pages("/fast").await?;
            let count = pages.len();
            steady.aim(pages);
            heavy.aim(stand.pages("/").await?);
            Ok(count)
        };
        // Scale-out.
        self.while_(&aim, "three bots serve", |now| now.serving().len() >= 3).await?;
        // Flip.
        self.origin.write("index.html", "<p>second</p>\n")?;
        self.origin.push("A second page").await?;
        let sha = self.publish().await?;
        self.while_(&aim, "all serve the new commit", |now| now.serving().iter().all(|bot| bot.sha == sha)).await?;
        // Restart of a bot that serves.
        let name =
            self.store.scope("web").await?.serving().first().map(|bot| bot.name.clone()).context("a bot serves")?;
        let index = self.bots.iter().position(|bot| bot.name == name).context("the bot is ours")?;
        if let Some(bot) = self.bots.get_mut(index) {
            bot.ask_to_stop();
        }
        self.while_(&aim, "the bot has left", |now| now.serving().iter().all(|bot| bot.name != name)).await?;
        let gone = Instant::now();
        while self.bots.get_mut(index).is_some_and(Bot::is_running) {
            ensure!(gone.elapsed() < DEADLINE, "{name} does not stop");
            aim(self).await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        match self.bots.get_mut(index) {
            Some(bot) => bot.start()?,
            None => bail!("the bot is ours"),
        }
        // Scale-in.
        let tally = {
            let heavy_only = Vec::new();
            heavy.aim(heavy_only);
            self.while_(
                &async |stand: &Self| -> Result<usize> {
                    let pages = stand.pages("/fast").await?;
                    let count = pages.len();
                    steady.aim(pages);
                    Ok(count)
                },
                "one bot serves again",
                |now| now.serving().len() == 1,
            )
            .await?;
            let heavy = heavy.finish().await;
            let mut tally = steady.finish().await;
            tally.answered += heavy.answered;
            tally.failed += heavy.failed;
            tally.first_failure = tally.first_failure.or(heavy.first_failure);
            tally
        };
        Ok(tally)
    }

    /// Keeps the load aimed until a condition holds.
    async fn while_(
        &self,
        aim: &impl AsyncFn(&Self) -> Result<usize>,
        what: &str,
        holds: impl Fn(&ScopeNow) -> bool,
    ) -> Result<()> {
        let began = Instant::now();
        loop {
            aim(self).await?;
            let now = self.store.scope("web").await?;
            if holds(&now) {
                return Ok(());
            }
            ensure!(began.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}; seen last: {}", now.summary());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The same page at every bot that serves.
    async fn pages(&self, path: &str) -> Result<Vec<String>> {
        Ok(self.store.scope("web").await?.serving().into_iter().map(|bot| format!("{}{path}", bot.url)).collect())
    }
}

fn names(now: &ScopeNow) -> Vec<String> {
    now.serving().into_iter().map(|bot| bot.name).collect()
}
