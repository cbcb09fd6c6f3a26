//! Torture: commits are pushed all the time, and content and web bots are killed at every step of their publication, while
//! readers compare every byte that the web bots serve with what was pushed.

mod plan;
mod readers;
mod stage;
mod tree;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use self::{
    plan::WEB_BOTS,
    readers::{Board, Readers},
    stage::stage,
};
pub use self::{
    plan::{Moment, Round, Victim, plan},
    stage::Stage,
    tree::Tree,
};
use crate::{
    Fleet,
    bots::{ContentBot, Serves},
    fleet::{SITE, WEB},
    git::Origin,
    http::Http,
    logs,
    process::{Program, system_binary},
    store::Store,
    wait::{millis, until},
    webhook::{self, Moved},
};

/// How long the fleet may take to come up.
const UP_DEADLINE: Duration = Duration::from_secs(60);

/// How long it may take from the last restart until every bot serves the last commit: the lease of a killed leader, the ten
/// seconds that a candidate waits for web bots, and the retries of both.
const CONVERGE_DEADLINE: Duration = Duration::from_secs(30);

/// Leases are as short as they may be: the killed are missed sooner.
const TTL_S: u64 = 2;

/// Publications without a kill, by which the length of one is known.
const REHEARSALS: usize = 8;

/// After so many rounds the fleet is waited for, however long it takes; in between no longer than [`PAUSE_MAX`], so that
/// the next push may meet what the last kill has left.
const CONVERGE_EVERY: usize = 4;
const PAUSE_MAX: Duration = Duration::from_millis(1_200);

/// Between two looks for a stage. One takes two milliseconds; the shortest stages are missed now and then, and then the
/// next one counts.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// How long a stage is waited for: a publication may be held up by the round before.
const STAGE_DEADLINE: Duration = Duration::from_secs(4);

/// In so many rounds somebody must have been killed at each stage: a run that missed one has shown less than it says.
const ROUNDS_FOR_EVERY_STAGE: usize = 500;

/// How long git may take to read a repository through.
const GIT_DEADLINE: Duration = Duration::from_secs(60);

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// Decides who is killed when.
    pub seed: u64,
    /// How many commits are pushed into a kill.
    pub rounds: usize,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// Commits that were pushed into a kill.
    pub rounds: usize,
    /// The length of a publication without a kill, of which 95 of 100 are shorter.
    pub publish_p95_ms: u64,
    /// How often each was killed.
    pub kills: BTreeMap<&'static str, u64>,
    /// How far the publication had come when they were.
    pub kills_by_stage: BTreeMap<Stage, BTreeMap<&'static str, u64>>,
    /// Answers that were compared with what they must be.
    pub responses_checked: u64,
    /// Their bytes.
    pub bytes_checked: u64,
    /// Whole sets of files that were of one commit.
    pub sets_of_one_commit: u64,
    /// Sets that a flip fell into.
    pub sets_across_a_flip: u64,
    /// Requests that a killed bot did not answer.
    pub requests_to_the_killed: u64,
    /// How often all bots were waited for.
    pub convergences: usize,
    /// The slowest of them, from the last restart.
    pub slowest_convergence_ms: u64,
    /// The commits that never went live, for a newer one was pushed before.
    pub superseded: usize,
    /// What is on the disks in the end, looked at file by file.
    pub trees_on_disk: usize,
    /// How long it took.
    pub seconds: u64,
    /// What must not have been.
    pub wrong: Vec<String>,
}

impl Outcome {
    /// Whether what must hold has held.
    ///
    /// # Errors
    /// What has not.
    pub fn check(&self) -> Result<()> {
        let Self { wrong, responses_checked, kills, rounds, .. } = self;
        ensure!(wrong.is_empty(), "{} things went wrong:\n{}", wrong.len(), wrong.join("\n"));
        ensure!(*responses_checked > 0, "no response was checked");
        let killed: u64 = kills.values().sum();
        ensure!(killed >= u64::try_from(*rounds).unwrap_or(u64::MAX), "{killed} kills in {rounds} rounds");
        let missed = Stage::BEFORE_THE_END.into_iter().filter(|stage| !self.kills_by_stage.contains_key(stage));
        let missed: Vec<Stage> = missed.collect();
        let enough = *rounds < ROUNDS_FOR_EVERY_STAGE || missed.is_empty();
        ensure!(enough, "nobody was killed at {missed:?}, in {rounds} rounds");
        Ok(())
    }
}

/// Tortures a fleet of its own; `say` is told what happens. If that ends badly, the logs are left behind.
///
/// # Errors
/// If the fleet does not come up, or does not come to rest.
pub async fn run(wish: Wish, mut say: impl FnMut(&str)) -> Result<Outcome> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.ttl_s = TTL_S;
    let ended = Box::pin(run_on(&mut fleet, wish, &mut say)).await;
    if !ended.as_ref().is_ok_and(|outcome| outcome.check().is_ok()) {
        say(&format!("logs are kept in {}", fleet.keep_logs().display()));
    }
    let outcome = ended?;
    fleet.stop().await?;
    Ok(outcome)
}

async fn run_on(fleet: &mut Fleet, wish: Wish, say: &mut impl FnMut(&str)) -> Result<Outcome> {
    let began = Instant::now();
    let board = Board::new(WEB_BOTS);
    start(fleet, &board).await?;
    let urls: Vec<String> = fleet.web.iter().map(|web| web.url.clone()).collect();
    let readers = Readers::start(&board, &urls);
    let mut rack =
        Rack { fleet, board: Arc::clone(&board), number: 1, span: Duration::ZERO, outcome: Outcome::default() };
    rack.rehearse().await?;
    say(&format!("a publication takes {} ms", rack.span.as_millis()));
    rack.outcome.publish_p95_ms = millis(rack.span);
    for (index, round) in plan(wish.seed, wish.rounds).iter().enumerate() {
        let (sha, killed) = rack.round(round).await.with_context(|| format!("round {index}: {round:?}"))?;
        let restarted = Instant::now();
        let must = (index + 1).is_multiple_of(CONVERGE_EVERY) || index + 1 == wish.rounds;
        if must {
            rack.converge(&sha, CONVERGE_DEADLINE).await.with_context(|| format!("after round {index}: {round:?}"))?;
            let took = millis(restarted.elapsed());
            rack.outcome.convergences += 1;
            rack.outcome.slowest_convergence_ms = rack.outcome.slowest_convergence_ms.max(took);
            say(&format!("round {:3}: {killed}; converged {took} ms later", index + 1));
        } else {
            let _not_yet = tokio::time::timeout(PAUSE_MAX, rack.converge(&sha, CONVERGE_DEADLINE)).await;
        }
        if !board.seen().wrong.is_empty() {
            break;
        }
    }
    let seen = readers.finish().await;
    let Rack { number, mut outcome, .. } = rack;
    outcome.superseded = superseded(&fleet.store, number).await?;
    outcome.trees_on_disk = on_disk(fleet, &board).await?;
    errors(fleet).into_iter().for_each(|line| board.wrong(line));
    Ok(Outcome {
        seed: wish.seed,
        rounds: wish.rounds,
        responses_checked: seen.checked,
        bytes_checked: seen.bytes,
        sets_of_one_commit: seen.sets,
        sets_across_a_flip: seen.sets_across_a_flip,
        requests_to_the_killed: seen.unanswered,
        seconds: began.elapsed().as_secs(),
        wrong: board.seen().wrong,
        ..outcome
    })
}

/// Two content bots, and web bots that all serve the first commit.
async fn start(fleet: &mut Fleet, board: &Board) -> Result<()> {
    fleet.store.put(WEB, "config", &format!(r#"{{"scaling":{{"min":{WEB_BOTS},"max":{WEB_BOTS}}}}}"#)).await?;
    let seed = fleet.scratch.dir("seed", None)?;
    let origin = Origin::new(&fleet.scratch, fleet.logs(), "site", &seed).await?;
    let tree = Tree::of(1);
    tree.write(&origin)?;
    let sha = origin.push("commit 1").await?;
    board.publish(&sha, 1);
    let signed = fleet.signed_pushes()?;
    for name in ["content-1", "content-2"] {
        let mut bot = ContentBot::new(&fleet.place(), SITE, name, &origin.url(), &signed)?;
        bot.bot.start()?;
        fleet.content.push(bot);
    }
    fleet.origin = Some(origin);
    fleet.add_web(WEB_BOTS, &Serves::Files)?;
    fleet.serving(WEB_BOTS, UP_DEADLINE).await.map(|_serving| ())
}

/// The fleet under torture.
struct Rack<'f> {
    fleet: &'f mut Fleet,
    board: Arc<Board>,
    /// The number of the last commit.
    number: u64,
    /// How long a publication takes.
    span: Duration,
    outcome: Outcome,
}

impl Rack<'_> {
    /// A few publications that nobody disturbs.
    async fn rehearse(&mut self) -> Result<()> {
        let mut spans = Vec::new();
        for _ in 0..REHEARSALS {
            let sha = self.commit().await?;
            let began = Instant::now();
            push(self.fleet.origin()?, &self.doors(), &sha, &self.fleet.push_secret).await?;
            self.converge(&sha, CONVERGE_DEADLINE).await?;
            spans.push(began.elapsed());
        }
        spans.sort();
        // Of so few, the longest is as near to the 95th of a hundred as any.
        self.span = spans.last().copied().unwrap_or_default();
        Ok(())
    }

    /// Makes the next commit. Readers may see it from now on.
    async fn commit(&mut self) -> Result<String> {
        self.number += 1;
        let origin = self.fleet.origin()?;
        Tree::of(self.number).write(origin)?;
        let sha = origin.commit(&format!("commit {}", self.number)).await?;
        self.board.publish(&sha, self.number);
        Ok(sha)
    }

    /// Where pushes are announced.
    fn doors(&self) -> Vec<String> {
        self.fleet.content.iter().map(|bot| format!("{}/push", bot.bot.api_url)).collect()
    }

    /// Pushes a commit, kills somebody meanwhile, and starts him again. Yields the commit and what was done.
    async fn round(&mut self, round: &Round) -> Result<(String, String)> {
        let sha = self.commit().await?;
        let (doors, span) = (self.doors(), self.span);
        let Fleet { content, web, store, origin, push_secret, .. } = &mut *self.fleet;
        let (origin, store) = (origin.as_ref().context("a repository")?, &*store);
        let pushing = push(origin, &doors, &sha, push_secret);
        let killing = async {
            let leader = store.scope(SITE).await?.leader().map(str::to_owned);
            let at = wait(store, &sha, round.moment, span).await;
            let is_leader = |bot: &ContentBot| Some(&bot.bot.name) == leader.as_ref();
            for victim in &round.victims {
                match victim {
                    Victim::ContentLeader => content.iter_mut().filter(|b| is_leader(b)).for_each(|b| b.bot.kill()),
                    Victim::ContentStandby => content.iter_mut().filter(|b| !is_leader(b)).for_each(|b| b.bot.kill()),
                    Victim::Web(index) => {
                        self.board.killed(*index);
                        web.get_mut(*index).into_iter().for_each(|web| web.bot.kill());
                        self.board.killed(*index);
                    }
                }
            }
            tokio::time::sleep(round.away).await;
            let bots = content.iter_mut().map(|b| &mut b.bot).chain(web.iter_mut().map(|w| &mut w.bot));
            for bot in bots {
                if !bot.is_running() {
                    bot.start()?;
                }
            }
            Ok::<_, anyhow::Error>(at)
        };
        let ((), at) = tokio::try_join!(pushing, killing)?;
        for victim in &round.victims {
            let victim = victim.label();
            *self.outcome.kills.entry(victim).or_default() += 1;
            *self.outcome.kills_by_stage.entry(at).or_default().entry(victim).or_default() += 1;
        }
        Ok((sha, format!("{:?} killed at {at:?}", round.victims)))
    }

    /// Waits until every web bot serves the commit, nothing is on its way, and both content bots are there.
    async fn converge(&self, sha: &str, deadline: Duration) -> Result<()> {
        let store = &self.fleet.store;
        until(&format!("all serve commit {} ({sha})", self.number), deadline, || async {
            let (site, web) = tokio::try_join!(store.look(SITE), store.look(WEB))?;
            let serving = web.serving().iter().filter(|bot| bot.sha == sha).count();
            let is_live = site.live().is_some_and(|live| live.sha == sha) && site.value("revision/candidate").is_none();
            let led = site.leader().is_some_and(|leader| site.members().contains_key(leader));
            let content = self.fleet.content.iter().filter(|c| site.members().contains_key(&c.bot.name)).count();
            if serving == WEB_BOTS && is_live && led && content == self.fleet.content.len() {
                return Ok(());
            }
            let quarantined: Vec<_> = site.below("quarantine/").collect();
            Err(format!("live {:?}, quarantined {quarantined:?}; {}; {}", site.live(), site.summary(), web.summary()))
        })
        .await
    }
}

/// `git push`, and the signed webhook to every content bot that lives.
async fn push(origin: &Origin, doors: &[String], sha: &str, secret: &str) -> Result<()> {
    origin.push_branch().await?;
    for door in doors {
        let said = webhook::announcement(&Moved::to(sha), secret);
        let sending = Http::new();
        match sending.send_with(hyper::Method::POST, door, said.headers(), said.body.clone().into()).await {
            // A bot that takes no signed word would be found out by its poll alone, and nobody would notice.
            Ok(answer) => ensure!(answer.status == 202, "{door} answers {}: {}", answer.status, answer.text),
            Err(_killed) => {}
        }
    }
    Ok(())
}

/// Waits for the moment, and says how far the publication has come.
async fn wait(store: &Store, sha: &str, moment: Moment, span: Duration) -> Stage {
    let began = Instant::now();
    match moment {
        Moment::Share(thousandths) => {
            let share = u32::try_from(thousandths).unwrap_or(u32::MAX);
            tokio::time::sleep(span * share / 1_000).await;
        }
        Moment::Seen(wanted, after) => {
            while began.elapsed() < STAGE_DEADLINE {
                if stage(store, sha, WEB_BOTS).await.is_ok_and(|stage| stage >= wanted) {
                    break;
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
            tokio::time::sleep(after).await;
        }
    }
    stage(store, sha, WEB_BOTS).await.unwrap_or(Stage::Pushed)
}

/// How many of `pushed` commits never went live. The generation of the live one counts every candidate.
async fn superseded(store: &Store, pushed: u64) -> Result<usize> {
    let live = store.scope(SITE).await?.live().context("a revision is live")?;
    Ok(usize::try_from(pushed.saturating_sub(live.generation)).unwrap_or(usize::MAX))
}

/// Looks at every revision that a web bot keeps, and at both mirrors, with git's own eyes. Yields how many trees were whole.
async fn on_disk(fleet: &Fleet, board: &Board) -> Result<usize> {
    let git = system_binary("git", &[])?;
    let run = async |args: &[&str]| {
        let program = Program::new("git", &git).args(args.iter().copied()).env("GIT_CONFIG_NOSYSTEM", "1");
        program.env("GIT_CONFIG_GLOBAL", "/dev/null").run(fleet.logs(), GIT_DEADLINE).await
    };
    let mut whole = 0;
    for web in &fleet.web {
        let revisions = fleet.scratch.path().join(format!("{WEB}-{}", web.bot.name)).join("revisions");
        for revision in entries(&revisions)? {
            let (path, files) = (revisions.join(&revision), fleet.scratch.path().join("looked-at"));
            let _absent = std::fs::remove_dir_all(&files);
            std::fs::create_dir_all(&files).context("make a folder")?;
            let (dir, work) = (path.to_string_lossy(), files.to_string_lossy());
            let done =
                run(&["--git-dir", &dir, "--work-tree", &work, "checkout", "--force", &revision, "--", "."]).await?;
            // Its parents are not there, so that it cannot be shown as a change.
            let said = run(&["--git-dir", &dir, "cat-file", "commit", &revision]).await?.stdout;
            let number = said.lines().last().and_then(|line| line.strip_prefix("commit ")?.parse().ok());
            match number.map(|number| Tree::of(number).is_at(&files)) {
                Some(Ok(true)) if done.code == Some(0) => whole += 1,
                other => board.wrong(format!("{} on disk: {other:?}: {}", path.display(), done.stderr)),
            }
        }
    }
    for bot in &fleet.content {
        let data = fleet.scratch.path().join(format!("{SITE}-{}", bot.bot.name));
        let mirror = data.join("mirror.git");
        if !mirror.exists() {
            // It has never led.
            continue;
        }
        let done = run(&["--git-dir", &mirror.to_string_lossy(), "fsck", "--no-dangling"]).await?;
        match done.code {
            Some(0) => whole += 1,
            _ => board.wrong(format!("{}: {}{}", mirror.display(), done.stdout, done.stderr)),
        }
        let known = BTreeSet::from(["lock", "mirror.git", "packs"].map(String::from));
        let left: Vec<_> = entries(&data)?.into_iter().filter(|name| !known.contains(name)).collect();
        if !left.is_empty() {
            board.wrong(format!("{} has left-overs: {}", data.display(), left.join(", ")));
        }
    }
    Ok(whole)
}

fn entries(folder: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

/// What the bots have logged as errors: a human would have to look.
fn errors(fleet: &Fleet) -> Vec<String> {
    let content = fleet.content.iter().map(|c| &c.bot);
    let bots = content.chain(fleet.web.iter().map(|w| &w.bot));
    let errors = bots.flat_map(|bot| {
        let log = bot.log();
        logs::errors(&log).map(|line| format!("{}: {line}", bot.name)).collect::<Vec<_>>()
    });
    errors.collect()
}
