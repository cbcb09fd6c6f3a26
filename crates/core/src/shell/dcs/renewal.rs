//! Lease renewal: a thread with a runtime and connections of its own, so that no other work can delay it.
//!
//! A lease is counted from when its renewal was *sent*. When the machine's loop stands still, renewal ends: a zombie must
//! not keep a lock.

use std::{io, thread};

use tokio::{
    sync::{broadcast, mpsc, watch},
    task::JoinSet,
};
use tracing::Instrument;

use super::{DcsSink, Etcd};
use crate::{
    dcs::{DcsEvent, LeaseId},
    machine::{Span, Time},
    membership::renewal,
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
    Grant { ttl: Span, hands: Hands },
    About(About),
}

/// An order about a lease that there is.
#[derive(Debug, Clone, Copy)]
enum About {
    Pace { lease: LeaseId, every: Span },
    Forget { lease: LeaseId },
}

impl Renewals {
    pub(super) fn start(etcd: Etcd) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (sender, orders) = mpsc::channel(ORDERS_MAX);
        let renewer = Renewer { orders };
        thread::Builder::new().name(String::from("lease")).spawn(move || runtime.block_on(renewer.run()))?;
        Ok(Self { orders: sender, etcd })
    }

    pub(super) fn of(&self, sink: DcsSink, pulse: Pulse) -> Renewal {
        let span = tracing::Span::current();
        Renewal { orders: self.orders.clone(), hands: Hands { etcd: self.etcd.clone(), sink, pulse, span } }
    }
}

impl Renewal {
    pub(super) fn grant(&self, ttl: Span) {
        self.order(Order::Grant { ttl, hands: self.hands.clone() });
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
}

/// What each lease's task works with.
#[derive(Clone)]
struct Hands {
    etcd: Etcd,
    sink: DcsSink,
    pulse: Pulse,
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
                Some(_ended) = leases.join_next() => {}
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
        let lost = keep(&self.etcd, &self.sink, &self.pulse, lease, every.subscribe());
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
async fn keep(
    etcd: &Etcd,
    sink: &DcsSink,
    pulse: &Pulse,
    mut lease: Lease,
    mut every: watch::Receiver<Span>,
) -> String {
    let first_try = lease.ttl.divided_by(10).max(TRY_MIN);
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
            let sent = Clock::now();
            match etcd.keep_alive_at_current(lease.id, try_span.to_std()).await {
                Ok(true) => break sent,
                Ok(false) => return String::from("etcd says that it has expired or was revoked"),
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
