//! The eye on the server: asks it regularly and when poked, and reports what has changed.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use bots_core::{
    machine::{Span, Time},
    shell::{Clock, process},
    wire::{ParameterChange, Timeline},
};
use tokio::{sync::Notify, task::JoinHandle};
use tokio_util::task::AbortOnDropHandle;

use super::{
    hands::Hands,
    heeds::{self, Heeds},
    node::Node,
    postmaster::Life,
    server::{self, Connection},
};
use crate::machine::{Postgres, ReplicationSlot, Server};

/// How often the server is asked. Its death shows otherwise, and at once, and so does the end of the process that receives the log. That a
/// stream began, and how far anybody is, shows here alone: Postgres tells nobody. Whoever waits for it pokes the eye.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// A receiver that has ended because a setting of its was changed has a successor within some 30 ms: that is no news.
const NEXT_RECEIVER: Duration = Duration::from_millis(100);

/// How often, once it has said the same for [`QUIET_AFTER`] questions: an idle bot should cost next to nothing.
const ASK_EVERY_QUIET: Duration = Duration::from_secs(1);

/// See [`ASK_EVERY_QUIET`]. Five seconds.
const QUIET_AFTER: u32 = 10;

/// How long the server may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);

/// So many questions in a row without an answer, and the server is called silent.
const MISSED_MAX: u32 = 3;

/// One question in so many is asked over a new connection: a postmaster that stands still lets the old ones go on.
const FRESH_EVERY: u32 = 10;

/// One question in so many is the costly one for pending restarts.
const PENDING_RESTART_EVERY: u32 = 20;

/// One question in so many is the one for replication slots: they are looked after in minutes, not in moments.
const SLOTS_EVERY: u32 = 4;

/// After a reload, so many questions in a row are: the server takes its files in a moment later.
const PENDING_RESTART_AFTER_RELOAD: u32 = 4;

/// So long after our connection goes by new `synchronous_standby_names`, every process of the server does: the postmaster tells
/// all of them in one go, each reads its files before it takes the next word of a standby, and that takes it a millisecond.
pub(super) const NAMES_SETTLE: Span = Span::from_millis(100);

/// Makes the eye look at once. Clones share.
#[derive(Debug, Clone, Default)]
pub struct Poke {
    inner: Arc<PokeInner>,
}

#[derive(Debug, Default)]
struct PokeInner {
    wake: Notify,
    asked: AtomicBool,
    slots: AtomicBool,
}

impl Poke {
    /// Look now; report if there is news.
    pub fn look(&self) {
        self.inner.wake.notify_one();
    }

    /// Look at the replication slots now; report if there is news.
    pub fn look_at_slots(&self) {
        self.inner.slots.store(true, Ordering::Relaxed);
        self.inner.wake.notify_one();
    }

    /// Look now, and report in any case: the machine asks.
    pub fn ask(&self) {
        self.inner.asked.store(true, Ordering::Relaxed);
        self.inner.wake.notify_one();
    }
}

/// A restartpoint may have to write all that is dirty.
const RESTARTPOINT_DEADLINE: Duration = Duration::from_secs(300);

#[derive(Debug, Default)]
struct Eye {
    /// The timeline that a standby shows is the one it has replayed to: a stream or a restartpoint has said so since it had
    /// nothing left to replay. Of itself it tells that of its last restartpoint, however far beyond that it is.
    placed: bool,
    placing: Option<JoinHandle<anyhow::Result<()>>>,
    connection: Option<Connection>,
    /// Waits for the end of the process that receives the log: then the stream has broken off.
    receiver: Option<AbortOnDropHandle<()>>,
    looks: u32,
    missed: u32,
    /// So many questions in a row had the same answer.
    quiet: u32,
    last: Option<Server>,
    /// How many questions the connection has served.
    served: u32,
    timeline: Timeline,
    pending_restart: BTreeMap<String, ParameterChange>,
    slots: Option<BTreeMap<String, ReplicationSlot>>,
    names: Names,
    /// The reloads that have been seen, and how many more questions their effect is asked for.
    reloads: (u64, u32),
}

/// The `synchronous_standby_names` that were seen last.
#[derive(Debug, Default)]
struct Names {
    /// With the time when they were seen first.
    seen: Option<(String, Time)>,
    /// Before, commits may have waited for nobody, and the checkpointer was not seen to know better.
    from_nobody: bool,
}

/// Looks for as long as the process lives.
pub async fn run(hands: Arc<Hands>, poke: Poke) {
    let mut eye = Eye::default();
    loop {
        let pause = if eye.quiet >= QUIET_AFTER { ASK_EVERY_QUIET } else { ASK_EVERY };
        let _either_way = tokio::time::timeout(pause, poke.inner.wake.notified()).await;
        let asked = poke.inner.asked.swap(false, Ordering::Relaxed);
        if poke.inner.slots.swap(false, Ordering::Relaxed) {
            eye.slots = None;
        }
        let since = hands.reporter.epoch();
        let seen = match hands.postmaster.life() {
            Life::Alive { ready: true, .. } => eye.look(&hands, &poke, asked).await,
            Life::Alive { ready: false, .. } => {
                eye = Eye::default();
                asked.then_some(Postgres::Starting)
            }
            Life::Down => {
                eye = Eye::default();
                asked.then_some(Postgres::Down)
            }
        };
        if let Some(postgres) = seen {
            hands.reporter.observed(since, postgres, asked).await;
        }
    }
}

impl Eye {
    /// What there is to report; nothing while a first answer or two are missing.
    async fn look(&mut self, hands: &Hands, poke: &Poke, asked: bool) -> Option<Postgres> {
        if let Some(placing) = self.placing.take_if(|placing| placing.is_finished()) {
            match placing.await {
                Ok(Ok(())) => self.placed = true,
                Ok(Err(error)) => {
                    tracing::warn!(error = format!("{error:#}"), "no restartpoint: it is asked for again")
                }
                Err(error) => tracing::warn!(%error, "no restartpoint: it is asked for again"),
            }
        }
        match tokio::time::timeout(ANSWER_DEADLINE, self.question(hands, poke)).await {
            Ok(Ok(seen)) => {
                self.missed = 0;
                let same = seen.server() == self.last.as_ref();
                self.quiet = if same { self.quiet.saturating_add(1) } else { 0 };
                self.last = seen.server().cloned();
                return Some(seen);
            }
            Ok(Err(error)) if server::is_starting(&error) => {
                // Crash recovery after a backend died: the postmaster lives and will answer.
                self.missed = 0;
                self.connection = None;
                return Some(Postgres::Starting);
            }
            Ok(Err(error)) if server::is_answer(&error) => {
                tracing::debug!(error = format!("{error:#}"), "the server answers with an error");
                (self.missed, self.quiet) = (0, 0);
                self.connection = None;
                return asked.then_some(Postgres::Silent);
            }
            Ok(Err(error)) => tracing::debug!(error = format!("{error:#}"), "the server did not answer"),
            Err(_elapsed) => tracing::debug!("the server did not answer in time"),
        }
        self.connection = None;
        self.quiet = 0;
        self.missed += 1;
        (asked || self.missed >= MISSED_MAX).then_some(Postgres::Silent)
    }

    async fn question(&mut self, hands: &Hands, poke: &Poke) -> anyhow::Result<Postgres> {
        if self.connection.is_none() {
            self.looks = 0;
        }
        if self.connection.is_none() || self.served >= FRESH_EVERY {
            self.connection = Some(Connection::open(&hands.node, ANSWER_DEADLINE).await?);
            self.served = 0;
        }
        self.served += 1;
        let Some(connection) = &self.connection else { return Ok(Postgres::Silent) };
        let began = Clock::now();
        let mut server = connection.facts(self.timeline).await?;
        self.timeline = server.timeline;
        self.placed |= server.streaming;
        if server.settled && !self.placed {
            server.settled = false;
            if self.placing.is_none() {
                self.placing = Some(tokio::spawn(place(hands.node.clone(), poke.clone())));
            }
        }
        if server.streaming && self.receiver.as_ref().is_none_or(AbortOnDropHandle::is_finished) {
            let receiver = connection.receiver().await?;
            self.receiver = receiver.map(|pid| AbortOnDropHandle::new(tokio::spawn(look_at_end(pid, poke.clone()))));
        }
        server.waits_for.in_force = !server.in_recovery && self.names.are_in_force(&server.waits_for.names, began);
        if server.waits_for.in_force && self.names.from_nobody && !server.waits_for.names.is_empty() {
            self.names.from_nobody = !connection.checkpointer_waits().await?;
            server.waits_for.in_force = false;
        }
        if matches!(*hands.heeds(), Heeds::Told(_)) {
            // Found out while there is time: a promotion would have to wait for it.
            heeds::find_out(hands, connection).await?;
        }
        let reloads = hands.reloads();
        if self.reloads.0 != reloads {
            self.reloads = (reloads, PENDING_RESTART_AFTER_RELOAD);
        }
        if self.looks.is_multiple_of(PENDING_RESTART_EVERY) || self.reloads.1 > 0 {
            self.pending_restart = connection.pending_restart().await?;
            self.reloads.1 = self.reloads.1.saturating_sub(1);
        }
        if self.looks.is_multiple_of(SLOTS_EVERY) || self.slots.is_none() {
            self.slots = Some(connection.slots().await?);
        }
        self.looks = self.looks.wrapping_add(1);
        server.slots.clone_from(&self.slots);
        server.pending_restart.clone_from(&self.pending_restart);
        Ok(Postgres::Up(server))
    }
}

/// Where the end of the receiver cannot be waited for, its stream is seen to be gone as the eye sees everything.
async fn look_at_end(receiver: u32, poke: Poke) {
    match process::exit_of(receiver).await {
        Ok(()) => {
            tokio::time::sleep(NEXT_RECEIVER).await;
            poke.look();
        }
        Err(error) => tracing::debug!(%error, receiver, "the end of a WAL receiver is not waited for"),
    }
}

/// Has a standby that has nothing left to replay write down where it is.
async fn place(node: Node, poke: Poke) -> anyhow::Result<()> {
    let connection = Connection::open(&node, RESTARTPOINT_DEADLINE).await?;
    let done = connection.client().batch_execute("CHECKPOINT").await.context("ask for a restartpoint");
    poke.look();
    done
}

impl Names {
    /// Whether a look that `began` then shows names that every process goes by.
    fn are_in_force(&mut self, names: &str, began: Time) -> bool {
        match &self.seen {
            Some((seen, since)) if seen == names => began.since(*since) >= NAMES_SETTLE,
            seen => {
                self.from_nobody |= seen.as_ref().is_none_or(|(before, _)| before.is_empty());
                self.seen = Some((names.to_owned(), Clock::now()));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{NAMES_SETTLE, Names, Span, Time};

    #[test]
    fn names_are_in_force_a_moment_after_they_were_seen_first() {
        let mut names = Names::default();
        assert!(!names.are_in_force("a", Time::ZERO), "seen first");
        let later = names.seen.as_ref().map_or(Time::ZERO, |(_, at)| *at) + NAMES_SETTLE;
        assert!(!names.are_in_force("a", later - Span::from_millis(1)));
        assert!(names.are_in_force("a", later));
        assert!(!names.are_in_force("b", later), "others");
        assert!(names.from_nobody, "nobody knows what was before the first");
    }
}
