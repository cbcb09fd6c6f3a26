//! Transcripts of the two sub-machines that every bot has, membership and leadership, on the in-memory store.
//! `REWRITE=1` writes them afresh; read the difference like code.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
};

use bots_core::{
    dcs::{
        Change, Compare, DcsAction, DcsEvent, LeaseId, MemoryDcs, Outcome, RequestId, Revision, Scope, Transaction,
        View, Write,
    },
    leadership::Leadership,
    machine::{Deadline, Span, Time},
    membership::{Membership, MembershipAction, MembershipEvent},
};
use datadriven::TestCase;

#[test]
fn transcripts() {
    datadriven::walk("tests/machine", |file| {
        let mut world = World::new("i1");
        file.run(|case| {
            world.perform(case);
            world.shown()
        });
    });
}

const TTL: Span = Span::from_secs(5);

#[test]
fn a_new_ttl_that_does_not_reach_the_lease_of_the_lock_is_told() {
    let (mut membership, mut out) = (Membership::new(scope(), "a", "i1", TTL), Vec::new());
    let (now, view) = (Time::from_millis(1_000), View::of([scope().prefix()]));
    membership.publish(now, member_value("i1", "up"), &mut out);
    let granted = DcsEvent::LeaseGranted { lease: LeaseId(7), valid_until: now + TTL };
    membership.on_event(now, &MembershipEvent::Dcs(granted), &view, &mut out);
    membership.set_ttl(Span::from_secs(20));
    assert_eq!(membership.trouble(), None, "the next lease has it");
    membership.hold_lock(true, &mut out);
    let told = membership.trouble().expect("it is told");
    assert_eq!(told, "ttl is 20.0 s now: the lease of the lock keeps its 5.0 s until the lock changes hands");
    membership.set_ttl(TTL);
    assert_eq!(membership.trouble(), None);
}

/// One bot called `a`, the store, and what is under way between them.
struct World {
    now: Time,
    dcs: MemoryDcs,
    view: View,
    membership: Membership,
    leadership: Leadership,
    /// The length of the lease that is asked for.
    grant_asked: Option<Span>,
    /// How long the leases of the store are.
    lengths: BTreeMap<LeaseId, Span>,
    transactions: VecDeque<(RequestId, Transaction)>,
    log: Vec<String>,
    last_lines: Vec<String>,
}

fn scope() -> Scope {
    Scope::new("service", "s").expect("valid")
}

fn member_value(instance: &str, text: &str) -> String {
    format!(r#"{{"state":"{text}","role":"member","api_url":"http://{instance}","instance":"{instance}"}}"#)
}

impl World {
    fn new(instance: &str) -> Self {
        Self {
            now: Time::from_millis(1_000),
            dcs: MemoryDcs::new(),
            view: View::of([scope().prefix()]),
            membership: Membership::new(scope(), "a", instance, TTL),
            leadership: Leadership::new(scope().leader(), "a"),
            grant_asked: None,
            lengths: BTreeMap::new(),
            transactions: VecDeque::new(),
            log: Vec::new(),
            last_lines: Vec::new(),
        }
    }

    fn perform(&mut self, case: &TestCase) {
        let arg = |name: &str| case.args.get(name).map(|values| values.first().cloned().unwrap_or_default());
        let number = |name: &str| arg(name).map_or(0, |text| text.parse::<u64>().expect("a number"));
        let flag = |name: &str| case.args.contains_key(name);
        match case.directive.as_str() {
            "new" => *self = Self::new(&arg("instance").unwrap_or_else(|| "i1".into())),
            // The process dies and another begins: the store and the clock go on.
            "restart" => {
                let Self { now, dcs, .. } = Self::new("i1").swapped(self);
                *self = Self { now, dcs, ..Self::new(&arg("instance").expect("instance=")) };
            }
            "publish" => {
                let value = member_value(self.membership.instance(), &arg("state").expect("state="));
                let mut out = Vec::new();
                if flag("soft") {
                    self.membership.publish_soft(self.now, value, &mut out);
                } else {
                    self.membership.publish(self.now, value, &mut out);
                }
                self.queue(out);
            }
            "grant" => {
                let ttl = self.grant_asked.take().expect("nobody asked for a lease");
                let lease = self.dcs.grant(self.now, ttl);
                self.lengths.insert(lease, ttl);
                self.dcs(DcsEvent::LeaseGranted { lease, valid_until: self.now + ttl });
            }
            "renew" => {
                let lease = self.membership.lease_id().expect("a lease");
                let event = if self.dcs.keep_alive(self.now, lease) {
                    DcsEvent::LeaseRenewed { lease, valid_until: self.now + self.lengths[&lease] }
                } else {
                    DcsEvent::LeaseLost { lease, why: "expired".into() }
                };
                self.dcs(event);
            }
            "lose-lease" => {
                let named = arg("lease").map(|id| LeaseId(id.parse().expect("a number")));
                if let Some(lease) = named {
                    self.dcs.revoke(lease);
                }
                let lease = named.or(self.membership.lease_id()).expect("a lease");
                self.dcs(DcsEvent::LeaseLost { lease, why: "the bot stood still".into() });
            }
            "answer" => self.answer(flag("lost"), flag("never-arrived")),
            "list" => {
                let (revision, entries) = self.dcs.list(&scope().prefix());
                self.dcs(DcsEvent::Listed { prefix: scope().prefix(), revision, entries });
            }
            "changes" => {
                let revision = self.view.revision(&scope().prefix());
                let changes = self.dcs.changes_after(&scope().prefix(), revision).expect("nothing is compacted");
                let revision = self.dcs.revision();
                self.dcs(DcsEvent::Changed { prefix: scope().prefix(), revision, changes });
            }
            "watch-lost" => self.dcs(DcsEvent::WatchLost { prefix: scope().prefix(), why: "cut".into() }),
            "probed" => self.member(&MembershipEvent::NameProbed { instance: arg("instance") }),
            "pass" => self.pass(Span::from_millis(number("ms"))),
            "acquire" => {
                let (mut out, extra) = (Vec::new(), arg("if-absent").map(|key| Compare::Absent(scope().key(&key))));
                let extra = extra.into_iter().collect();
                self.leadership.acquire(self.now, &mut self.membership, &self.view, extra, &mut out);
                self.queue(out.into_iter().map(MembershipAction::Dcs).collect());
            }
            "yield" => {
                let mut out = Vec::new();
                self.leadership.yield_lock(self.now, &mut self.membership, Vec::new(), &mut out);
                self.queue(out.into_iter().map(MembershipAction::Dcs).collect());
            }
            "rest" | "stir" => {
                let mut out = Vec::new();
                self.membership.rest(self.now, case.directive == "rest", &mut out);
                self.queue(out);
            }
            "lock-held" => {
                let mut out = Vec::new();
                self.membership.hold_lock(self.leadership.is_held(), &mut out);
                self.queue(out);
            }
            "leave" => {
                let mut out = Vec::new();
                self.membership.leave(&mut out);
                self.queue(out);
            }
            "other" => self.other(&arg),
            "store" => {
                for kv in self.dcs.list(&scope().prefix()).1 {
                    let lease = kv.lease.map_or_else(String::new, |LeaseId(id)| format!(" lease {id}"));
                    let key = scope().strip(&kv.key).expect("below the prefix").to_owned();
                    self.log.push(format!("{key} = {} (created {}){lease}", kv.value, kv.created.0));
                }
            }
            other => panic!("unknown directive {other}"),
        }
    }

    /// Takes what outlives a process from `old`.
    fn swapped(mut self, old: &mut Self) -> Self {
        (self.now, self.dcs) = (old.now, std::mem::take(&mut old.dcs));
        self
    }

    /// Somebody else writes: a member of our name, the lock, or a deletion by an operator.
    fn other(&mut self, arg: &dyn Fn(&str) -> Option<String>) {
        let mut put = |key: String, value: String| {
            let lease = self.dcs.grant(self.now, TTL.times(100));
            let write = Write::put_leased(key, value, lease);
            self.dcs.transact(self.now, &Transaction::new(Vec::new(), vec![write]))
        };
        let outcome = match (arg("member"), arg("leads"), arg("deletes")) {
            (Some(instance), None, None) => put(scope().member("a"), member_value(&instance, "other")),
            (None, Some(name), None) => put(scope().leader(), name),
            (None, None, Some(key)) => {
                self.dcs.transact(self.now, &Transaction::new(Vec::new(), vec![Write::delete(scope().key(&key))]))
            }
            _ => panic!("member=, leads= or deletes="),
        };
        assert!(matches!(outcome, Outcome::Done(_)));
    }

    /// Performs the oldest transaction and tells the bot; a lost answer or a lost question is *unknown*.
    fn answer(&mut self, lost: bool, never_arrived: bool) {
        let Some((id, transaction)) = self.transactions.pop_front() else {
            return self.log.push("nothing is under way".into());
        };
        let unknown = Outcome::Unknown("no answer in 2s".into());
        let outcome = if never_arrived { unknown.clone() } else { self.dcs.transact(self.now, &transaction) };
        let outcome = if lost { unknown } else { outcome };
        self.log.push(match &outcome {
            Outcome::Done(Revision(at)) => format!("{}: done at {at}", id.0),
            Outcome::Refused { found, .. } => format!("{}: refused, {} found", id.0, found.len()),
            Outcome::Unknown(_) => format!("{}: unknown", id.0),
        });
        self.dcs(DcsEvent::Answered { id, outcome });
    }

    /// Lets time pass, waking the bot at each of its deadlines.
    fn pass(&mut self, span: Span) {
        let end = self.now + span;
        loop {
            let deadline = Deadline::earliest([self.membership.deadline(), self.leadership.deadline()]);
            let Some(due) = deadline.filter(|d| d.at <= end) else { break };
            assert!(due.at > self.now || self.log.len() < 20, "a deadline stays in the past: {due:?}");
            self.now = self.now.max(due.at);
            self.log.push(format!("at {}: {}", self.now.as_millis(), due.reason));
            let mut out = Vec::new();
            self.membership.advance(self.now, &mut out);
            let mut asked = Vec::new();
            if self.leadership.is_uncertain() {
                self.leadership.acquire(self.now, &mut self.membership, &self.view, Vec::new(), &mut asked);
            }
            if self.leadership.is_yielding() {
                self.leadership.yield_lock(self.now, &mut self.membership, Vec::new(), &mut asked);
            }
            out.extend(asked.into_iter().map(MembershipAction::Dcs));
            self.queue(out);
        }
        self.now = end;
        self.dcs.expire(self.now);
    }

    fn dcs(&mut self, event: DcsEvent) {
        if let DcsEvent::Changed { changes, .. } = &event {
            for change in changes {
                self.log.push(match change {
                    Change::Put(kv) => format!("sees {} = {}", kv.key, kv.value),
                    Change::Deleted { key, .. } => format!("sees {key} deleted"),
                });
            }
        }
        self.view.apply(&event);
        self.member(&MembershipEvent::Dcs(event.clone()));
        let change = self.leadership.on_event(self.now, &event, &self.view, &self.membership);
        self.log.extend(change.map(|change| format!("leadership: {change:?}")));
        let mut out = Vec::new();
        self.membership.advance(self.now, &mut out);
        self.queue(out);
    }

    fn member(&mut self, event: &MembershipEvent) {
        let mut out = Vec::new();
        let change = self.membership.on_event(self.now, event, &self.view, &mut out);
        self.log.extend(change.map(|change| format!("membership: {change:?}")));
        self.queue(out);
    }

    fn queue(&mut self, actions: Vec<MembershipAction>) {
        for action in actions {
            match action {
                MembershipAction::ProbeName { api_url } => self.log.push(format!("asks who answers at {api_url}")),
                MembershipAction::Dcs(DcsAction::GrantLease { ttl }) => {
                    self.log.push(format!("asks for a lease of {ttl}"));
                    assert_eq!(self.grant_asked.replace(ttl), None, "a lease is asked for twice");
                }
                MembershipAction::Dcs(DcsAction::PaceLease { lease, every }) => {
                    self.log.push(format!("has lease {} renewed every {every}", lease.0));
                }
                MembershipAction::Dcs(DcsAction::RevokeLease { lease }) => {
                    self.log.push(format!("gives lease {} back", lease.0));
                    self.dcs.revoke(lease);
                }
                MembershipAction::Dcs(DcsAction::Transact { id, transaction }) => {
                    self.log.push(format!("{}: {}", id.0, show(&transaction)));
                    self.transactions.push_back((id, transaction));
                }
            }
        }
    }

    /// What happened, and what of the state is different from the last time.
    fn shown(&mut self) -> String {
        let fence = self.leadership.fence(self.now, &self.membership);
        let lines = vec![
            format!("lease: {}", self.membership.lease(self.now).map_or("none".into(), |l| l.0.to_string())),
            format!("registered: {}", self.membership.is_registered()),
            format!("lock: {}", fence.map_or("none".into(), |f| format!("held since {}", f.created.0))),
            format!("trouble: {}", self.membership.trouble().unwrap_or_else(|| "none".into())),
        ];
        let mut out = String::new();
        for line in self.log.drain(..) {
            let _infallible = writeln!(out, "{line}");
        }
        for line in lines.iter().filter(|line| !self.last_lines.contains(line)) {
            let _infallible = writeln!(out, "  {line}");
        }
        self.last_lines = lines;
        if out.is_empty() { "(nothing)\n".into() } else { out }
    }
}

fn show(transaction: &Transaction) -> String {
    let bare = |key: &str| scope().strip(key).unwrap_or(key).to_owned();
    let compare = transaction.compare.iter().map(|compare| match compare {
        Compare::Absent(key) => format!("{} absent", bare(key)),
        Compare::Present(key) => format!("{} present", bare(key)),
        Compare::ValueIs(key, value) => format!("{} is {value}", bare(key)),
        Compare::ModifiedAt(key, at) => format!("{} modified at {}", bare(key), at.0),
        Compare::CreatedAt(key, at) => format!("{} created at {}", bare(key), at.0),
        Compare::LeaseIs(key, lease) => format!("{} under lease {}", bare(key), lease.0),
    });
    let then = transaction.then.iter().map(|write| match write {
        Write::Put { key, lease: Some(lease), .. } => format!("put {} under lease {}", bare(key), lease.0),
        Write::Put { key, lease: None, .. } => format!("put {}", bare(key)),
        Write::Delete { key } => format!("delete {}", bare(key)),
    });
    format!("if {} then {}", compare.collect::<Vec<_>>().join(" and "), then.collect::<Vec<_>>().join(" and "))
}
