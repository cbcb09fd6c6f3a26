//! The life of a server's process: starting, opening, promoting, stopping, dying.

use bots_core::{
    machine::{Span, Time},
    wire::Lsn,
};
use postgres_bot::machine::{Event, Job, JobResult, Postgres, StopMode, WatchdogOrder};

use super::{PostgresBody, Process, ServerItem, jobs::GUARD_PATIENCE, streaming::CONNECT_EVERY};
use crate::{
    check::Seen,
    plant::Plant,
    world::{Frozen, GUARD_LATE, NodeId, World},
};

/// How long a sender waits for a standby that it cannot reach any more (`wal_sender_timeout`).
const SENDER_TIMEOUT: Span = Span::from_secs(5);

/// Without anybody to kill what lingers, the processes of a server that lost its bot take at most this long to die.
const ORPHANS_DIE_MS: u64 = 120;

/// A guard takes at most this long to kill every process of its server.
const GUARD_KILLS_MS: u64 = 60;

/// So many of a thousand primaries that are stopped have something left to archive.
const ARCHIVES_PER_MILLE: u64 = 250;

/// That takes them at most this long.
const ARCHIVING_MAX_MS: u64 = 20_000;

/// A fence that is set this much later than the bot wants it is of no use.
const FENCE_TOO_LATE: Span = Span::from_millis(2_000);

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// Shut down with a checkpoint, which replicas have received as far as they could be reached.
    Clean,
    /// Died, one line.
    Died(&'static str),
}

impl World {
    /// Launches the process.
    pub(super) fn launch(&mut self, node: NodeId, primary: bool, how_long: Span, fails: bool) {
        if self.nodes[node.0].frozen == Frozen::Guard {
            // The guard of an earlier server is killed before.
            self.nodes[node.0].frozen = Frozen::No;
        }
        let body = self.body_mut(node);
        body.unread = None;
        body.run += 1;
        body.process = Process::Starting { primary };
        body.told = Postgres::Starting;
        body.ending = fails;
        body.link = None;
        (body.kept, body.silent, body.closed) = (false, false, None);
        body.fence = if primary { body.wanted_fence } else { None };
        let run = body.run;
        let hidden =
            if primary { 0 } else { usize::try_from(self.rng.below(self.plan.unreplayed_max + 1)).unwrap_or(0) };
        let now = self.now;
        self.body_mut(node).commits_begin(now, hidden);
        self.arm_guard(node);
        if fails {
            self.server_after(node, how_long, ServerItem::Gone { run, end: End::Died("exit status: 1") });
        } else {
            self.server_after(node, how_long, ServerItem::Ready { run });
        }
    }

    pub(super) fn server_ready(&mut self, node: NodeId, run: u64) {
        let body = self.body(node);
        let Process::Starting { primary } = body.process else { return };
        if body.run != run {
            return;
        }
        if self.body(node).disk.rewound && !self.has_its_upstreams_log(node) {
            return self.server_after(node, CONNECT_EVERY, ServerItem::Ready { run });
        }
        let serial = self.ledger.next_record();
        let body = self.body_mut(node);
        body.disk.rewound = false;
        body.process = Process::Up { in_recovery: !primary, promoting: false };
        if primary {
            body.disk.control_timeline = body.disk.wal.timeline();
            body.disk.wal.append(serial, 120);
        }
        let name = self.nodes[node.0].name.clone();
        self.say(format_args!("{name}: Postgres is up, {}", if primary { "writable" } else { "read-only" }));
        if primary {
            self.becomes_writable(node, run);
        } else {
            self.server_after(node, Span::from_millis(1), ServerItem::Connect { run });
            let replays = self.plan.replay.draw(&mut self.rng);
            self.server_after(node, replays, ServerItem::Replayed { run });
        }
        let started = |job: &Job| matches!(job, Job::StartPrimary | Job::StartStandby { .. });
        if let Some(id) = self.end_of(node, started)
            && let Some(facts) = self.body(node).facts()
        {
            self.job_ended(node, id, Ok(JobResult::Started(facts)));
        }
    }

    /// Whether what a rewind has left to be streamed can be.
    fn has_its_upstreams_log(&self, node: NodeId) -> bool {
        let disk = &self.body(node).disk;
        let upstream = disk.upstream.as_ref().and_then(|name| self.named(name));
        upstream.is_some_and(|up| {
            let theirs = self.body(up);
            up != node && self.servers_meet(node, up) && theirs.is_open() && disk.wal.is_part_of(&theirs.disk.wal)
        })
    }

    /// A standby has replayed all that it had on disk.
    pub(super) fn replayed(&mut self, node: NodeId, run: u64) {
        let body = self.body_mut(node);
        if body.run == run {
            body.commits.hidden = 0;
        }
    }

    /// Takes the running job, if it is of this kind.
    pub(super) fn end_of(&mut self, node: NodeId, kind: impl Fn(&Job) -> bool) -> Option<postgres_bot::machine::JobId> {
        self.body_mut(node).job.take_if(|running| kind(&running.job)).map(|running| running.id)
    }

    pub(super) fn server_promoted(&mut self, node: NodeId, run: u64) {
        if self.body(node).run != run || !matches!(self.body(node).process, Process::Up { promoting: true, .. }) {
            return;
        }
        let serial = self.ledger.next_record();
        let body = self.body_mut(node);
        let next = body.promoting_to;
        let switched_at = body.disk.wal.branch(next);
        let ancestry = body.disk.wal.ancestry().to_vec();
        body.disk.wal.append(serial, 128);
        body.disk.history_seen = next;
        body.disk.standby = false;
        body.process = Process::Up { in_recovery: false, promoting: false };
        body.link = None;
        let name = self.nodes[node.0].name.clone();
        self.say(format_args!("{name}: Postgres is promoted to timeline {next} at {switched_at}"));
        self.becomes_writable(node, run);
        self.stream_to_standbys(node);
        if let Some(id) = self.end_of(node, |job| matches!(job, Job::Promote { .. }))
            && let Some(server) = self.body(node).facts()
        {
            self.job_ended(node, id, Ok(JobResult::Promoted { server, ancestry }));
        }
    }

    /// What is overdue is seen again when it is not any more: it has to be gone by then.
    fn becomes_writable(&mut self, node: NodeId, run: u64) {
        self.see(&Seen::Writable { node });
        if self.is_overdue(node) {
            self.server_after(node, GUARD_LATE, ServerItem::StillWritable { run });
        }
    }

    pub(super) fn still_writable(&mut self, node: NodeId, run: u64) {
        let body = self.body(node);
        if body.run == run && body.accepts_writes() {
            // It may have stood still again meanwhile.
            self.becomes_writable(node, run);
        }
    }

    /// The machine asks for a stop, or for a harder one.
    pub(super) fn stop_server(&mut self, node: NodeId, mode: StopMode) {
        let run = self.body(node).run;
        if mode == StopMode::Fast && self.body(node).process == Process::Stopping && self.body(node).ending {
            // It goes down as it does; the bot hears again of what has come to pass.
            if let Some(shutdown_checkpoint) = self.body(node).closed {
                self.tell_postgres(node, Span::ZERO, Event::PostgresClosed { shutdown_checkpoint });
            }
            return;
        }
        let (delay, end) = match mode {
            StopMode::Fast => {
                let primary = self.body(node).accepts_writes();
                // Crash recovery is not interrupted for a checkpoint.
                let was_up = matches!(self.body(node).process, Process::Up { .. });
                self.body_mut(node).process = Process::Stopping;
                let mut delay = self.rng.span(20, 600);
                if primary && self.standbys_of(node).iter().any(|standby| !self.servers_meet(node, *standby)) {
                    delay = delay + SENDER_TIMEOUT;
                }
                if primary && self.rng.chance(ARCHIVES_PER_MILLE) {
                    self.server_after(node, delay, ServerItem::Closed { run });
                    delay = delay + self.rng.span(30, ARCHIVING_MAX_MS);
                }
                (delay, if was_up { End::Clean } else { End::Died("shut down while starting") })
            }
            StopMode::Immediate { kill_after } => {
                let most = kill_after.as_millis().min(400) + 10;
                (self.rng.span(2, most), End::Died("immediate shutdown"))
            }
        };
        self.body_mut(node).ending = true;
        self.server_after(node, delay, ServerItem::Gone { run, end });
    }

    /// A primary that goes down has written its last word, and sent it to whom it reaches.
    fn write_out(&mut self, node: NodeId) -> Lsn {
        let at = self.body(node).disk.wal.end();
        let serial = self.ledger.next_record();
        let body = self.body_mut(node);
        body.disk.wal.append(serial, 120);
        body.disk.control_timeline = body.disk.wal.timeline();
        self.last_words(node);
        at
    }

    /// All that is left of a primary is its archiver, and the bot hears of that.
    pub(super) fn server_closed(&mut self, node: NodeId, run: u64) {
        if self.body(node).run != run || self.body(node).process != Process::Stopping {
            return;
        }
        let shutdown_checkpoint = self.write_out(node);
        self.body_mut(node).closed = Some(shutdown_checkpoint);
        self.standbys_notice_end(node);
        let name = self.nodes[node.0].name.clone();
        self.say(format_args!("{name}: Postgres is shut down, and archives"));
        if self.body(node).job.as_ref().is_some_and(|running| matches!(running.job, Job::Stop { mode: StopMode::Fast }))
        {
            self.tell_postgres(node, Span::ZERO, Event::PostgresClosed { shutdown_checkpoint });
        }
    }

    /// The process is gone: the bot hears of it, and standbys do.
    pub(super) fn server_gone(&mut self, node: NodeId, run: u64, end: End) {
        let body = self.body(node);
        if body.run != run || body.process == Process::Down {
            return;
        }
        let clean = end == End::Clean && !body.disk.standby;
        let closed = self.body_mut(node).closed.take();
        let checkpoint = closed.or_else(|| clean.then(|| self.write_out(node)));
        self.promotion_breaks_off(node);
        let (n, life) = (&self.nodes[node.0], self.nodes[node.0].life);
        let waited_for = n.brain.is_some() && n.frozen == Frozen::Guard;
        let body = self.body_mut(node);
        // A guard that says nothing is waited for, and then killed.
        body.unburied = waited_for && !(body.kept && body.unheard);
        let unburied = body.unburied;
        body.process = Process::Down;
        body.link = None;
        (body.fence, body.kept, body.unheard) = (None, false, false);
        body.commits_end();
        body.told = Postgres::Down;
        let name = self.nodes[node.0].name.clone();
        self.say(format_args!("{name}: Postgres is gone: {end:?}"));
        self.standbys_notice_end(node);
        if unburied {
            return self.server_after(node, GUARD_PATIENCE, ServerItem::Buried { run, life, end, checkpoint });
        }
        self.tell_of_end(node, &end, checkpoint);
    }

    pub(super) fn buried(&mut self, node: NodeId, run: u64, life: u64, end: &End, checkpoint: Option<Lsn>) {
        if self.nodes[node.0].life != life
            || self.body(node).run != run
            || !std::mem::take(&mut self.body_mut(node).unburied)
        {
            return;
        }
        if self.nodes[node.0].frozen == Frozen::Guard {
            self.nodes[node.0].frozen = Frozen::No;
        }
        self.tell_of_end(node, end, checkpoint);
    }

    /// The bot hears that every process of the server is gone.
    fn tell_of_end(&mut self, node: NodeId, end: &End, checkpoint: Option<Lsn>) {
        let how = match end {
            End::Clean => "shut down",
            End::Died(how) => how,
        };
        let exited = Event::PostgresExited { how: how.to_owned() };
        if self.rng.chance(500) {
            self.tell_postgres(node, Span::ZERO, exited);
            self.end_job_with_server(node, checkpoint);
        } else {
            self.end_job_with_server(node, checkpoint);
            self.tell_postgres(node, Span::ZERO, exited);
        }
    }

    fn end_job_with_server(&mut self, node: NodeId, shutdown_checkpoint: Option<Lsn>) {
        if let Some(id) = self.end_of(node, |job| matches!(job, Job::Stop { .. })) {
            return self.job_ended(node, id, Ok(JobResult::Stopped { shutdown_checkpoint }));
        }
        let on_server = |job: &Job| match job {
            Job::CreateRoles
            | Job::StartPrimary
            | Job::StartStandby { .. }
            | Job::Follow { .. }
            | Job::Promote { .. }
            | Job::Checkpoint
            | Job::Drain => true,
            Job::Initialize
            | Job::Complete
            | Job::DiscardUnfinished { .. }
            | Job::SetAside { .. }
            | Job::Clone { .. }
            | Job::Stop { .. }
            | Job::Rewind { .. } => false,
        };
        if let Some(id) = self.end_of(node, on_server) {
            self.job_ended(node, id, Err(String::from("the server is gone")));
        }
    }

    /// The bot died, and what it was at with it. The server goes on in its guard's care, unless that was killed, too.
    pub(crate) fn server_loses_bot(&mut self, node: NodeId) {
        self.abandon_job(node);
        let guard_dies = self.rng.chance(200);
        let body = self.body_mut(node);
        (body.told, body.unburied) = (Postgres::Down, false);
        if body.process == Process::Down {
            return;
        }
        if !guard_dies {
            (body.kept, body.unheard) = (true, true);
            return;
        }
        body.ending = true;
        let run = body.run;
        if self.nodes[node.0].frozen == Frozen::Guard {
            self.nodes[node.0].frozen = Frozen::No;
        }
        let delay = self.rng.span(1, ORPHANS_DIE_MS);
        self.server_after(node, delay, ServerItem::Gone { run, end: End::Died("its guard died") });
    }

    /// The bot moves the fence, or says where that of the next server that takes writes shall be.
    pub(super) fn set_fence(&mut self, node: NodeId, at: Time, watchdog: Option<WatchdogOrder>) {
        let at = if self.plant == Some(Plant::FenceTooLate) { at + FENCE_TOO_LATE } else { at };
        let frozen = self.nodes[node.0].frozen;
        let body = self.body_mut(node);
        body.wanted_fence = Some(at);
        if frozen == Frozen::Guard {
            body.unread = Some((at, watchdog));
            return;
        }
        body.device = watchdog.map(|order| order.until);
        if body.process != Process::Down {
            body.fence = Some(at);
            self.arm_guard(node);
        }
    }

    /// The guard moves again: it reads what it was told meanwhile, and then looks at its clock.
    pub(crate) fn guard_moves_again(&mut self, node: NodeId) {
        if let Some((at, watchdog)) = self.body_mut(node).unread.take() {
            self.set_fence(node, at, watchdog);
        }
        self.arm_guard(node);
    }

    fn arm_guard(&mut self, node: NodeId) {
        let (run, fence) = (self.body(node).run, self.body(node).fence);
        if let Some(fence) = fence {
            let at = self.nodes[node.0].clock.global(fence);
            self.at(at, crate::world::Item::Server { node, item: ServerItem::Guard { run } });
        }
    }

    /// The guard looks at its clock.
    pub(super) fn guard_acts(&mut self, node: NodeId, run: u64) {
        let body = self.body(node);
        let due = body.fence.is_some_and(|fence| self.nodes[node.0].clock.local(self.now) >= fence);
        let frozen = self.nodes[node.0].frozen.holds_guard();
        if body.run != run || body.process == Process::Down || !due || frozen || self.plant == Some(Plant::GuardSleeps)
        {
            return;
        }
        self.body_mut(node).ending = true;
        let delay = self.rng.span(1, GUARD_KILLS_MS);
        self.server_after(node, delay, ServerItem::Gone { run, end: End::Died("its guard stopped it") });
    }

    /// A promotion that is cut off may have got as far as removing `standby.signal`, and no further.
    fn promotion_breaks_off(&mut self, node: NodeId) {
        if matches!(self.body(node).process, Process::Up { promoting: true, .. }) && self.rng.chance(300) {
            self.body_mut(node).disk.standby = false;
        }
    }

    pub(crate) fn server_loses_power(&mut self, node: NodeId) {
        self.promotion_breaks_off(node);
        let body = self.body_mut(node);
        body.process = Process::Down;
        body.link = None;
        (body.fence, body.kept, body.closed) = (None, false, None);
        body.commits_end();
        self.standbys_notice_end(node);
    }

    /// A fault: the disk takes no writes of the bot from now on, or does again.
    pub(crate) fn stall_disk(&mut self, node: NodeId, stalled: bool) {
        self.body_mut(node).stalled = stalled;
    }

    /// A fault: the server answers nobody from now on, or does again. What is connected goes on.
    pub(crate) fn silence_server(&mut self, node: NodeId, silent: bool) {
        let body = self.body_mut(node);
        body.silent = silent && matches!(body.process, Process::Up { promoting: false, .. });
    }

    /// A fault: the postmaster dies, with all its children.
    pub(crate) fn crash_server(&mut self, node: NodeId) -> bool {
        let body = self.body_mut(node);
        if !matches!(body.process, Process::Up { .. } | Process::Starting { .. }) || body.ending {
            return false;
        }
        body.ending = true;
        let run = body.run;
        self.server_after(node, Span::ZERO, ServerItem::Gone { run, end: End::Died("signal: 9 (SIGKILL)") });
        true
    }

    /// Whether two servers can talk: the network lets them, and both move.
    pub(super) fn servers_meet(&self, a: NodeId, b: NodeId) -> bool {
        let moves = |node: NodeId| self.nodes[node.0].frozen != Frozen::Machine;
        self.network.peers_meet(a, b) && moves(a) && moves(b)
    }
}

impl PostgresBody {
    /// Whether others can connect to it.
    pub(super) const fn is_open(&self) -> bool {
        matches!(self.process, Process::Up { .. })
    }
}
