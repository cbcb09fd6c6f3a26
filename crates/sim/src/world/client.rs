//! A bot's way to etcd: one queue of transactions, leases that are renewed beside it, one watch a prefix. As the real
//! shell does it: deadlines, lost answers, renewal counted from the sending, lists after broken watches.

use std::collections::{BTreeMap, VecDeque};

use bots_core::{
    dcs::{Change, DcsAction, DcsEvent, KeyValue, LeaseId, Outcome, RequestId, Revision, Transaction, Write},
    machine::{Span, Time},
    membership::renewal,
};

use super::{BotEvent, Item, NodeId, World};
use crate::plant::{self, About, Plant};

/// How long etcd may take to answer.
const REQUEST_DEADLINE: Span = Span::from_secs(2);
/// The least time that one renewal may take.
const RENEWAL_TRY_MIN: Span = Span::from_millis(200);
/// So many members of etcd are asked one after the other; then there is a pause.
const STORE_MEMBERS: u64 = 3;
/// Between two members.
const TRY_PAUSE: Span = Span::from_millis(10);
/// The shortest and the longest pause before a prefix is listed again.
const LIST_PAUSE_MIN: Span = Span::from_millis(50);
/// See [`LIST_PAUSE_MIN`].
const LIST_PAUSE_MAX: Span = Span::from_millis(2_000);

/// What is asked of etcd.
#[derive(Debug, Clone)]
pub(crate) enum Request {
    Transact { id: RequestId, transaction: Transaction },
    Grant { ttl: Span },
    KeepAlive { lease: LeaseId },
    Revoke { lease: LeaseId },
    List { prefix: String },
}

/// What etcd answers.
#[derive(Debug)]
pub(crate) enum Reply {
    Answered { id: RequestId, outcome: Outcome },
    Granted { lease: LeaseId, ttl: Span },
    Kept { lives: bool },
    Revoked,
    Listed { prefix: String, revision: Revision, entries: Vec<KeyValue> },
}

/// What the client remembers of a request that is under way.
#[derive(Debug, Clone)]
enum Asked {
    Transaction { id: RequestId, about: About },
    Revocation,
    Grant { task: u64, sent: Time },
    Renewal { task: u64, sent: Time },
    List { prefix: String },
}

/// One lease's task.
#[derive(Debug, Clone, Copy)]
struct Renewal {
    /// The wake-up that counts; earlier ones are old news.
    wakes: u64,
    ttl: Span,
    tries: u64,
    /// Nothing while it is asked for.
    held: Option<Held>,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    lease: LeaseId,
    every: Span,
    sent: Time,
}

#[derive(Debug)]
struct Watch {
    /// The newest revision that was shown.
    shown: Revision,
    live: bool,
    /// Changes are on their way to the bot, as far as this revision.
    coming: Option<Revision>,
    /// Tells one life of the watch from the next.
    serial: u64,
    pause: Span,
}

/// A bot's connections to etcd; they end with it.
#[derive(Debug, Default)]
pub struct Client {
    rpcs: u64,
    asked: BTreeMap<u64, Asked>,
    jobs: VecDeque<Request>,
    busy: bool,
    renewals: BTreeMap<u64, Renewal>,
    /// Counts tasks and wake-ups.
    serial: u64,
    watches: BTreeMap<String, Watch>,
}

impl Client {
    fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    /// The task that renews a lease.
    fn renewal_of(&self, lease: LeaseId) -> Option<u64> {
        let of = |renewal: &Renewal| renewal.held.is_some_and(|held| held.lease == lease);
        self.renewals.iter().find(|(_, renewal)| of(renewal)).map(|(task, _)| *task)
    }

    /// The watched prefixes.
    pub(super) fn prefixes(&self) -> Vec<String> {
        self.watches.keys().cloned().collect()
    }
}

impl World {
    /// One way between a bot and etcd.
    pub(super) fn store_delay(&mut self) -> Span {
        let delay = self.plan.store_delay.draw(&mut self.rng);
        if self.slow_store() { delay + self.rng.span(100, 1_500) } else { delay }
    }

    /// A bot that has just been started connects.
    pub(super) fn connect(&mut self, node: NodeId, prefixes: Vec<String>) {
        let life = self.nodes[node.0].life;
        for prefix in prefixes {
            let watch = Watch { shown: Revision(0), live: false, coming: None, serial: 0, pause: LIST_PAUSE_MIN };
            self.nodes[node.0].client.watches.insert(prefix.clone(), watch);
            let delay = self.rng.span(1, 10);
            self.after(delay, Item::Relist { node, life, prefix });
        }
    }

    /// Carries out what a machine asks of etcd.
    pub(crate) fn ask_store(&mut self, node: NodeId, action: DcsAction) {
        if let Some(answer) = plant::made_up(self, node, &action) {
            return self.hear(node, answer);
        }
        match plant::alter_request(self.plant, action) {
            DcsAction::GrantLease { ttl } => {
                let client = &mut self.nodes[node.0].client;
                let task = client.next_serial();
                client.renewals.insert(task, Renewal { wakes: 0, ttl, tries: 0, held: None });
                self.renew_after(node, task, Span::ZERO);
            }
            DcsAction::PaceLease { lease, every } => self.pace(node, lease, every),
            DcsAction::RevokeLease { lease } => {
                let client = &mut self.nodes[node.0].client;
                if let Some(task) = client.renewal_of(lease) {
                    client.renewals.remove(&task);
                }
                client.jobs.push_back(Request::Revoke { lease });
                self.next_job(node);
            }
            DcsAction::Transact { id, transaction } => {
                self.nodes[node.0].client.jobs.push_back(Request::Transact { id, transaction });
                self.next_job(node);
            }
        }
    }

    /// Transactions run one after the other.
    fn next_job(&mut self, node: NodeId) {
        let client = &mut self.nodes[node.0].client;
        if client.busy {
            return;
        }
        let Some(request) = client.jobs.pop_front() else { return };
        client.busy = true;
        let asked = match &request {
            Request::Transact { id, transaction } => Asked::Transaction { id: *id, about: About::of(transaction) },
            Request::Grant { .. } | Request::KeepAlive { .. } | Request::Revoke { .. } | Request::List { .. } => {
                Asked::Revocation
            }
        };
        let mut late = None;
        if let Request::Transact { .. } = &request
            && !self.is_healed()
            && self.rng.chance(self.plan.requests_late)
        {
            late = Some(REQUEST_DEADLINE + self.rng.span(10, 4_000));
        }
        self.send(node, request, asked, REQUEST_DEADLINE, late);
    }

    fn send(&mut self, node: NodeId, request: Request, asked: Asked, deadline: Span, late: Option<Span>) {
        let life = self.nodes[node.0].life;
        let client = &mut self.nodes[node.0].client;
        client.rpcs += 1;
        let rpc = client.rpcs;
        client.asked.insert(rpc, asked);
        self.after(deadline, Item::GiveUp { node, life, rpc });
        let delay = late.unwrap_or_else(|| self.store_delay());
        let arrival = Item::Arrive { node, life, rpc, request };
        if !self.network.requests_pass(node) {
            // What TCP holds is sent again when the way is free, be the sender still waiting or not.
            if self.rng.chance(300) {
                self.network.held.push((node, arrival));
            }
            return;
        }
        let lost = self.plan.requests_lost;
        if self.is_healed() || !self.rng.chance(lost) {
            self.after(delay, arrival);
        }
    }

    /// etcd's answer has come, in time or not.
    pub(super) fn replied(&mut self, node: NodeId, rpc: u64, reply: Reply) {
        // Nobody waits for it any more; a lease that was granted too late runs out by itself.
        let Some(asked) = self.nodes[node.0].client.asked.remove(&rpc) else { return };
        let local = self.local(node);
        match (asked, reply) {
            (Asked::Transaction { about, .. }, Reply::Answered { id, outcome }) => {
                self.answered(node, id, about, outcome);
            }
            (Asked::Revocation, _) => self.job_done(node),
            (Asked::Grant { task, sent }, Reply::Granted { lease, ttl }) => {
                let from = if self.plant == Some(Plant::LeaseFromReply) { local } else { sent };
                let every = renewal(ttl);
                if let Some(renewal) = self.nodes[node.0].client.renewals.get_mut(&task) {
                    *renewal = Renewal { ttl, tries: 0, held: Some(Held { lease, every, sent }), ..*renewal };
                    self.renew_at(node, task, sent + every);
                    self.hear(node, DcsEvent::LeaseGranted { lease, valid_until: from + ttl });
                }
            }
            (Asked::Renewal { task, sent }, Reply::Kept { lives }) => self.kept(node, task, sent, lives),
            (Asked::List { .. }, Reply::Listed { prefix, revision, entries }) => {
                self.listed(node, prefix, revision, entries);
            }
            (_, _) => {}
        }
    }

    /// etcd has not answered in time.
    pub(super) fn gave_up(&mut self, node: NodeId, rpc: u64) {
        match self.nodes[node.0].client.asked.remove(&rpc) {
            Some(Asked::Transaction { id, about }) => {
                self.answered(node, id, about, Outcome::Unknown(String::from("no answer in 2 s")));
            }
            Some(Asked::Revocation) => self.job_done(node),
            Some(Asked::Grant { task, .. } | Asked::Renewal { task, .. }) => {
                let Some(renewal) = self.nodes[node.0].client.renewals.get_mut(&task) else { return };
                renewal.tries += 1;
                let pause = renewal.held.map_or(Span::from_millis(500), |_| renewal_try(renewal.ttl));
                let pause = if renewal.tries.is_multiple_of(STORE_MEMBERS) { pause } else { TRY_PAUSE };
                self.renew_after(node, task, pause);
            }
            Some(Asked::List { prefix }) => self.list_again(node, prefix),
            None => {}
        }
    }

    fn answered(&mut self, node: NodeId, id: RequestId, about: About, outcome: Outcome) {
        self.job_done(node);
        let outcome = plant::alter_outcome(self.plant, about, outcome);
        self.hear(node, DcsEvent::Answered { id, outcome });
    }

    fn job_done(&mut self, node: NodeId) {
        self.nodes[node.0].client.busy = false;
        self.next_job(node);
    }

    pub(super) fn hear(&mut self, node: NodeId, event: DcsEvent) {
        let event = BotEvent::dcs(self.nodes[node.0].kind, event);
        self.tell(node, Span::ZERO, event);
    }

    fn renew_at(&mut self, node: NodeId, task: u64, local: Time) {
        let node_ref = &mut self.nodes[node.0];
        let serial = node_ref.client.next_serial();
        let Some(renewal) = node_ref.client.renewals.get_mut(&task) else { return };
        renewal.wakes = serial;
        let (life, at) = (node_ref.life, node_ref.clock.global(local));
        self.at(at, Item::Renew { node, life, serial });
    }

    fn renew_after(&mut self, node: NodeId, task: u64, delay: Span) {
        let local = self.local(node);
        self.renew_at(node, task, local + delay);
    }

    /// The lease thread has something to do.
    pub(super) fn renew(&mut self, node: NodeId, serial: u64) {
        let sent = self.local(node);
        let renewals = &self.nodes[node.0].client.renewals;
        let Some((&task, &renewal)) = renewals.iter().find(|(_, renewal)| renewal.wakes == serial) else { return };
        let Renewal { ttl, held, .. } = renewal;
        match held {
            None => self.send(node, Request::Grant { ttl }, Asked::Grant { task, sent }, REQUEST_DEADLINE, None),
            Some(Held { lease, .. }) => {
                self.send(node, Request::KeepAlive { lease }, Asked::Renewal { task, sent }, renewal_try(ttl), None);
            }
        }
    }

    /// The lease is renewed this often from now on; a renewal that is under way ends as it would have.
    fn pace(&mut self, node: NodeId, of: LeaseId, wanted: Span) {
        let client = &mut self.nodes[node.0].client;
        let Some(task) = client.renewal_of(of) else { return };
        let asking = |asked: &Asked| matches!(asked, Asked::Renewal { task: of, .. } if *of == task);
        let asking = client.asked.values().any(asking);
        let Some(Renewal { held: Some(held), tries, .. }) = client.renewals.get_mut(&task) else { return };
        held.every = wanted;
        let due = held.sent + wanted;
        if *tries == 0 && !asking {
            self.renew_at(node, task, due);
        }
    }

    fn kept(&mut self, node: NodeId, task: u64, when: Time, lives: bool) {
        let local = self.local(node);
        let client = &mut self.nodes[node.0].client;
        let Some(Renewal { ttl, tries, held: Some(held), .. }) = client.renewals.get_mut(&task) else { return };
        let (lease, ttl, every) = (held.lease, *ttl, held.every);
        if lives {
            held.sent = when;
            *tries = 0;
            let from = if self.plant == Some(Plant::LeaseFromReply) { local } else { when };
            self.renew_at(node, task, when + every);
            self.hear(node, DcsEvent::LeaseRenewed { lease, valid_until: from + ttl });
        } else {
            client.renewals.remove(&task);
            self.hear(node, DcsEvent::LeaseLost { lease, why: String::from("etcd says that it has expired") });
        }
    }

    pub(super) fn relist(&mut self, node: NodeId, prefix: &str) {
        if self.nodes[node.0].client.watches.get(prefix).is_none_or(|watch| watch.live) {
            return;
        }
        let request = Request::List { prefix: prefix.to_owned() };
        self.send(node, request, Asked::List { prefix: prefix.to_owned() }, REQUEST_DEADLINE, None);
    }

    fn list_again(&mut self, node: NodeId, prefix: String) {
        let life = self.nodes[node.0].life;
        let Some(watch) = self.nodes[node.0].client.watches.get_mut(&prefix) else { return };
        let pause = watch.pause;
        watch.pause = watch.pause.times(2).min(LIST_PAUSE_MAX);
        let pause = pause + self.rng.span(0, pause.as_millis() / 2);
        self.after(pause, Item::Relist { node, life, prefix });
    }

    fn listed(&mut self, node: NodeId, prefix: String, revision: Revision, entries: Vec<KeyValue>) {
        let Some(watch) = self.nodes[node.0].client.watches.get_mut(&prefix) else { return };
        watch.shown = revision;
        watch.live = true;
        watch.pause = LIST_PAUSE_MIN;
        watch.coming = None;
        watch.serial += 1;
        self.show_soon(node, &prefix.clone());
        self.hear(node, DcsEvent::Listed { prefix, revision, entries });
    }

    /// Something has changed in etcd: whoever watches it will hear of it.
    pub(super) fn show_changes(&mut self, made: Option<&Transaction>) {
        for node in self.ids() {
            for prefix in self.nodes[node.0].client.prefixes() {
                let touched = made.is_none_or(|t| {
                    t.then.iter().any(|write| match write {
                        Write::Put { key, .. } | Write::Delete { key } => key.starts_with(&prefix),
                    })
                });
                if touched {
                    self.show_soon(node, &prefix);
                }
            }
        }
    }

    fn show_soon(&mut self, node: NodeId, prefix: &str) {
        let upto = self.store.dcs().revision();
        let (life, passes) = (self.nodes[node.0].life, self.network.replies_pass(node));
        let Some(watch) = self.nodes[node.0].client.watches.get_mut(prefix) else { return };
        if !watch.live || watch.coming.is_some() || watch.shown >= upto || !passes {
            return;
        }
        watch.coming = Some(upto);
        let (serial, prefix) = (watch.serial, prefix.to_owned());
        let delay = self.store_delay();
        self.after(delay, Item::Show { node, life, prefix, serial });
    }

    /// Changes reach a bot.
    pub(super) fn show(&mut self, node: NodeId, prefix: &str, serial: u64) {
        let passes = self.network.replies_pass(node) && self.store.answers();
        let compacted = self.store.compacted();
        let Some(watch) = self.nodes[node.0].client.watches.get_mut(prefix) else { return };
        if watch.serial != serial || !watch.live {
            return;
        }
        let Some(upto) = watch.coming.take() else { return };
        if !passes {
            return;
        }
        let Ok(changes) = self.store.dcs().changes_after(prefix, watch.shown) else {
            return self.break_watch(node, prefix, &format!("history up to {} was compacted away", compacted.0));
        };
        let changes: Vec<Change> = changes.into_iter().filter(|change| revision_of(change) <= upto).collect();
        watch.shown = upto;
        if let Some(revision) = changes.iter().map(revision_of).max() {
            self.hear(node, DcsEvent::Changed { prefix: prefix.to_owned(), revision, changes });
        }
        self.show_soon(node, prefix);
    }

    /// What a cut or an outage does to watches: after a while they are noticed to be silent.
    pub(super) fn watches_fall_silent(&mut self, node: NodeId) {
        let life = self.nodes[node.0].life;
        for prefix in self.nodes[node.0].client.prefixes() {
            let serial = self.nodes[node.0].client.watches.get(&prefix).map_or(0, |watch| watch.serial);
            let delay = self.rng.span(2_000, 8_000);
            self.after(delay, Item::Silent { node, life, prefix, serial });
        }
    }

    pub(super) fn silent(&mut self, node: NodeId, prefix: &str, serial: u64) {
        let hears = self.network.replies_pass(node) && self.network.requests_pass(node) && self.store.answers();
        let current = self.nodes[node.0].client.watches.get(prefix).is_some_and(|w| w.live && w.serial == serial);
        if current && !hears {
            self.break_watch(node, prefix, "the member went silent");
        }
    }

    /// The way is free again: what was held back is shown.
    pub(super) fn watches_resume(&mut self, node: NodeId) {
        for prefix in self.nodes[node.0].client.prefixes() {
            self.show_soon(node, &prefix);
        }
    }

    pub(super) fn break_watch(&mut self, node: NodeId, prefix: &str, why: &str) {
        let life = self.nodes[node.0].life;
        let Some(watch) = self.nodes[node.0].client.watches.get_mut(prefix).filter(|watch| watch.live) else { return };
        watch.live = false;
        watch.serial += 1;
        watch.coming = None;
        if self.plant == Some(Plant::NeverListAgain) {
            return;
        }
        let prefix = prefix.to_owned();
        let delay = self.rng.span(50, 80);
        self.after(delay, Item::Relist { node, life, prefix: prefix.clone() });
        self.hear(node, DcsEvent::WatchLost { prefix, why: why.to_owned() });
        if self.plant == Some(Plant::UpstreamForgotten) && self.nodes[node.0].postgres().is_some() {
            self.forget_upstream(node);
        }
    }
}

fn renewal_try(ttl: Span) -> Span {
    ttl.divided_by(10).max(RENEWAL_TRY_MIN)
}

const fn revision_of(change: &Change) -> Revision {
    match change {
        Change::Put(kv) => kv.modified,
        Change::Deleted { revision, .. } => *revision,
    }
}
