//! Lease renewal: a thread with a runtime and connections of its own, so that no other work can delay it.
//!
//! A lease is counted from when its renewal was *sent*. When the machine's loop stands still, renewal ends: a zombie must
//! not keep a lock.

use std::{
    io,
    sync::{Arc, OnceLock},
    thread,
};

use tokio::{
    sync::{broadcast, mpsc, watch},
    task::JoinSet,
};
use tracing::Instrument;

use super::{DcsSink, Etcd, EtcdError, Fatal, version::Sighting};
use crate::{
    dcs::{DcsEvent, LeaseId},
    machine::{Span, Time},
    membership::{is_paced_for_lock, renewal},
    shell::{clock::Clock, config::SITES_MAX, entropy::jitter, runtime::Pulse},
};

/// The least time that one try may take: below this, a busy machine fails by itself.
const TRY_MIN: Span = Span::from_millis(200);
/// The first and the longest pause between tries to get a lease.
const GRANT_PAUSE_MIN: Span = Span::from_millis(100);
const GRANT_PAUSE_MAX: Span = Span::from_millis(500);
/// The first pause between rounds of tries to renew a lease.
const RENEW_PAUSE_MIN: Span = Span::from_millis(50);
/// Orders that may wait. A machine has one lease, and for a moment two, when one takes the place of the other; and a process
/// has [`SITES_MAX`] machines at most.
const ORDERS_MAX: usize = 2 * SITES_MAX;
/// How often the loop is looked at again while it owes a sign of life.
const PULSE_PAUSE: Span = Span::from_millis(5);

/// The way to the renewal thread. Clones share it; it ends with the last of them.
#[derive(Clone)]
pub(super) struct Renewals {
    orders: mpsc::Sender<Order>,
    etcd: Etcd,
}

/// The way of one machine to it.
#[derive(Clone)]
pub(super) struct Renewal {
    orders: mpsc::Sender<Order>,
    hands: Hands,
}

enum Order {
    Grant { ttl: Span, hands: Box<Hands> },
    About(About),
}

/// An order about a lease that there is.
#[derive(Debug, Clone, Copy)]
enum About {
    Pace { lease: LeaseId, every: Span },
    Forget { lease: LeaseId },
}

impl Renewals {
    pub(super) fn start(etcd: Etcd, fatal: Fatal) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (sender, orders) = mpsc::channel(ORDERS_MAX);
        let renewer = Renewer { orders, fatal };
        thread::Builder::new().name(String::from("lease")).spawn(move || runtime.block_on(renewer.run()))?;
        Ok(Self { orders: sender, etcd })
    }

    pub(super) fn of(&self, sink: DcsSink, pulse: Pulse, readable: Arc<OnceLock<String>>) -> Renewal {
        let span = tracing::Span::current();
        Renewal { orders: self.orders.clone(), hands: Hands { etcd: self.etcd.clone(), sink, pulse, readable, span } }
    }
}

impl Renewal {
    pub(super) fn grant(&self, ttl: Span) {
        self.order(Order::Grant { ttl, hands: Box::new(self.hands.clone()) });
    }

    /// Renews `lease` this often from now on.
    pub(super) fn pace(&self, lease: LeaseId, every: Span) {
        self.order(Order::About(About::Pace { lease, every }));
    }

    /// Stops renewing `lease`, at once.
    pub(super) fn forget(&self, lease: LeaseId) {
        self.order(Order::About(About::Forget { lease }));
    }

    fn order(&self, order: Order) {
        if self.orders.try_send(order).is_err() {
            tracing::error!("the renewal thread does not take orders");
        }
    }
}

struct Renewer {
    orders: mpsc::Receiver<Order>,
    fatal: Fatal,
}

/// What each lease's task works with.
#[derive(Clone)]
struct Hands {
    etcd: Etcd,
    sink: DcsSink,
    pulse: Pulse,
    /// A key that the bot may read.
    readable: Arc<OnceLock<String>>,
    /// Whose lease it is, in the log.
    span: tracing::Span,
}

/// A lease as the store granted it.
#[derive(Clone, Copy)]
struct Lease {
    id: LeaseId,
    ttl: Span,
    /// When the last answered request about it was sent.
    sent: Time,
}

impl Lease {
    fn valid_until(&self) -> Time {
        self.sent + self.ttl
    }
}

impl Renewer {
    /// Each lease is a task of its own, which hears every order and minds those about itself.
    async fn run(mut self) {
        let about_leases = broadcast::Sender::new(ORDERS_MAX);
        let mut leases = JoinSet::new();
        loop {
            tokio::select! {
                order = self.orders.recv() => match order {
                    Some(Order::Grant { ttl, hands }) => {
                        let span = hands.span.clone();
                        leases.spawn(hands.hold(ttl, about_leases.subscribe()).instrument(span));
                    }
                    Some(Order::About(about)) => {
                        // Nobody listens if the lease that it is about is lost.
                        let _heard = about_leases.send(about);
                    }
                    None => return,
                },
                Some(ended) = leases.join_next() => self.fatal.note("the task that renews a lease", ended),
            }
        }
    }
}

impl Hands {
    /// Gets a lease and renews it until it is lost or given back.
    async fn hold(self, ttl: Span, mut orders: broadcast::Receiver<About>) {
        let lease = get(&self.etcd, ttl).await;
        let id = lease.id;
        self.sink.send(DcsEvent::LeaseGranted { lease: id, valid_until: lease.valid_until() }).await;
        let every = watch::Sender::new(renewal(lease.ttl));
        let lost = keep(&self, lease, every.subscribe());
        tokio::pin!(lost);
        loop {
            tokio::select! {
                why = &mut lost => {
                    tracing::warn!(lease = id.0, why, "the lease is lost");
                    return self.sink.send(DcsEvent::LeaseLost { lease: id, why }).await;
                }
                order = orders.recv() => match order {
                    Ok(About::Pace { lease, every: wanted }) if lease == id => {
                        every.send_replace(wanted);
                    }
                    Ok(About::Forget { lease }) if lease == id => return,
                    // About another lease, or missed while this one was asked for: those cannot be about it.
                    Ok(About::Pace { .. } | About::Forget { .. })
                    | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return,
                },
            }
        }
    }
}

async fn get(etcd: &Etcd, ttl: Span) -> Lease {
    let mut pause = GRANT_PAUSE_MIN;
    loop {
        let sent = Clock::now();
        match etcd.grant(ttl).await {
            Ok((id, ttl)) => return Lease { id, ttl, sent },
            Err(error) => tracing::debug!(%error, "no lease yet"),
        }
        etcd.route().rest(jitter(pause, 30)).await;
        pause = pause.times(2).min(GRANT_PAUSE_MAX);
    }
}

/// Renews the lease for as long as it can be; says why it could not.
async fn keep(hands: &Hands, mut lease: Lease, mut every: watch::Receiver<Span>) -> String {
    let Hands { etcd, sink, pulse, .. } = hands;
    let first_try = lease.ttl.divided_by(10).max(TRY_MIN);
    let mut seen = None;
    loop {
        loop {
            let due = lease.sent + *every.borrow_and_update();
            tokio::select! {
                () = tokio::time::sleep(due.since(Clock::now()).to_std()) => break,
                Ok(()) = every.changed() => {}
            }
        }
        let (mut tries, mut try_span, mut pause) = (0_u64, first_try, RENEW_PAUSE_MIN);
        // The lease may live on in etcd after it has run out by our clock, so there is no last try.
        let sent = loop {
            if !loop_turns(pulse, lease.ttl, try_span).await {
                return format!("the bot stood still for more than {}, so renewal has ended", lease.ttl.divided_by(2));
            }
            let under_lock = is_paced_for_lock(*every.borrow(), lease.ttl);
            match hands.renew(lease.id, under_lock, try_span, &mut seen).await {
                Ok(Answer::Renewed { sent }) => break sent,
                Ok(Answer::Gone) => return String::from("etcd says that it has expired or was revoked"),
                Ok(Answer::Unproven) => {
                    tracing::debug!("a renewal was answered, by a leader that may have been replaced")
                }
                Err(error) => tracing::debug!(%error, "a renewal failed"),
            }
            tries += 1;
            // Each member is asked at once; then there is a pause, short at first, since etcd may be about to have its
            // next leader, and long in the end, so that an outage costs little; and there is more patience, so that a slow
            // network is not taken for a dead one for ever.
            if tries.is_multiple_of(etcd.members()) {
                etcd.route().rest(jitter(pause, 30)).await;
                try_span = try_span.times(2).min(lease.ttl.divided_by(3)).max(first_try);
                pause = pause.times(2).min(try_span);
            }
        };
        lease.sent = sent;
        sink.send(DcsEvent::LeaseRenewed { lease: lease.id, valid_until: lease.valid_until() }).await;
    }
}

/// What became of one try to renew a lease.
enum Answer {
    Renewed {
        sent: Time,
    },
    Gone,
    /// Whoever answered may have been replaced by a leader that has not heard of it.
    Unproven,
}

/// Whether whoever answered a renewal between two reads led etcd: a member knows no older leader than the one by whom it was
/// answered before, and a term has one leader, who led it to the second read. Across two members, or two terms, it may have been
/// one that was replaced.
fn proves(before: Option<Sighting>, after: Sighting) -> bool {
    before == Some(after)
}

impl Hands {
    /// One try at the current member. On a lease with a lock, the answer of an old etcd counts only once a read after it has
    /// shown that whoever gave it led then (decision 0002).
    async fn renew(
        &self,
        lease: LeaseId,
        under_lock: bool,
        patience: Span,
        seen: &mut Option<Sighting>,
    ) -> Result<Answer, EtcdError> {
        let (etcd, deadline) = (&self.etcd, patience.to_std());
        let member = etcd.route().current();
        let counts_alone = !under_lock || etcd.renews_only_as_leader(member, deadline).await?;
        loop {
            let sent = Clock::now();
            if !etcd.keep_alive_at(member, lease, deadline).await? {
                return Ok(Answer::Gone);
            }
            if counts_alone {
                return Ok(Answer::Renewed { sent });
            }
            let key = self.readable.get().map_or("/", String::as_str);
            let now = etcd.sighting(member, key, deadline).await?;
            let before = seen.replace(now);
            if proves(before, now) {
                return Ok(Answer::Renewed { sent });
            }
            if before.is_some_and(|before| before.member == member) {
                return Ok(Answer::Unproven);
            }
            // The first read at this address: the next renewal lies between two.
        }
    }
}

/// Whether the machine's loop has turned within less than half the lease, or does so now that it is asked.
async fn loop_turns(pulse: &Pulse, ttl: Span, patience: Span) -> bool {
    let allowed = ttl.divided_by(2);
    let give_up = Clock::now() + patience;
    while Clock::now().since(pulse.last()) >= allowed {
        if Clock::now() >= give_up {
            return false;
        }
        pulse.ask();
        tokio::time::sleep(PULSE_PAUSE.to_std()).await;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::{Sighting, proves};
    use crate::shell::dcs::route::Route;

    #[test]
    fn a_renewal_by_a_leader_that_was_replaced_does_not_count() {
        let route = Route::new(vec![String::from("a:1"), String::from("b:1")], Box::new(|_| {}));
        let member = route.current();
        route.failed(member, "gone");
        let at = |term| Sighting { member, id: 1, term };
        let elsewhere = Sighting { member: route.current(), ..at(4) };
        assert!(proves(Some(at(4)), at(4)), "one leader led from before it until after it");
        assert!(!proves(Some(at(4)), at(5)), "the old leader may have answered after the new one was elected");
        assert!(!proves(Some(elsewhere), at(4)), "this member may have known only the leader of before");
        let renamed = Sighting { id: 2, ..at(4) };
        assert!(!proves(Some(renamed), at(4)), "the address led to another member then");
        assert!(!proves(None, at(4)), "nothing is known of before");
    }
}
