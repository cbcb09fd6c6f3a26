//! Bots die and stand still beside servers that go on: a bot that comes back in time is not missed, and one that does not
//! leaves no second primary behind.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bots_core::dcs::Revision;
use fleet::{
    Fleet,
    fleet::MAIN,
    process::{Process, Program},
    scratch::processes_below,
    sql::Writer,
    store::Store,
    wait::{millis, until},
    writers::{Writers, longest_gap, lost, two_writable},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Resource, Rlimit, Signal, pidfd_open, setrlimit},
};
use tokio::task::{JoinHandle, JoinSet};

const STEP: Duration = Duration::from_secs(60);
/// Writers of a server that goes on wait for nobody: a pause is for want of a processor, which a bot that starts has for a while.
/// A server that is restarted in place, or a new primary, refuses some besides.
const UNNOTICED: Duration = Duration::from_secs(1);
/// Between two questions for the leader key. Short beside any margin, and not so short that etcd has nothing else to do.
const ASK_INTERVAL: Duration = Duration::from_millis(10);
/// So many programs that never rest for each of two processors leave a guard a quarter of what it would have.
const BURNERS: usize = 6;
/// All of the nice values, as the limit counts them.
const NICE_RANGE: u64 = 40;
/// Clients of a server whose end is measured, and those among them that compute.
const SESSIONS: usize = 20;
const COMPUTING: usize = 2;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bot_that_comes_back_in_time_is_not_missed() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(STEP).await?;
    let replica = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|name| *name != primary);
    let replica = replica.context("there is a replica")?;
    let writer = Writer::start(&fleet.superuser()).await?;
    let before = writer.refused();
    for name in [&primary, &replica, &primary] {
        let killed = Instant::now();
        let bot = fleet.postgres_bot_mut(name)?;
        let postmaster = bot.postmaster();
        bot.bot.kill();
        // As a supervisor does it.
        tokio::time::sleep(Duration::from_millis(100)).await;
        bot.bot.start()?;
        fleet.postgres_up(STEP).await?;
        // Past the end of every lease that the old bot had.
        tokio::time::sleep(Duration::from_secs(fleet.ttl_s + 1)).await;
        let leads = fleet.postgres_up(STEP).await?;
        ensure!(leads == primary, "{leads} leads, and {primary} did before {name}'s bot was killed");
        let bot = fleet.postgres_bot(name)?;
        ensure!(bot.postmaster() == postmaster, "the server of {name} was started anew");
        let gap = writer.longest_gap_since(killed);
        println!("bot of {name} killed and started: {gap} ms without a write");
        ensure!(gap < millis(UNNOTICED), "{gap} ms without a write when {name}'s bot was killed and started");
    }
    let refused = writer.refused() - before;
    ensure!(refused == 0, "{refused} writes were refused: {}", writer.last_error());
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "writes were lost: {tally:?}");
    fleet.stop().await
}

/// The shortest time that is left at its end is a fifth of a lease, less what a renewal had waited for by then: three tenths.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bot_that_stands_still_for_less_than_its_lease_is_not_missed() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(STEP).await?;
    let replica = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|name| *name != primary);
    let replica = replica.context("there is a replica")?;
    let writer = Writer::start(&fleet.superuser()).await?;
    let (before, generation) = (writer.refused(), fleet.store.scope(MAIN).await?.generation());
    let lease = Duration::from_secs(fleet.ttl_s);
    for name in [&primary, &replica, &primary, &primary] {
        let frozen = Instant::now();
        let bot = fleet.postgres_bot_mut(name)?;
        let (postmaster, guard) = (bot.postmaster(), bot.guard());
        bot.bot.freeze()?;
        tokio::time::sleep(lease * 2 / 5).await;
        bot.bot.thaw()?;
        // Past the end of every lease that it had before.
        tokio::time::sleep(lease + Duration::from_secs(1)).await;
        let leads = fleet.postgres_up(STEP).await?;
        ensure!(leads == primary, "{leads} leads, and {primary} did before {name}'s bot stood still");
        let bot = fleet.postgres_bot(name)?;
        ensure!(bot.postmaster() == postmaster, "the server of {name} was started anew");
        ensure!(bot.guard() == guard, "the server of {name} has another guard");
        let gap = writer.longest_gap_since(frozen);
        println!("bot of {name} frozen for {} ms: {gap} ms without a write", millis(lease * 2 / 5));
        ensure!(gap < millis(UNNOTICED), "{gap} ms without a write while {name}'s bot stood still");
    }
    let now = fleet.store.scope(MAIN).await?.generation();
    ensure!(now == generation, "the lock changed hands: {generation:?}, then {now:?}");
    let refused = writer.refused() - before;
    ensure!(refused == 0, "{refused} writes were refused: {}", writer.last_error());
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "writes were lost: {tally:?}");
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bot_that_does_not_come_back_leaves_no_second_primary() -> Result<()> {
    outlived(Fate::Killed).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bot_that_stands_still_leaves_no_second_primary() -> Result<()> {
    outlived(Fate::Frozen).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_guard_takes_its_server_along_and_it_comes_back() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(STEP).await?;
    let writer = Writer::start(&fleet.superuser()).await?;
    let killed = Instant::now();
    let bot = fleet.postgres_bot(&primary)?;
    let (guard, postmaster) = (bot.guard().context("a guard")?, bot.postmaster());
    fleet::process::signal_pid(guard, Signal::KILL);
    let back = writer.writes_after(killed + Duration::from_millis(50), STEP).await?;
    println!("guard killed: writable again after {back} ms");
    let leads = fleet.postgres_up(STEP).await?;
    ensure!(leads == primary, "restarted in place, and yet {leads} leads");
    ensure!(fleet.postgres_bot(&primary)?.postmaster() != postmaster, "the server lived on without its guard");
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "writes were lost: {tally:?}");
    fleet.stop().await
}

/// A new guard is to be had by a restart alone; the bot lives, and so there is time to see whether the old one comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_whose_guard_stands_still_says_so_and_gets_another() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(STEP).await?;
    let writer = Writer::start(&fleet.superuser()).await?;
    let guard = fleet.postgres_bot(&primary)?.guard().context("a guard")?;
    let frozen = Instant::now();
    fleet::process::signal_pid(guard, Signal::STOP);
    until("its report says so", STEP, || async {
        let bot = &fleet.postgres_bot(&primary).map_err(|e| e.to_string())?.bot;
        let report = bot.report().await.map_err(|e| e.to_string())?;
        let says = report.troubles.iter().any(|trouble| trouble.contains("guard of Postgres does not answer"));
        if says { Ok(()) } else { Err(format!("{:?}", report.troubles)) }
    })
    .await?;
    println!("guard frozen: told after {} ms", millis(frozen.elapsed()));
    until("there is another guard", STEP, || async {
        let now = fleet.postgres_bot(&primary).map_err(|e| e.to_string())?.guard();
        if now.is_some_and(|now| now != guard) { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await?;
    writer.writes_after(Instant::now(), STEP).await?;
    println!("guard frozen: {} ms without a write for another", writer.longest_gap_since(frozen));
    let leads = fleet.postgres_up(STEP).await?;
    ensure!(leads == primary, "restarted in place, and yet {leads} leads");
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "writes were lost: {tally:?}");
    fleet.stop().await
}

/// A pause is how bots are replaced by another version of theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bot_that_is_stopped_in_a_pause_leaves_its_server_to_the_next() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(STEP).await?;
    let replica = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|name| *name != primary);
    let replica = replica.context("there is a replica")?;
    let writer = Writer::start(&fleet.superuser()).await?;
    pause(&fleet, true).await?;
    let before = writer.refused();
    for name in [&primary, &replica, &primary] {
        let stopped = Instant::now();
        let bot = fleet.postgres_bot_mut(name)?;
        let postmaster = bot.postmaster();
        ensure!(bot.bot.stop(), "the bot of {name} had to be killed");
        bot.bot.start()?;
        // Past the end of every lease that the old bot had.
        tokio::time::sleep(Duration::from_secs(fleet.ttl_s + 1)).await;
        let leads = fleet.postgres_up(STEP).await?;
        ensure!(leads == primary, "{leads} leads, and {primary} did before {name}'s bot was stopped");
        ensure!(fleet.postgres_bot(name)?.postmaster() == postmaster, "the server of {name} was started anew");
        println!("bot of {name} replaced in a pause: {} ms without a write", writer.longest_gap_since(stopped));
    }
    let refused = writer.refused() - before;
    ensure!(refused == 0, "{refused} writes were refused: {}", writer.last_error());

    // One that does not come back in time: the guard stops the primary, and leaves a replica alone.
    let of_replica = fleet.postgres_bot(&replica)?.postmaster();
    for name in [&replica, &primary] {
        ensure!(fleet.postgres_bot_mut(name)?.bot.stop(), "the bot of {name} had to be killed");
    }
    let lease = Duration::from_secs(fleet.ttl_s);
    until("the guard has stopped the primary", lease, || async {
        let postmaster = fleet.postgres_bot(&primary).map_err(|e| e.to_string())?.postmaster();
        if postmaster.is_none() { Ok(()) } else { Err(format!("{postmaster:?}")) }
    })
    .await?;
    tokio::time::sleep(lease).await;
    ensure!(fleet.postgres_bot(&replica)?.postmaster() == of_replica, "the replica's server did not run on");
    for name in [&replica, &primary] {
        fleet.postgres_bot_mut(name)?.bot.start()?;
    }
    let leads = fleet.postgres_up(STEP).await?;
    ensure!(leads == primary, "{leads} leads, and {primary} led last");
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "writes were lost: {tally:?}");
    pause(&fleet, false).await?;
    fleet.stop().await
}

/// Pauses the cluster or ends the pause, and waits until every member knows.
async fn pause(fleet: &Fleet, paused: bool) -> Result<()> {
    let config = fleet.store.scope(MAIN).await?.value("config").context("a configuration")?.to_owned();
    let mut config: serde_json::Value = serde_json::from_str(&config).context("read the configuration")?;
    config["pause"] = paused.into();
    fleet.store.put(MAIN, "config", &config.to_string()).await?;
    until("every member knows of it", STEP, || async {
        let now = fleet.store.look(MAIN).await?;
        let knows = |name: &String| now.postgres(name).is_some_and(|facts| facts.pause == paused);
        if now.members().keys().all(knows) { Ok(()) } else { Err(now.summary()) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guard_is_in_time_at_the_shortest_lease_on_a_saturated_machine() -> Result<()> {
    margins(2, 10).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guard_is_in_time_at_the_usual_lease_on_a_saturated_machine() -> Result<()> {
    margins(5, 4).await
}

/// Kills primaries' bots beside programs that never rest, and measures when their guards have done what they are for.
async fn margins(ttl_s: u64, rounds: usize) -> Result<()> {
    let goes_first = guards_go_first();
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.ttl_s = ttl_s;
    fleet.add_postgres(2)?;
    let mut margins = Vec::new();
    // At a lease of two seconds, such a machine may fail over by itself between two looks: that round does not count.
    for _try in 0..3 * rounds {
        if margins.len() == rounds {
            break;
        }
        let primary = fleet.postgres_up(STEP).await?;
        let sessions = sessions(&fleet, &primary).await?;
        let burners = burners(&fleet)?;
        // Until they have all that there is, and a renewal was sent and answered beside them.
        tokio::time::sleep(Duration::from_secs(ttl_s)).await;
        let margin = margin(&mut fleet, &primary).await;
        burners.into_iter().for_each(|mut burner| burner.kill_group());
        sessions.iter().for_each(JoinHandle::abort);
        margins.extend(margin?);
        fleet.postgres_bot_mut(&primary)?.bot.start()?;
    }
    ensure!(margins.len() == rounds, "only {} of {rounds} rounds came about", margins.len());
    for Margin { woken, told, gone, key } in &margins {
        println!(
            "ttl {ttl_s} s: woken {woken} ms after the fence, all told after {told}, all gone after {gone}, the leader key there until {key}"
        );
        ensure!(told < key, "the leader key was gone before all of the old server was told to end");
        ensure!(
            !goes_first || *told < ttl_s * 1_000 / 10,
            "it took the guard longer than decision 0011 allows, though it went first"
        );
    }
    fleet.postgres_up(STEP).await?;
    fleet.stop().await
}

/// Milliseconds after a fence.
struct Margin {
    /// The guard ran.
    woken: u64,
    /// Every process of the server was told to end, and ran no code of its own any more.
    told: u64,
    /// Every process had ended.
    gone: u64,
    /// The leader key was there for so long at the least.
    key: u64,
}

/// Kills a bot, and waits for the guard and for the leader key; nothing if another had the key by then.
/// Key and processes are looked at by threads that go before the burners, where that is allowed: late looks make the margin less than it was.
async fn margin(fleet: &mut Fleet, primary: &str) -> Result<Option<Margin>> {
    let hosts = fleet.etcd.hosts();
    let bot = fleet.postgres_bot_mut(primary)?;
    let (data_dir, guard) = (bot.data_dir.clone(), bot.guard());
    bot.bot.kill();
    let before = fleet.store.scope(MAIN).await?;
    if before.leader() != Some(primary) {
        return Ok(None);
    }
    let generation = before.generation();
    let there = tokio::task::spawn_blocking(move || there_until(&hosts, generation));
    let ended = tokio::task::spawn_blocking(move || gone_at(&data_dir, guard));
    let (there, ended) = (there.await??, ended.await??);
    let log = fleet.postgres_bot(primary)?.bot.log();
    let said = log.lines().rev().find(|line| line.contains("all gone after")).context("the guard said nothing")?;
    let after = |word: &str| -> Option<u64> {
        let from = said.split_once(word)?.1.trim_start_matches(" after");
        from.split_ascii_whitespace().next()?.parse().ok()
    };
    let (woken, told, gone) = (after("woken"), after("all told"), after("all gone"));
    let (woken, told, gone) = (woken.context("woken")?, told.context("told")?, gone.context("gone")?);
    // What the guard counts from its fence, we count from the end of the last process.
    let key = match there.checked_duration_since(ended) {
        Some(later) => gone + millis(later),
        None => gone.saturating_sub(millis(ended.duration_since(there))),
    };
    Ok(Some(Margin { woken, told, gone, key }))
}

/// Allows the guards of this test what a unit of systemd allows them: the first turn. False where we may not.
fn guards_go_first() -> bool {
    let most = Some(NICE_RANGE);
    setrlimit(Resource::Nice, Rlimit { current: most, maximum: most }).is_ok()
}

/// When the last question was asked that found the leader key as it was: it was there until then, and perhaps for a while longer.
fn there_until(hosts: &str, generation: Option<Revision>) -> Result<Instant> {
    goes_first();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let store = Arc::new(Store::new(hosts)?);
        let (mut questions, mut there_at, mut gone) = (JoinSet::new(), None, false);
        let began = Instant::now();
        while !gone && began.elapsed() < STEP {
            let (store, asked) = (Arc::clone(&store), Instant::now());
            // A slow answer keeps no other from being asked.
            questions.spawn(async move { (asked, store.scope(MAIN).await) });
            tokio::time::sleep(ASK_INTERVAL).await;
            while let Some(answered) = questions.try_join_next() {
                match answered? {
                    (asked, Ok(now)) if now.generation() == generation => there_at = there_at.max(Some(asked)),
                    (_, Ok(_)) => gone = true,
                    (_, Err(_late)) => {}
                }
            }
        }
        ensure!(gone, "the leader key was never gone");
        there_at.context("the leader key was never seen")
    })
}

/// When nothing of a server was left. Waits for the end of each of its processes, for looking at all of them again and again
/// would take from the guard what it needs.
fn gone_at(data_dir: &Path, guard: Option<u32>) -> Result<Instant> {
    goes_first();
    let began = Instant::now();
    let mut gone = began;
    while began.elapsed() < STEP {
        let below =
            processes_below(data_dir).into_iter().filter_map(|line| line.split(' ').next()?.parse::<u32>().ok());
        let left: Vec<u32> = below.filter(|pid| Some(*pid) != guard).collect();
        if left.is_empty() {
            return Ok(gone);
        }
        for pid in left.into_iter().filter_map(|pid| Pid::from_raw(pid.cast_signed())) {
            let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
            let patience = Timespec { tv_sec: STEP.as_secs().cast_signed(), tv_nsec: 0 };
            let _ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&patience));
        }
        gone = Instant::now();
    }
    bail!("the old server was not stopped")
}

/// Lets this thread go before all others, if we may.
fn goes_first() {
    let thread = rustix::thread::gettid().as_raw_nonzero().to_string();
    if let Err(error) = fleet::process::run_now("chrt", &["--fifo", "--pid", "1", &thread]) {
        eprintln!("what is measured may be too little: {error:#}");
    }
}

/// Sessions of clients at a server, some of which compute.
async fn sessions(fleet: &Fleet, primary: &str) -> Result<Vec<JoinHandle<()>>> {
    let login = fleet.superuser().at(fleet.postgres_bot(primary)?.port);
    let mut sessions = Vec::new();
    for n in 0..SESSIONS {
        let client = login.any().await?;
        let work = if n < COMPUTING { "SELECT count(*) FROM generate_series(1, 10000000000)" } else { "SELECT 1" };
        sessions.push(tokio::spawn(async move {
            let _ends_with_the_server = client.batch_execute(work).await;
            std::future::pending::<()>().await;
        }));
    }
    Ok(sessions)
}

/// Programs that leave no processor and no disk idle.
fn burners(fleet: &Fleet) -> Result<Vec<Process>> {
    let file = fleet.scratch.path().join("burner");
    let write =
        format!("while :; do dd if=/dev/zero of={} bs=1M count=32 conv=fsync 2>/dev/null; done", file.display());
    let compute = String::from("while :; do :; done");
    let scripts = std::iter::repeat_n(compute, BURNERS).chain([write]);
    let start = |(n, script): (usize, String)| {
        Program::new(format!("burner-{n}"), "/bin/sh").args([String::from("-c"), script]).start(fleet.logs())
    };
    scripts.enumerate().map(start).collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Killed,
    Frozen,
}

async fn outlived(fate: Fate) -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(STEP).await?;
    let writers = Writers::start(&fleet.superuser(), STEP).await?;
    let moment = writers.now();
    let began = Instant::now();
    let bot = fleet.postgres_bot_mut(&primary)?;
    let old_port = bot.port;
    match fate {
        Fate::Killed => bot.bot.kill(),
        Fate::Frozen => bot.bot.freeze()?,
    }
    let new = fleet.new_primary(&primary, STEP).await?;
    let new_port = fleet.postgres_bot(&new)?.port;
    let led = began.elapsed();
    writers.acknowledged_by(Some(new_port), moment, STEP).await?;
    let server = fleet.postgres_bot(&primary)?;
    ensure!(server.postmaster().is_none(), "the old server lives on without its bot");
    match fate {
        Fate::Killed => fleet.postgres_bot_mut(&primary)?.bot.start()?,
        Fate::Frozen => fleet.postgres_bot_mut(&primary)?.bot.thaw()?,
    }
    fleet.postgres_up(STEP).await?;
    let acknowledged = writers.finish().await?;
    let (both, gap) = (two_writable(&acknowledged), longest_gap(&acknowledged, moment));
    let last =
        acknowledged.iter().filter(|write| write.port == old_port && write.at > moment).map(|write| write.at).max();
    let first = acknowledged.iter().find(|write| write.port == new_port).map(|write| write.at);
    println!(
        "old primary wrote for {} ms more; the next led after {} ms; {} ms without a write",
        last.map_or(0, |last| millis(last - moment)),
        millis(led),
        millis(gap)
    );
    ensure!(both == Duration::ZERO, "two servers took writes for {both:?}");
    let (last, first) = (last.context("the old primary wrote on")?, first.context("the new primary wrote")?);
    ensure!(last < first, "the old primary wrote until {last:?}, the new one from {first:?} on");
    ensure!(last - moment < Duration::from_secs(fleet.ttl_s), "the old primary wrote beyond its lease");
    let missing = lost(&fleet.superuser(), &acknowledged).await?;
    println!("{missing} of {} acknowledged writes lost: the cluster is asynchronous", acknowledged.len());
    until("the old primary streams", STEP, || async {
        let now = fleet.store.look(MAIN).await?;
        if now.streaming().contains(&primary.as_str()) { Ok(()) } else { Err(now.summary()) }
    })
    .await?;
    fleet.stop().await
}
