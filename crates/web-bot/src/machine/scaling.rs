//! Scaling: the leader's sub-machine that keeps as many load messages posted as the load asks for.
//!
//! Up at once on the newest figures; down only after a whole stable window of lower desire, one slot at a time, the
//! highest first, each after the last has drained. Messages that nobody has claimed yet count as capacity, so that slow
//! starters do not call for ever more. The count lives in the store: a new leader takes it from there and does not lower
//! it before it has watched for a whole window. Every change is refused once the lock is another's (S3), and counts against
//! the hour's budget (`budget`).

use std::collections::VecDeque;

use bots_core::{
    dcs::{Compare, DcsAction, Outcome, RequestId, Revision, Scope, Transaction, Write},
    leadership::{Fence, Leadership},
    machine::{Deadline, Time},
    membership::{Membership, RETRY_AFTER},
    wire::LoadMessage,
};
use serde::Serialize;

use super::{
    Action,
    board::Board,
    budget::{ACTIONS_PER_HOUR_MAX, Budget},
    settings::ScalingSettings,
};

/// How many slots may go within one stable window, once load has been lower for a whole one.
pub const SCALE_INS_PER_WINDOW: u64 = 3;

/// How many slots one change may post or withdraw. etcd takes 128 operations in a transaction (`--max-txn-ops`) and refuses more
/// for ever; what the change demands and records besides needs a few of them. What is left follows with the next change.
pub const SLOTS_PER_CHANGE_MAX: usize = 100;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
enum Phase {
    Watching,
    /// A change is under way.
    Asking {
        request: RequestId,
    },
    /// A change was made: wait until the view shows it.
    Catching {
        revision: Revision,
    },
    /// The answer was lost or the change refused: look again a little later.
    Pausing {
        until: Time,
    },
}

/// The sub-machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Scaling {
    scope: Scope,
    leading_since: Option<Time>,
    /// When the database last failed over.
    frozen_at: Option<Time>,
    phase: Phase,
    /// What the newest figures ask for.
    desired: u32,
    /// Higher wishes of before, highest first, each with the moment at which it ended.
    higher: VecDeque<(u32, Time)>,
    /// When this leader lowered the count last.
    lowered_at: Option<Time>,
    /// The hour's budget is used up.
    is_spent: bool,
    /// A bot would be sent to rest if the budget were not kept for rises.
    stays_large: bool,
    /// Load asks for more, if it is load.
    doubts: bool,
    total_milli: u64,
}

/// What the scaler looks at.
pub(super) struct Figures<'v> {
    pub(super) now: Time,
    pub(super) unix_ms: u64,
    pub(super) board: &'v Board,
    pub(super) view: Revision,
    /// Requests in flight over all serving bots, in thousandths.
    pub(super) total_milli: u64,
    pub(super) settings: ScalingSettings,
    pub(super) budget: Budget,
    /// The database fails over: what looks like load may be requests that wait for it.
    pub(super) frozen: bool,
    /// The database is known to answer, so that requests do not wait for it.
    pub(super) database_answers: bool,
}

impl Scaling {
    pub(super) const fn new(scope: Scope) -> Self {
        Self {
            scope,
            leading_since: None,
            frozen_at: None,
            phase: Phase::Watching,
            desired: 0,
            higher: VecDeque::new(),
            lowered_at: None,
            is_spent: false,
            stays_large: false,
            doubts: false,
            total_milli: 0,
        }
    }

    /// The lock is ours: from now on we watch. What we remember from an earlier term is no longer true.
    pub(super) fn begin(&mut self, now: Time) {
        *self = Self { leading_since: Some(now), ..Self::new(self.scope.clone()) };
    }

    /// The lock is gone.
    pub(super) fn end(&mut self) {
        self.leading_since = None;
        self.phase = Phase::Watching;
    }

    /// Takes in the answer to a transaction, if it is ours.
    pub(super) fn answered(&mut self, now: Time, id: RequestId, outcome: &Outcome) {
        if self.phase != (Phase::Asking { request: id }) {
            return;
        }
        self.phase = match outcome {
            Outcome::Done(revision) => Phase::Catching { revision: *revision },
            Outcome::Refused { .. } | Outcome::Unknown(_) => Phase::Pausing { until: now + RETRY_AFTER },
        };
    }

    /// Takes in the newest figures and makes at most one change.
    pub(super) fn advance(
        &mut self,
        figures: &Figures<'_>,
        fence: Fence,
        leadership: &Leadership,
        membership: &mut Membership,
        out: &mut Vec<Action>,
    ) {
        self.note(figures);
        match self.phase {
            Phase::Asking { .. } => return,
            Phase::Catching { revision } if figures.view < revision => return,
            Phase::Pausing { until } if figures.now < until => return,
            Phase::Watching | Phase::Catching { .. } | Phase::Pausing { .. } => self.phase = Phase::Watching,
        }
        self.doubts = self.wants_more(figures) && !figures.database_answers;
        let Some((mut compare, mut then)) = self.change(figures, membership.name()) else { return };
        let lowers = then.iter().any(|w| matches!(w, Write::Delete { .. }));
        let forced = figures.board.posted().any(|slot| slot >= figures.settings.max);
        let (unspent, record) = figures.budget.spend(lowers, forced);
        compare.push(unspent);
        compare.extend(leadership.guard(fence));
        then.push(record);
        let request = membership.next_request();
        self.lowered_at = if lowers { Some(figures.now) } else { self.lowered_at };
        self.phase = Phase::Asking { request };
        out.push(Action::Dcs(DcsAction::Transact { id: request, transaction: Transaction::new(compare, then) }));
    }

    /// Keeps the record of wishes: a wish counts until it ended plus one stable window. Only wishes above the present one
    /// matter, so the record holds at most one entry a count.
    fn note(&mut self, figures: &Figures<'_>) {
        self.is_spent = !figures.budget.may_act();
        (self.doubts, self.stays_large) = (false, false);
        if figures.frozen {
            self.frozen_at = Some(figures.now);
            return;
        }
        let desired = figures.settings.desired(figures.total_milli);
        if desired < self.desired {
            while self.higher.back().is_some_and(|(d, _)| *d <= self.desired) {
                self.higher.pop_back();
            }
            self.higher.push_back((self.desired, figures.now));
        }
        self.desired = desired;
        self.total_milli = figures.total_milli;
        let window = figures.settings.stable_window();
        while self.higher.front().is_some_and(|(d, ended)| *d <= desired || *ended + window <= figures.now) {
            self.higher.pop_front();
        }
        while self.higher.back().is_some_and(|(d, _)| *d <= desired) {
            self.higher.pop_back();
        }
        let count = u32::try_from(figures.board.posted().count()).unwrap_or(u32::MAX);
        let due = self.scale_in_due(figures, count).is_some_and(|due| due <= figures.now);
        self.stays_large = due && !figures.budget.may_scale_in();
    }

    /// The change to make now, if there is one: its own conditions and its writes.
    fn change(&self, figures: &Figures<'_>, me: &str) -> Option<(Vec<Compare>, Vec<Write>)> {
        if figures.frozen {
            return None;
        }
        let max = figures.settings.max;
        let posted: Vec<u32> = figures.board.posted().filter(|slot| *slot < max).collect();
        let beyond: Vec<u32> = figures.board.posted().filter(|slot| *slot >= max).collect();
        let count = u32::try_from(posted.len()).unwrap_or(u32::MAX);
        if !beyond.is_empty() {
            let withdrawn = beyond.iter().rev().take(SLOTS_PER_CHANGE_MAX).map(|slot| self.withdraw(*slot));
            // An operator's maximum, or what the database has connections for: not to be put off.
            return Some((Vec::new(), withdrawn.collect()));
        }
        let sure = if self.doubts { self.desired.min(figures.settings.min.max(1)) } else { self.desired };
        if sure > count {
            let missing = (0..max).filter(|slot| !posted.contains(slot));
            let doubles = figures.budget.runs_short() && !self.doubts;
            let more = if doubles { count.max(sure - count) } else { sure - count };
            let wanted = usize::try_from(more).unwrap_or(0).min(SLOTS_PER_CHANGE_MAX);
            let slots: Vec<u32> = missing.take(wanted).collect();
            let absent = slots.iter().map(|slot| Compare::Absent(self.scope.load(*slot))).collect();
            let message = self.message(figures, count, me);
            let posts = slots.iter().map(|slot| Write::put(self.scope.load(*slot), message.clone())).collect();
            return figures.budget.may_act().then_some((absent, posts));
        }
        let due = self.scale_in_due(figures, count)?;
        let highest = *posted.last()?;
        (due <= figures.now && figures.budget.may_scale_in()).then(|| (Vec::new(), vec![self.withdraw(highest)]))
    }

    /// Whether load asks for more bots than there always are: somebody has to serve in any case.
    fn wants_more(&self, figures: &Figures<'_>) -> bool {
        let count = u32::try_from(figures.board.posted().count()).unwrap_or(u32::MAX);
        !figures.frozen && self.desired > count.max(figures.settings.min.max(1))
    }

    /// Whether it has to be known whether the database answers.
    pub(super) const fn doubts(&self) -> bool {
        self.doubts
    }

    fn withdraw(&self, slot: u32) -> Write {
        Write::delete(self.scope.load(slot))
    }

    fn message(&self, figures: &Figures<'_>, posted: u32, me: &str) -> String {
        let reason = format!(
            "{} requests in flight at {} a bot: bots wanted: {}, asked for so far: {posted}",
            thousandths(self.total_milli),
            figures.settings.target_in_flight,
            self.desired,
        );
        let message = LoadMessage { reason, posted_by: me.to_owned(), posted_unix_ms: figures.unix_ms };
        serde_json::to_string(&message).unwrap_or_default()
    }

    /// When the count may fall by one; nothing as long as load asks for it, or the last one still drains.
    fn scale_in_due(&self, figures: &Figures<'_>, count: u32) -> Option<Time> {
        let window = figures.settings.stable_window();
        let since = self.leading_since?;
        if self.desired >= count || figures.board.leaving().next().is_some() {
            return None;
        }
        let wished = self.higher.iter().filter(|(d, _)| *d >= count).map(|(_, ended)| *ended + window).max();
        let spaced = self.lowered_at.map(|at| at + window.divided_by(SCALE_INS_PER_WINDOW));
        let calm = self.frozen_at.map(|at| at + window);
        [Some(since + window), wished, spaced, calm].into_iter().flatten().max()
    }

    /// When the sub-machine wants a step of its own accord.
    pub(super) fn deadline(&self, figures: &Figures<'_>) -> Option<Deadline> {
        self.leading_since?;
        let due = |at, reason: &str| Some(Deadline { at, reason: reason.to_owned() });
        match self.phase {
            Phase::Asking { .. } => None,
            Phase::Catching { revision } if figures.view < revision => None,
            Phase::Pausing { until } => due(until, "look at the load again"),
            Phase::Watching | Phase::Catching { .. } => {
                let count = u32::try_from(figures.board.posted().count()).unwrap_or(u32::MAX);
                let at = self.scale_in_due(figures, count)?;
                if figures.budget.may_scale_in() {
                    return due(at, "send one bot to rest if load stays low");
                }
                let eased = figures.now + figures.budget.eases_in();
                due(at.max(eased), "the hour's budget of scaling actions is used up")
            }
        }
    }

    /// What the scaler wants and why, for the report.
    pub(super) fn reasoning(&self) -> String {
        format!("{} requests in flight over the fleet, bots wanted: {}", thousandths(self.total_milli), self.desired)
    }

    /// Trouble that an operator should know of.
    pub(super) fn trouble(&self) -> Option<String> {
        self.leading_since?;
        if self.is_spent {
            return Some(format!(
                "{ACTIONS_PER_HOUR_MAX} scaling actions within an hour: no more before the oldest is an hour old; \
                 look for what makes load messages come and go"
            ));
        }
        self.stays_large.then(|| {
            String::from(
                "so many scaling actions within an hour that what is left of them is for more load: no bot is sent to rest before the \
                 oldest is an hour old; look for what makes load come and go, or make scaling.stable_window_s longer",
            )
        })
    }

    /// The record of wishes is in order.
    pub(super) fn invariants(&self) -> Result<(), String> {
        let falling = self.higher.iter().zip(self.higher.iter().skip(1)).all(|((a, _), (b, _))| a > b);
        if !falling {
            return Err(format!("the record of wishes is not in order: {:?}", self.higher));
        }
        Ok(())
    }
}

fn thousandths(milli: u64) -> String {
    format!("{}.{}", milli / 1_000, milli % 1_000 / 100)
}
