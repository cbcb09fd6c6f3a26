//! The way from the checkpoint of a planned switchover to the stop, where edge bots stand before the primary: they hold new
//! connections, the transactions that run come to their end, and no client loses one. All of it is bounded: an edge that is
//! dead or late costs a moment, never the switchover.

use bots_core::{
    dcs::Revision,
    leadership,
    machine::Span,
    wire::{EdgeStand, Lsn},
};

use super::{
    event::{Action, Job, StopMode},
    phase::{DemoteStep, DemoteWhy, Phase},
    state::{Running, State, Timer},
    turn::{Happened, STOP_PATIENCE, Turn},
    watchdog::WatchdogOrder,
};

/// So long the edges may take to hold new connections. A turn through etcd and the proxy takes a fiftieth of it.
const HOLD_PATIENCE: Span = Span::from_secs(1);

/// So long transactions that run may take to end. Clients that connect wait meanwhile; those who work in longer ones are
/// cut off, as in any stop.
const DRAIN_PATIENCE: Span = Span::from_secs(2);

/// Between two rounds of ending sessions while an edge still sees some: one that logs in shows in no list of the server's.
const DRAIN_AGAIN: Span = Span::from_millis(20);

/// So long the archiver of a primary that is down may take, once the lock is given back. It ends by itself when all is archived, or when
/// `archive_command` has failed a few times; what it does not archive is missing in the archive until this member leads again.
pub(super) const ARCHIVING_MAX: Span = Span::from_secs(600);

/// Where nobody has taken the lock for so many leases, what archives is needed itself: a member that a switchover names has the first go for one,
/// and the others after it.
const LEADERLESS_LEASES: u64 = 3;

impl State {
    /// The server still takes writes on its way to a switchover.
    pub(super) const fn is_about_to_hand_over(&self) -> bool {
        matches!(
            &self.phase,
            Phase::Demoting {
                why: DemoteWhy::Switchover { .. },
                step: DemoteStep::Checkpointing | DemoteStep::Holding | DemoteStep::Draining,
                ..
            }
        )
    }

    /// New connections are not wanted any more.
    pub(super) const fn is_handing_over(&self) -> bool {
        matches!(&self.phase, Phase::Demoting { step: DemoteStep::Holding | DemoteStep::Draining, .. })
    }

    /// The edges before this cluster that have not come as `far` as our term of leading, by the ends of their keys.
    pub(super) fn edges_short_of(&self, far: impl Fn(&EdgeStand) -> Option<Revision>) -> Vec<String> {
        let ours = self.view.get(&self.settings.scope.leader()).map(leadership::generation);
        let prefix = self.settings.scope.edges_prefix();
        let short = self
            .view
            .below(&prefix)
            .filter(|kv| far(&EdgeStand::from_json(&kv.value)).is_none_or(|at| Some(at) != ours));
        short.filter_map(|kv| kv.key.strip_prefix(&prefix).map(str::to_owned)).collect()
    }

    fn has_edges(&self) -> bool {
        self.view.below(&self.settings.scope.edges_prefix()).next().is_some()
    }

    /// What is waited for on the way, for the report.
    pub(super) fn hand_over_waits_for(&self) -> Option<String> {
        let (what, short) = match &self.phase {
            Phase::Demoting { step: DemoteStep::Holding, .. } => {
                ("to hold new connections", self.edges_short_of(|stand| stand.holds))
            }
            Phase::Demoting { step: DemoteStep::Draining, .. } => {
                ("to have no session left", self.edges_short_of(|stand| stand.drained))
            }
            Phase::Demoting { step: DemoteStep::Yielding, .. } if self.is_closed() => {
                return Some(String::from("its archiver to end"));
            }
            _any_other => return None,
        };
        let edges = (!short.is_empty()).then(|| format!("{} {what}", short.join(", ")));
        Some(edges.unwrap_or_else(|| String::from("transactions to end")))
    }
}

impl Turn {
    /// After the checkpoint: straight to the stop, unless edges can be asked to hold new connections.
    pub(super) fn hand_over(&mut self) {
        if self.s.has_edges() {
            self.demote_step(DemoteStep::Holding, None);
            self.s.timers.arm(Timer::Patience, self.now + HOLD_PATIENCE);
        } else {
            self.stop_to_hand_over();
        }
    }

    /// On the way: all waits are for facts in etcd and for a job, and all have an end.
    pub(super) fn drive_handover(&mut self, happened: &Happened, step: DemoteStep) {
        match happened {
            Happened::Exited { how } => return self.crashed(how),
            Happened::Due(Timer::Patience) if step == DemoteStep::Holding => return self.drain(),
            Happened::Due(Timer::Patience) => return self.stop_to_hand_over(),
            Happened::Due(Timer::Retry) => self.run(Job::Drain),
            Happened::JobEnded { .. }
            | Happened::Nothing
            | Happened::Observed
            | Happened::Probed { .. }
            | Happened::Answered { .. }
            | Happened::Due(_) => {}
        }
        if step == DemoteStep::Holding {
            if self.s.edges_short_of(|stand| stand.holds).is_empty() {
                self.drain();
            }
        } else if self.s.job.is_none() {
            if self.s.edges_short_of(|stand| stand.drained).is_empty() {
                self.stop_to_hand_over();
            } else if self.s.timers.armed(Timer::Retry).is_none() {
                self.s.timers.arm(Timer::Retry, self.now + DRAIN_AGAIN);
            }
        }
    }

    fn drain(&mut self) {
        self.demote_step(DemoteStep::Draining, None);
        self.s.timers.arm(Timer::Patience, self.now + DRAIN_PATIENCE);
        self.run(Job::Drain);
    }

    /// A primary that goes down has said its last word: the lock need not wait for its archiver, however much that has to do.
    pub(super) fn closed(&mut self, shutdown_checkpoint: Lsn) {
        let stops = |running: &&mut Running| running.job == Job::Stop { mode: StopMode::Fast };
        let Some(running) = self.s.job.as_mut().filter(stops) else { return };
        match &mut self.s.phase {
            Phase::Demoting { step, shutdown_checkpoint: last, .. } => {
                (*step, *last) = (DemoteStep::Yielding, Some(shutdown_checkpoint));
            }
            Phase::Stopping { checkpoint, .. } => *checkpoint = Some(shutdown_checkpoint),
            // What is not given away is waited for as before.
            _any_other => return,
        }
        running.closed = true;
        let until = self.now + ARCHIVING_MAX;
        self.s.timers.arm(Timer::Patience, until);
        self.s.fence_set = Some(until);
        // The device acts after the guard, as ever.
        let device_at = until + self.s.guard_margin().divided_by(2);
        let watchdog = self.s.watchdog_order().map(|order| WatchdogOrder { until: device_at, ..order });
        self.out.push(Action::SetFence { at: until, watchdog });
    }

    /// The lock is given back, and what is left of the server archives: for as long as there is another to lead.
    pub(super) fn mind_archiver(&mut self, happened: &Happened) {
        if !self.s.is_closed() || self.s.leader().is_some() || !self.s.view.is_watched() {
            self.s.timers.disarm(Timer::Retry);
        } else if matches!(happened, Happened::Due(Timer::Retry)) {
            let mode = self.stop_at_once();
            self.run(Job::Stop { mode });
        } else if self.s.timers.armed(Timer::Retry).is_none() {
            self.s.timers.arm(Timer::Retry, self.now + self.s.dynamic.ttl.times(LEADERLESS_LEASES));
        }
    }

    fn stop_to_hand_over(&mut self) {
        self.demote_step(DemoteStep::Stopping, None);
        self.s.timers.disarm(Timer::Retry);
        self.s.timers.arm(Timer::Patience, self.now + STOP_PATIENCE);
        self.run(Job::Stop { mode: StopMode::Fast });
    }
}
