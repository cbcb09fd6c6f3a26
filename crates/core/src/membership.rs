//! Membership: the sub-machine by which every bot gets a lease, takes its name and shares its state (rule 3).
//!
//! Pure. It owns the answer to "is my lease still good?", which every step under a lock must ask.

mod pace;

use serde::{Deserialize, Serialize};

use self::pace::NOT_RENEWED;
pub use self::pace::{is_paced_for_lock, renewal, renewal_at_rest, renewal_under_lock, resting_ttl};
use crate::{
    dcs::{
        Compare, DcsAction, DcsEvent, KeyValue, LeaseId, Outcome, RequestId, Revision, Scope, Transaction, View, Write,
    },
    machine::{Deadline, Span, Time},
    wire::MemberHead,
};

/// How long to wait before asking again for what the store did not answer. Short beside any lease, long beside a
/// round trip.
pub const RETRY_AFTER: Span = Span::from_millis(500);

/// Soft changes (load, positions) are shared at most this often, so that a busy bot does not become a busy store.
pub const SOFT_PUBLISH_INTERVAL: Span = Span::from_millis(1_000);

/// What membership asks of the shell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MembershipAction {
    /// Ask the store.
    Dcs(DcsAction),
    /// Ask the bot that seems to hold our name who it is, within a short deadline. Answered by
    /// [`MembershipEvent::NameProbed`].
    ProbeName {
        /// The `api_url` in the member key that stands in our place.
        api_url: String,
    },
}

/// What membership is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MembershipEvent {
    /// From the store.
    Dcs(DcsEvent),
    /// The instance of our scope and name that answered at the probed address, or `None` if no such bot did.
    NameProbed {
        /// Its `instance`.
        instance: Option<String>,
    },
}

/// A change that the machine around must know of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MembershipChange {
    /// The member key is ours, under a fresh lease.
    Joined,
    /// The lease is gone: every lock under it is, too.
    Lost(String),
    /// Another live process uses our name: we must not run.
    Duplicate {
        /// Where it answers.
        api_url: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
enum Session {
    None,
    Held {
        lease: LeaseId,
        valid_until: Time,
        /// Its length.
        ttl: Span,
        /// It is a long one, for a member that rests: no lock is to hang on it.
        resting: bool,
    },
    /// It was given back for good.
    Left,
}

/// A lease that was asked for and is not granted yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Grant {
    ttl: Span,
    resting: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
enum Registration {
    Absent {
        retry_at: Option<Time>,
    },
    Probing {
        found: KeyValue,
    },
    Writing {
        request: RequestId,
        value: String,
        under: LeaseId,
        since: Time,
    },
    Registered {
        /// When our value came to stand there. The next one is written only over this one, so that a write whose answer was
        /// lost cannot come back over a newer one.
        modified: Revision,
        /// The lease that it hangs on.
        under: LeaseId,
    },
    Duplicate,
}

/// The sub-machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Membership {
    scope: Scope,
    name: String,
    instance: String,
    ttl: Span,
    session: Session,
    /// The lease that is asked for, beside the present one or in its place.
    grant: Option<Grant>,
    /// The lease whose place the present one has taken. It is given back once our key hangs on the present one.
    former: Option<LeaseId>,
    /// Nothing but our place among the members hangs on the lease, and nobody waits for that.
    rests: bool,
    /// A lock hangs on the lease, and with it more than our own place.
    holds_lock: bool,
    /// The lease shall run out: what hangs on it must go, and cannot be given back.
    lapses: bool,
    /// How often the present lease is renewed.
    pace: Span,
    registration: Registration,
    joined: bool,
    wanted: Option<String>,
    soft: Option<String>,
    soft_due: Time,
    published: Option<String>,
    requests: u64,
}

impl Membership {
    /// A bot called `name` in `scope`. `instance` tells this process from any other of the same name; `ttl` is the
    /// length of its lease.
    #[must_use]
    pub fn new(scope: Scope, name: impl Into<String>, instance: impl Into<String>, ttl: Span) -> Self {
        Self {
            scope,
            name: name.into(),
            instance: instance.into(),
            ttl,
            session: Session::None,
            grant: None,
            former: None,
            rests: false,
            holds_lock: false,
            lapses: false,
            pace: renewal(ttl),
            registration: Registration::Absent { retry_at: None },
            joined: false,
            wanted: None,
            soft: None,
            soft_due: Time::ZERO,
            published: None,
            requests: 0,
        }
    }

    /// The scope.
    #[must_use]
    pub const fn scope(&self) -> &Scope {
        &self.scope
    }

    /// The bot's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What tells this process from any other of the same name.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// The length of a lease on which a lock may hang.
    #[must_use]
    pub const fn ttl(&self) -> Span {
        self.ttl
    }

    /// The length of the present lease, or of the one that is asked for: margins that must fit into it are taken from this, not
    /// from [`Self::ttl`].
    #[must_use]
    pub fn lease_ttl(&self) -> Span {
        match self.session {
            Session::Held { ttl, .. } => ttl,
            Session::None | Session::Left => self.grant.map_or(self.ttl, |grant| grant.ttl),
        }
    }

    /// Whether the present lease is the long one of a member that rests. Who asks for a lock under it would, when it is lost,
    /// be missed late: first call [`Self::rest`] with `false`, and wait for the grant.
    #[must_use]
    pub const fn is_resting(&self) -> bool {
        matches!(self.session, Session::Held { resting: true, .. })
    }

    /// Changes the length of the next lease; the present one keeps its own. One with a lock on it keeps it until the lock changes
    /// hands, which [`Self::trouble`] tells.
    pub const fn set_ttl(&mut self, ttl: Span) {
        self.ttl = ttl;
    }

    /// Says whether a lock hangs on the lease whose loss would stop a service: such a lease is renewed more often.
    pub fn hold_lock(&mut self, holds_lock: bool, out: &mut Vec<MembershipAction>) {
        self.holds_lock = holds_lock;
        self.pace(out);
    }

    /// Says whether the lease shall run out, though the store answers: what hangs on it must go, and cannot be given back in good
    /// order. When it is said no more, a lease that has run out is lost, and another is asked for.
    pub fn lapse(&mut self, lapses: bool, out: &mut Vec<MembershipAction>) {
        self.lapses = lapses;
        self.pace(out);
    }

    /// Whether the lease is being left to run out.
    #[must_use]
    pub const fn is_lapsing(&self) -> bool {
        self.lapses
    }

    /// Says whether nothing but our own place among the members hangs on the lease, and nobody waits for that place to fall
    /// free: then a long lease takes the place of the short one, and the other way round. The member key moves over, and any
    /// other key that hangs on the lease is lost with it, when [`Self::advance`] is called next; with a lock, or a question about one, it stays as it is.
    pub fn rest(&mut self, now: Time, rests: bool, out: &mut Vec<MembershipAction>) {
        self.rests = rests && !self.holds_lock;
        self.advance(now, out);
    }

    /// Asks for the lease that there should be, if it is another than there is.
    fn exchange(&mut self, out: &mut Vec<MembershipAction>) {
        let due = match self.session {
            Session::None => self.registration != Registration::Duplicate,
            // One exchange after the other.
            Session::Held { resting, .. } => resting != self.rests && self.former.is_none() && !self.holds_lock,
            Session::Left => false,
        };
        if !due || self.grant.is_some() {
            return;
        }
        let ttl = if self.rests { resting_ttl(self.ttl) } else { self.ttl };
        self.grant = Some(Grant { ttl, resting: self.rests });
        out.push(MembershipAction::Dcs(DcsAction::GrantLease { ttl }));
    }

    fn pace(&mut self, out: &mut Vec<MembershipAction>) {
        let Session::Held { lease, ttl, resting, .. } = self.session else { return };
        let every = match (self.holds_lock, resting) {
            _any if self.lapses => NOT_RENEWED,
            (true, _) => renewal_under_lock(ttl),
            (false, true) => renewal_at_rest(ttl),
            (false, false) => renewal(ttl),
        };
        if every != self.pace {
            self.pace = every;
            out.push(MembershipAction::Dcs(DcsAction::PaceLease { lease, every }));
        }
    }

    /// The lease, if it is sure to live at `now`. Whoever acts under a lock asks this first (S6).
    #[must_use]
    pub fn lease(&self, now: Time) -> Option<LeaseId> {
        match self.session {
            Session::Held { lease, valid_until, .. } if now < valid_until => Some(lease),
            Session::Held { .. } | Session::None | Session::Left => None,
        }
    }

    /// Until when the lease is sure to live; nothing if there is none.
    #[must_use]
    pub const fn valid_until(&self) -> Option<Time> {
        match self.session {
            Session::Held { valid_until, .. } => Some(valid_until),
            Session::None | Session::Left => None,
        }
    }

    /// The lease that we last held and have not heard to be lost, whether or not it is still sure to live.
    #[must_use]
    pub const fn lease_id(&self) -> Option<LeaseId> {
        match self.session {
            Session::Held { lease, .. } => Some(lease),
            Session::None | Session::Left => None,
        }
    }

    /// Whether the member key is ours.
    #[must_use]
    pub const fn is_registered(&self) -> bool {
        matches!(self.registration, Registration::Registered { .. } | Registration::Writing { .. }) && self.joined
    }

    /// Takes the next request number; all of a machine's requests come from here.
    pub fn next_request(&mut self) -> RequestId {
        RequestId::next(&mut self.requests)
    }

    /// Says what the member key shall hold, at once. `value` must carry [`MemberHead::instance`].
    pub fn publish(&mut self, now: Time, value: String, out: &mut Vec<MembershipAction>) {
        self.soft = None;
        if self.wanted.as_ref() != Some(&value) {
            self.wanted = Some(value);
        }
        self.advance(now, out);
    }

    /// Says what the member key shall hold, within [`SOFT_PUBLISH_INTERVAL`]: for figures that change all the time.
    pub fn publish_soft(&mut self, now: Time, value: String, out: &mut Vec<MembershipAction>) {
        if self.wanted.as_ref() != Some(&value) {
            self.soft = Some(value);
        } else {
            self.soft = None;
        }
        self.advance(now, out);
    }

    /// Takes in an event that the view has already seen.
    pub fn on_event(
        &mut self,
        now: Time,
        event: &MembershipEvent,
        view: &View,
        out: &mut Vec<MembershipAction>,
    ) -> Option<MembershipChange> {
        let change = match event {
            MembershipEvent::Dcs(DcsEvent::LeaseGranted { lease, valid_until }) => {
                self.granted(*lease, *valid_until, out);
                if self.former.is_some() {
                    // Whoever waits for this lease asks first: the key moves when the step is done, by `advance`.
                    return None;
                }
                None
            }
            MembershipEvent::Dcs(DcsEvent::LeaseRenewed { lease, valid_until }) => {
                if let Session::Held { lease: mine, valid_until: until, .. } = &mut self.session
                    && mine == lease
                {
                    *until = (*until).max(*valid_until);
                }
                None
            }
            MembershipEvent::Dcs(DcsEvent::LeaseLost { lease, why }) => self.lost(*lease, why, out),
            MembershipEvent::Dcs(DcsEvent::Answered { id, outcome }) => self.answered(now, *id, outcome, out),
            MembershipEvent::Dcs(DcsEvent::Listed { .. } | DcsEvent::Changed { .. } | DcsEvent::WatchLost { .. }) => {
                self.check_view(view);
                None
            }
            MembershipEvent::NameProbed { instance } => self.probed(now, instance.as_deref(), out),
        };
        self.advance(now, out);
        change
    }

    /// Lets time pass: asks for a lease, registers, publishes, retries; whatever is due.
    pub fn advance(&mut self, now: Time, out: &mut Vec<MembershipAction>) {
        self.exchange(out);
        if now >= self.soft_due
            && let Some(soft) = self.soft.take()
        {
            self.wanted = Some(soft);
            self.soft_due = now + SOFT_PUBLISH_INTERVAL;
        }
        let (Some(lease), Some(wanted)) = (self.lease(now), self.wanted.clone()) else {
            if let Registration::Absent { retry_at } = &mut self.registration {
                // There is nothing to try until the lease is renewed or granted, and that is an event.
                retry_at.take_if(|at| *at <= now);
            }
            return;
        };
        let key = self.scope.member(&self.name);
        match &self.registration {
            Registration::Absent { retry_at } if retry_at.is_none_or(|at| at <= now) => {
                self.write(now, vec![Compare::Absent(key)], wanted, lease, out);
            }
            Registration::Registered { modified, under }
                if self.published.as_ref() != Some(&wanted) || *under != lease =>
            {
                let unchanged = vec![Compare::LeaseIs(key.clone(), *under), Compare::ModifiedAt(key, *modified)];
                self.write(now, unchanged, wanted, lease, out);
            }
            Registration::Absent { .. }
            | Registration::Registered { .. }
            | Registration::Probing { .. }
            | Registration::Writing { .. }
            | Registration::Duplicate => {}
        }
    }

    /// Gives the lease back, and with it the member key and every lock. For a clean goodbye.
    pub fn leave(&mut self, out: &mut Vec<MembershipAction>) {
        if let Session::Held { lease, .. } = self.session {
            out.push(MembershipAction::Dcs(DcsAction::RevokeLease { lease }));
        }
        self.give_former_back(out);
        self.session = Session::Left;
        self.joined = false;
        self.wanted = None;
        self.soft = None;
    }

    /// When membership wants a step of its own accord.
    #[must_use]
    pub fn deadline(&self) -> Option<Deadline> {
        let retry = match &self.registration {
            Registration::Absent { retry_at } => *retry_at,
            Registration::Probing { .. }
            | Registration::Writing { .. }
            | Registration::Registered { .. }
            | Registration::Duplicate => None,
        };
        let soft = self.soft.as_ref().map(|_| self.soft_due);
        Deadline::earliest([
            retry.map(|at| Deadline { at, reason: String::from("try again to write the member key") }),
            soft.map(|at| Deadline { at, reason: String::from("share new figures") }),
        ])
    }

    /// What membership waits for, if it is not in order.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        match (&self.session, &self.registration) {
            (Session::None | Session::Left | Session::Held { .. }, Registration::Duplicate) => {
                Some(format!("another live bot uses the name {}: give this one another `name`", self.name))
            }
            (Session::None | Session::Left, _) => Some(String::from("etcd has not granted a lease yet")),
            (Session::Held { .. }, Registration::Probing { .. }) => {
                Some(format!("a member key for {} exists: asking whether its writer lives", self.name))
            }
            (Session::Held { ttl, resting: false, .. }, _) if self.holds_lock && *ttl != self.ttl => Some(format!(
                "ttl is {} now: the lease of the lock keeps its {ttl} until the lock changes hands",
                self.ttl
            )),
            (
                Session::Held { .. },
                Registration::Absent { .. } | Registration::Writing { .. } | Registration::Registered { .. },
            ) => None,
        }
    }

    fn granted(&mut self, lease: LeaseId, valid_until: Time, out: &mut Vec<MembershipAction>) {
        let grant = self.grant.take();
        match (&self.session, grant) {
            (Session::None, grant) => {
                let Grant { ttl, resting } = grant.unwrap_or(Grant { ttl: self.ttl, resting: false });
                self.session = Session::Held { lease, valid_until, ttl, resting };
                if self.registration != Registration::Duplicate {
                    self.registration = Registration::Absent { retry_at: None };
                }
            }
            (Session::Held { lease: mine, resting, .. }, Some(grant))
                if grant.resting == self.rests && *resting != grant.resting && !self.holds_lock =>
            {
                self.former = Some(*mine);
                self.session = Session::Held { lease, valid_until, ttl: grant.ttl, resting: grant.resting };
            }
            // Things have changed since it was asked for, or it came late: given back, so that it does not linger.
            (Session::Held { lease: mine, .. }, _) if *mine != lease => {
                return out.push(MembershipAction::Dcs(DcsAction::RevokeLease { lease }));
            }
            (Session::Held { .. }, _) => return,
            (Session::Left, _) => return out.push(MembershipAction::Dcs(DcsAction::RevokeLease { lease })),
        }
        // As every lease begins.
        self.pace = renewal(self.lease_ttl());
        self.pace(out);
    }

    fn give_former_back(&mut self, out: &mut Vec<MembershipAction>) {
        if let Some(lease) = self.former.take() {
            out.push(MembershipAction::Dcs(DcsAction::RevokeLease { lease }));
        }
    }

    fn lost(&mut self, lease: LeaseId, why: &str, out: &mut Vec<MembershipAction>) -> Option<MembershipChange> {
        // If our key still hung on it, the view will show that it is gone.
        self.former.take_if(|former| *former == lease);
        if self.lease_id() != Some(lease) {
            return None;
        }
        self.give_former_back(out);
        self.session = Session::None;
        self.published = None;
        self.joined = false;
        if self.registration != Registration::Duplicate {
            self.registration = Registration::Absent { retry_at: None };
        }
        Some(MembershipChange::Lost(why.to_owned()))
    }

    fn answered(
        &mut self,
        now: Time,
        id: RequestId,
        outcome: &Outcome,
        out: &mut Vec<MembershipAction>,
    ) -> Option<MembershipChange> {
        let Registration::Writing { request, value, under, since: _ } = &self.registration else { return None };
        if *request != id {
            return None;
        }
        match outcome {
            Outcome::Done(revision) => {
                self.published = Some(value.clone());
                let under = *under;
                self.registration = Registration::Registered { modified: *revision, under };
                if Some(under) == self.lease_id() {
                    self.give_former_back(out);
                }
                (!std::mem::replace(&mut self.joined, true)).then_some(MembershipChange::Joined)
            }
            Outcome::Refused { found, .. } => self.refused(now, found, out),
            Outcome::Unknown(_) => {
                // Written or not: the next try compares, finds out and repairs.
                self.registration = Registration::Absent { retry_at: Some(now + RETRY_AFTER) };
                None
            }
        }
    }

    fn refused(&mut self, now: Time, found: &[KeyValue], out: &mut Vec<MembershipAction>) -> Option<MembershipChange> {
        let key = self.scope.member(&self.name);
        let Some(found) = found.iter().find(|kv| kv.key == key) else {
            self.registration = Registration::Absent { retry_at: Some(now + RETRY_AFTER) };
            return None;
        };
        let head: Option<MemberHead> = serde_json::from_str(&found.value).ok();
        match head {
            Some(head) if head.instance != self.instance => {
                out.push(MembershipAction::ProbeName { api_url: head.api_url });
                self.registration = Registration::Probing { found: found.clone() };
            }
            // Our own earlier write, or a value that no bot of ours wrote: replace it.
            Some(_) | None => self.take_over(now, &found.clone(), out),
        }
        None
    }

    fn probed(
        &mut self,
        now: Time,
        instance: Option<&str>,
        out: &mut Vec<MembershipAction>,
    ) -> Option<MembershipChange> {
        let Registration::Probing { found } = &self.registration else { return None };
        let found = found.clone();
        let head: Option<MemberHead> = serde_json::from_str(&found.value).ok();
        match instance {
            Some(other) if other != self.instance => {
                self.registration = Registration::Duplicate;
                Some(MembershipChange::Duplicate { api_url: head.map_or_else(String::new, |h| h.api_url) })
            }
            Some(_) | None => {
                self.take_over(now, &found, out);
                None
            }
        }
    }

    fn take_over(&mut self, now: Time, found: &KeyValue, out: &mut Vec<MembershipAction>) {
        let (Some(lease), Some(wanted)) = (self.lease(now), self.wanted.clone()) else {
            self.registration = Registration::Absent { retry_at: Some(now + RETRY_AFTER) };
            return;
        };
        let unchanged = Compare::ModifiedAt(found.key.clone(), found.modified);
        self.write(now, vec![unchanged], wanted, lease, out);
    }

    fn write(
        &mut self,
        now: Time,
        compare: Vec<Compare>,
        value: String,
        lease: LeaseId,
        out: &mut Vec<MembershipAction>,
    ) {
        let request = self.next_request();
        let put = Write::put_leased(self.scope.member(&self.name), value.clone(), lease);
        let transaction = Transaction::new(compare, vec![put]);
        out.push(MembershipAction::Dcs(DcsAction::Transact { id: request, transaction }));
        self.registration = Registration::Writing { request, value, under: lease, since: now };
    }

    /// The store shows our key gone or foreign while we think it ours: write it again.
    fn check_view(&mut self, view: &View) {
        let Registration::Registered { modified, under } = self.registration else { return };
        let found = view.get(&self.scope.member(&self.name));
        // What was written before our own last word is old news.
        if !view.is_watched() || found.is_some_and(|kv| kv.modified < modified) {
            return;
        }
        let ours = found.is_some_and(|kv| kv.lease == Some(under));
        let current = found.is_some_and(|kv| Some(&kv.value) == self.published.as_ref());
        if found.is_none() || (current && !ours) {
            self.registration = Registration::Absent { retry_at: None };
        }
    }
}
