//! When a server that may accept writes must be stopped: the lease, the word of members and the margins between them and the
//! guard. Who stops it is not here.

use bots_core::machine::{Span, Time};

use super::{
    event::{Job, StopMode},
    phase::{DemoteStep, DemoteWhy, Phase, Recovery},
    postgres::{DataDir, Postgres, Running as Runs},
    state::{Running, State, Timer},
    turn::{DYING_MAX, KILL_AFTER_MAX},
};

/// For a server whose guard should have killed it: there is no time for less.
pub(super) const KILL: StopMode = StopMode::Immediate { kill_after: Span::ZERO };

/// Why a server that was kept is stopped.
pub(super) const EARLIER_LEASE_ENDS: &str = "the lease of this bot's earlier life ends";

impl State {
    /// Whether a server that this bot started may accept writes by what it was told to do.
    pub(super) const fn may_be_writable(&self) -> bool {
        if self.is_closed() {
            return false;
        }
        match &self.phase {
            Phase::Promoting { .. }
            | Phase::Primary(_)
            | Phase::Recovering { step: Recovery::Starting | Recovery::Adopting } => true,
            Phase::Restarting { primary, .. } => *primary,
            Phase::Demoting { why, step, .. } => {
                !matches!(why, DemoteWhy::Fenced(_)) && !matches!(step, DemoteStep::Yielding)
            }
            Phase::Stopping { writable, .. } => {
                *writable || matches!(&self.postgres, Postgres::Up(s) if !s.in_recovery)
            }
            Phase::Initializing
            | Phase::Waiting
            | Phase::Bootstrapping(_)
            | Phase::Cloning { .. }
            | Phase::Starting { .. }
            | Phase::Replica { .. }
            | Phase::Candidate(_)
            | Phase::Recovering { step: Recovery::Reclaiming }
            | Phase::Rejoining { .. } => false,
        }
    }

    /// A primary's server is down but for its archiver.
    pub(super) const fn is_closed(&self) -> bool {
        matches!(&self.job, Some(Running { closed: true, .. }))
    }

    /// When a server that may accept writes must be stopped unless the lease is renewed before.
    pub(super) fn fence_at(&self) -> Option<Time> {
        if !self.may_be_writable() || self.postgres == Postgres::Down && self.job.is_none() {
            return None;
        }
        if self.is_stopping_at_once() {
            return None;
        }
        let by_lease = self.lease_ends();
        Some(match self.word_ends() {
            None => by_lease,
            Some(by_word) if self.leadership.is_held() => by_lease.max(by_word),
            // The lease that we have now, if we have one, does not hold the lock.
            Some(by_word) => by_word,
        })
    }

    /// When a server that an earlier life of this bot has left running must be gone, as long as this life has set no fence for it: its
    /// guard stops it then, and if that stands still, this bot must.
    fn kept_fence(&self) -> Option<Time> {
        let running = match self.data.as_ref()? {
            DataDir::Present { running, .. } | DataDir::Unfinished { running, .. } => running,
            DataDir::Empty => return None,
        };
        let (Runs::Guarded { fence } | Runs::LeftBehind { fence }) = running else { return None };
        let has_its_own = self.fence_set.is_some_and(|at| at > Time::ZERO);
        fence.filter(|_| !has_its_own && !self.is_foreign())
    }

    /// The same, while it is not being stopped already.
    pub(super) fn kept_until(&self) -> Option<Time> {
        let waits = self.is_stopping_at_once() || self.timers.armed(Timer::Retry).is_some();
        self.kept_fence().filter(|_| !waits)
    }

    /// How long a server that is stopped at once has to go by itself; one that was kept, until its fence at the most.
    pub(super) fn grace(&self, now: Time) -> Span {
        let grace = self.fence_margin().divided_by(2).min(KILL_AFTER_MAX);
        self.kept_fence().map_or(grace, |fence| grace.min(fence.since(now)))
    }

    /// The server is being stopped, by force if need be.
    pub(super) const fn is_stopping_at_once(&self) -> bool {
        matches!(&self.job, Some(Running { job: Job::Stop { mode: StopMode::Immediate { .. } }, .. }))
    }

    /// When a server that is being killed under the lock will have been at it for too long.
    pub(super) fn dies_until(&self) -> Option<Time> {
        match &self.job {
            Some(Running { job: Job::Stop { mode: StopMode::Immediate { kill_after } }, since, .. })
                if self.leadership.is_held() =>
            {
                Some(*since + *kill_after + DYING_MAX)
            }
            Some(_) | None => None,
        }
    }

    /// The server's processes have been killed, and do not go: none of them takes a write any more, and the lock that was theirs
    /// goes to others with the lease.
    pub(super) fn will_not_die(&self, now: Time) -> bool {
        self.dies_until().is_some_and(|until| until <= now)
    }

    /// The end of the lease, as far as anything may be begun under it: what is not stopped by then is stopped by force.
    pub(super) fn lease_ends(&self) -> Time {
        self.membership.valid_until().unwrap_or(Time::ZERO) - self.fence_margin()
    }

    /// The lease lives, and the fence is not about to fall.
    pub(super) fn has_ample_lease(&self, now: Time) -> bool {
        now < self.lease_ends() && self.membership.lease(now).is_some()
    }

    /// The lock is held, and the fence is not about to fall: a server may be made writable.
    pub(super) fn may_use_lock(&self, now: Time) -> bool {
        self.has_ample_lease(now) && self.leadership.fence(now, &self.membership).is_some()
    }

    /// Whether nothing hangs on the lease but our place among the members: a replica whose leader lives, once the dust of a
    /// failover has settled. Its death is seen by who streams to it and by who connects to it. Nothing where it does not matter.
    pub(super) fn rests(&self, now: Time) -> Option<bool> {
        match &self.phase {
            // With its lease, a promise would go.
            Phase::Replica { .. } if self.is_bound() => None,
            Phase::Replica { .. } => {
                let led = self.leader().is_some_and(|leader| leader != self.settings.name);
                let settled = self.membership.is_resting() || now.since(self.since) >= self.dynamic.ttl;
                Some(led && settled)
            }
            Phase::Restarting { primary, .. } => (*primary).then_some(false),
            // No lock is asked for from here.
            Phase::Cloning { .. } | Phase::Starting { .. } | Phase::Rejoining { .. } | Phase::Stopping { .. } => None,
            Phase::Initializing
            | Phase::Waiting
            | Phase::Bootstrapping(_)
            | Phase::Candidate(_)
            | Phase::Promoting { .. }
            | Phase::Primary(_)
            | Phase::Recovering { .. }
            | Phase::Demoting { .. } => Some(false),
        }
    }

    /// Before the fence falls, this much of the lease is left: what stopping Postgres may take, and any drift of clocks.
    #[must_use]
    pub fn fence_margin(&self) -> Span {
        self.membership.lease_ttl().divided_by(5)
    }

    /// The guard acts this long before the lease may have run out: what killing a server may take on a busy machine, and
    /// any drift of clocks. Half of [`Self::fence_margin`], so that a bot that lives acts first, and more gently.
    #[must_use]
    pub fn guard_margin(&self) -> Span {
        self.fence_margin().divided_by(2)
    }

    /// Where the guard's fence belongs as long as this server may take writes.
    pub(super) fn guard_at(&self) -> Time {
        let by_lease = self.membership.valid_until().unwrap_or(Time::ZERO) - self.guard_margin();
        match self.guard_by_word() {
            None => by_lease,
            Some(by_word) if self.leadership.is_held() => by_lease.max(by_word),
            Some(by_word) => by_word,
        }
    }
}
