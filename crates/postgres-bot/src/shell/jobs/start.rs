//! Bringing the server up, as a primary or read-only, and turning it to another upstream.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, bail};
use bots_core::{machine::Span, shell::Clock, wire::Timeline};
use rustix::process::Pid;

use super::super::{
    copies,
    files::{self, Mode},
    hands::Hands,
    postmaster::Life,
    processes::PidFile,
    server::{self, Connection},
    timelines,
};
use crate::machine::{JobResult, Server, StopMode, Upstream};

/// A server that must not run gets this long to stop in good order.
const KILL_AFTER: Span = Span::from_millis(500);

/// How often the server's pid file is looked at until it says `ready`.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A first answer takes longer than later ones: every cache is cold.
const FIRST_ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// How long a restartpoint is waited for; a server with more to write tells its timeline later, by itself.
const RESTARTPOINT_PATIENCE: Duration = Duration::from_secs(2);

/// How long a stream may take to end.
const DETACH_DEADLINE: Duration = Duration::from_secs(5);

/// The startup process, which asks for receivers, is woken when files are to be read again: it does so within a millisecond, and ends a
/// receiver that it asked for by the old ones.
const DETACHED_AFTER: Span = Span::from_millis(200);

/// How long a crashed standby may take to be consistent by itself; a new copy is the way out.
const SETTLE_DEADLINE: Duration = Duration::from_secs(60);

/// Starts writable, on the timeline that the data is on. Who must have a watchdog device and has none is stopped again.
pub(super) async fn primary(hands: &Arc<Hands>) -> anyhow::Result<JobResult> {
    let up = start(hands, Mode::Primary).await?;
    hands.postmaster.confirm_watchdog().await?;
    Ok(up)
}

/// Starts read-only.
pub(super) async fn standby(hands: &Arc<Hands>, upstream: Option<Upstream>) -> anyhow::Result<JobResult> {
    if hands.node.rewinding().exists() {
        bail!("the data is half rewound: only another rewind or a new copy helps");
    }
    start(hands, Mode::Standby(upstream)).await
}

/// Turns a running replica to another upstream, by reload.
pub(super) async fn follow(hands: &Arc<Hands>, upstream: Option<Upstream>) -> anyhow::Result<JobResult> {
    if hands.postmaster.life() == Life::Down {
        bail!("the server is down");
    }
    let detach = upstream.is_none();
    hands.set_mode(Mode::Standby(upstream));
    hands.apply().await?;
    if detach {
        tokio::time::timeout(DETACH_DEADLINE, detached(hands)).await.context("the server goes on receiving")??;
    }
    Ok(JobResult::Done)
}

/// Waits until nothing is received, and nothing can be: the configuration that was read names nobody, and no receiver is there for
/// long enough that none can be on its way any more.
async fn detached(hands: &Hands) -> anyhow::Result<()> {
    let connection = Connection::open(&hands.node, DETACH_DEADLINE).await?;
    let mut quiet_since = None;
    loop {
        let quiet = connection.receives_nothing().await?;
        let since = quiet_since.get_or_insert_with(Clock::now);
        if !quiet {
            quiet_since = None;
        } else if Clock::now().since(*since) >= DETACHED_AFTER {
            return Ok(());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn start(hands: &Arc<Hands>, mode: Mode) -> anyhow::Result<JobResult> {
    let up = bring_up(hands, mode).await?;
    hands.postmaster.set_ready();
    Ok(JobResult::Started(up))
}

/// Lets a crashed standby replay what it has, and stops it in good order. It writes no log of its own meanwhile, as it
/// would in single-user mode.
pub(super) async fn settle_standby(hands: &Arc<Hands>, timeline: Timeline) -> anyhow::Result<()> {
    let up = tokio::time::timeout(SETTLE_DEADLINE, bring_up(hands, Mode::Settling(timeline))).await;
    // Stopped in any case, and when this job is given up, by the stop that follows.
    hands.postmaster.stop(StopMode::Fast).await;
    up.context("the crashed standby has not enough log to be consistent")??;
    Ok(())
}

async fn bring_up(hands: &Arc<Hands>, mode: Mode) -> anyhow::Result<Server> {
    let node = &hands.node;
    if hands.postmaster.life() == Life::Down {
        let writable = mode == Mode::Primary;
        let leader = match &mode {
            Mode::Standby(Some(upstream)) => Some(upstream.name.clone()),
            Mode::Standby(None) | Mode::Settling(_) | Mode::Primary => None,
        };
        hands.on_disk(move |hands| hands.prepare(mode)).await?;
        if let Err(error) = hands.on_disk(move |hands| copies::install(&hands.node, leader.as_deref())).await {
            tracing::warn!(error = format!("{error:#}"), "copies of logical slots were not put in place");
        }
        hands.reporter.starting();
        hands.postmaster.launch(&node.binaries.program("postgres"), writable, &hands.reporter).await?;
    } else {
        // Left running by an earlier life of the bot, or still starting by older orders.
        hands.postmaster.hears().await;
        hands.on_disk(move |hands| hands.take_over(mode)).await?;
    }
    tokio::select! {
        up = ready(hands) => Ok(up),
        pid = hidden(hands) => {
            hands.postmaster.stop(StopMode::Immediate { kill_after: KILL_AFTER }).await;
            bail!(
                "postgresql.bin_dir: {} starts the server as a process of its own ({}), which does not end with its guard: let it \
                 become the server, with `exec`",
                node.binaries.program("postgres").display(),
                pid.as_raw_pid()
            )
        }
        () = hands.postmaster.gone() => {
            let words = files::last_words(&node.log_file);
            let log = node.log_file.display();
            bail!("Postgres ended while it started: {words} (more in {log})")
        }
    }
}

/// Waits until the server says that it takes connections, and has answered. A server that says so and does not answer is
/// asked again for as long as it lives: the machine has the patience, and gives the job up.
async fn ready(hands: &Hands) -> Server {
    loop {
        if says_ready(hands) {
            match tokio::time::timeout(FIRST_ANSWER_DEADLINE, first_answer(hands)).await {
                Ok(Ok(server)) => return server,
                Ok(Err(error)) if server::is_starting(&error) => {}
                Ok(Err(error)) => {
                    tracing::warn!(error = format!("{error:#}"), "Postgres is up and does not answer yet")
                }
                Err(_elapsed) => tracing::warn!("Postgres is up and does not answer yet"),
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Waits until the server says that it is another process than the one that the guard has started: it is the child of a script. The
/// kernel would not tell it of the guard's death.
async fn hidden(hands: &Hands) -> Pid {
    loop {
        if let Life::Alive { pid: Some(started), .. } = hands.postmaster.life()
            && let Some(file) = PidFile::read(&hands.node.data_dir)
            && file.pid != started
            && file.status == "ready"
            // What stands in the file may be an earlier server's word.
            && hands.postmaster.processes().is_ok_and(|running| running.contains(&file.pid))
        {
            return file.pid;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What stands in the file may be an earlier server's word.
fn says_ready(hands: &Hands) -> bool {
    let Life::Alive { pid, .. } = hands.postmaster.life() else { return false };
    PidFile::read(&hands.node.data_dir).is_some_and(|file| Some(file.pid) == pid && file.status == "ready")
}

async fn first_answer(hands: &Hands) -> anyhow::Result<Server> {
    let connection = Connection::open(&hands.node, FIRST_ANSWER_DEADLINE).await?;
    let server = connection.facts(Timeline::default()).await.context("the first question")?;
    let behind = timelines::newest(&hands.node.data_dir).is_some_and(|newest| newest > server.timeline);
    if !(server.in_recovery && behind) {
        return Ok(server);
    }
    // A standby that follows nobody tells the timeline of its last restartpoint, however far beyond that it has replayed.
    match tokio::time::timeout(RESTARTPOINT_PATIENCE, connection.client().batch_execute("CHECKPOINT")).await {
        Ok(Ok(())) => connection.facts(Timeline::default()).await.context("the first question, asked again"),
        Ok(Err(_)) | Err(_) => Ok(server),
    }
}
