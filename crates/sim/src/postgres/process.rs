//! The life of a server's process: starting, opening, promoting, stopping, dying.

use bots_core::{machine::Span, wire::Lsn};
use postgres_bot::machine::{Event, Job, JobResult, Postgres, StopMode};

use super::{PostgresBody, Process, ServerItem};
use crate::{
    check::Seen,
    world::{Frozen, NodeId, World},
};

/// How long a sender waits for a standby that it cannot reach any more (`wal_sender_timeout`).
const SENDER_TIMEOUT: Span = Span::from_secs(5);

/// Without anybody to kill what lingers, the processes of a server that lost its bot take at most this long to die.
const ORPHANS_DIE_MS: u64 = 120;

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
        let body = self.body_mut(node);
        body.run += 1;
        body.process = Process::Starting { primary };
        body.told = Postgres::Starting;
        body.ending = fails;
        body.link = None;
        let run = body.run;
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
        let serial = self.ledger.next_record();
        let body = self.body_mut(node);
        body.process = Process::Up { in_recovery: !primary, promoting: false };
        if primary {
            body.disk.control_timeline = body.disk.wal.timeline();
            body.disk.wal.append(serial, 120);
        }
        let name = self.nodes[node.0].name.clone();
        self.say(format_args!("{name}: Postgres is up, {}", if primary { "writable" } else { "read-only" }));
        if primary {
            self.see(&Seen::Writable { node });
        } else {
            self.server_after(node, Span::from_millis(1), ServerItem::Connect { run });
        }
        let started = |job: &Job| matches!(job, Job::StartPrimary | Job::StartStandby { .. });
        if let Some(id) = self.end_of(node, started)
            && let Some(facts) = self.body(node).facts()
        {
            self.job_ended(node, id, Ok(JobResult::Started(facts)));
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
        self.see(&Seen::Writable { node });
        self.stream_to_standbys(node);
        if let Some(id) = self.end_of(node, |job| matches!(job, Job::Promote { .. }))
            && let Some(server) = self.body(node).facts()
        {
            self.job_ended(node, id, Ok(JobResult::Promoted { server, ancestry }));
        }
    }

    /// The machine asks for a stop, or for a harder one.
    pub(super) fn stop_server(&mut self, node: NodeId, mode: StopMode) {
        let run = self.body(node).run;
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

    /// The process is gone: the bot hears of it, and standbys do.
    pub(super) fn server_gone(&mut self, node: NodeId, run: u64, end: &End) {
        let body = self.body(node);
        if body.run != run || body.process == Process::Down {
            return;
        }
        let mut checkpoint = None;
        if *end == End::Clean && !body.disk.standby {
            let at = body.disk.wal.end();
            let serial = self.ledger.next_record();
            let body = self.body_mut(node);
            body.disk.wal.append(serial, 120);
            body.disk.control_timeline = body.disk.wal.timeline();
            checkpoint = Some(at);
            self.last_words(node);
        }
        self.promotion_breaks_off(node);
        let body = self.body_mut(node);
        body.process = Process::Down;
        body.link = None;
        body.told = Postgres::Down;
        let name = self.nodes[node.0].name.clone();
        self.say(format_args!("{name}: Postgres is gone: {end:?}"));
        self.standbys_notice_end(node);
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
            | Job::Checkpoint => true,
            Job::Initialize
            | Job::Complete
            | Job::DiscardUnfinished
            | Job::SetAside { .. }
            | Job::Clone { .. }
            | Job::Stop { .. }
            | Job::Rewind { .. } => false,
        };
        if let Some(id) = self.end_of(node, on_server) {
            self.job_ended(node, id, Err(String::from("the server is gone")));
        }
    }

    /// The bot died: the postmaster gets the parent-death signal, and jobs do.
    pub(crate) fn server_loses_bot(&mut self, node: NodeId) {
        self.abandon_job(node);
        let body = self.body_mut(node);
        body.told = Postgres::Down;
        if body.process == Process::Down {
            return;
        }
        body.ending = true;
        let run = body.run;
        let delay = self.rng.span(1, ORPHANS_DIE_MS);
        self.server_after(node, delay, ServerItem::Gone { run, end: End::Died("its bot died") });
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
        self.standbys_notice_end(node);
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

    /// The bot stands still: the guard stops the server when the lease that it knows runs out.
    pub(crate) fn guard_takes_over(&mut self, node: NodeId) {
        let n = &self.nodes[node.0];
        let Some(state) = n.postgres_state() else { return };
        let Some(until) = state.membership().valid_until() else { return };
        let at = n.clock.global(until - state.fence_margin());
        let run = self.body(node).run;
        self.at(at, crate::world::Item::Server { node, item: ServerItem::Guard { run } });
    }

    pub(super) fn guard_acts(&mut self, node: NodeId, run: u64) {
        if self.nodes[node.0].frozen == Frozen::Bot && self.body(node).run == run && self.body(node).may_take_writes() {
            self.server_after(node, Span::from_millis(20), ServerItem::Gone { run, end: End::Died("its guard") });
        }
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
