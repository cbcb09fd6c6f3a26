//! Which etcd member to talk to: one current choice for the whole process, moved on by whoever sees it fail.
//!
//! The client library balances over all its endpoints, dead ones included; so every client of ours has one endpoint, and
//! this is the rotation. A watch on a member that went silent learns here that another one answers.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::watch;

use crate::shell::entropy;

/// The index of a member in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Member(usize);

type OnTrouble = Box<dyn Fn(Option<String>) + Send + Sync>;

pub(super) struct Route {
    addresses: Vec<String>,
    current: AtomicUsize,
    /// The last member that answered.
    settled: watch::Sender<Member>,
    trouble: Mutex<Option<String>>,
    on_trouble: OnTrouble,
}

impl Route {
    /// Begins at any of the members, so that a fleet spreads over them.
    pub(super) fn new(addresses: Vec<String>, on_trouble: OnTrouble) -> Self {
        assert!(!addresses.is_empty(), "the configuration was checked to name a member");
        let first = entropy::below(addresses.len());
        Self {
            addresses,
            current: AtomicUsize::new(first),
            settled: watch::Sender::new(Member(first)),
            trouble: Mutex::new(None),
            on_trouble,
        }
    }

    /// How many members there are.
    pub(super) fn len(&self) -> usize {
        self.addresses.len()
    }

    pub(super) fn address(&self, member: Member) -> &str {
        &self.addresses[member.0]
    }

    pub(super) const fn index(member: Member) -> usize {
        member.0
    }

    /// The member to ask now.
    pub(super) fn current(&self) -> Member {
        Member(self.current.load(Ordering::Acquire))
    }

    /// `member` did not answer: whoever asks next asks the next one.
    pub(super) fn failed(&self, member: Member, why: &str) {
        let next = (member.0 + 1) % self.addresses.len();
        let _moved_by_another = self.current.compare_exchange(member.0, next, Ordering::AcqRel, Ordering::Acquire);
        let is_new = self.set_trouble(format!("etcd {} does not answer: {why}", self.address(member)));
        if is_new {
            tracing::warn!(member = self.address(member), why, "etcd does not answer; trying the next member");
        }
    }

    /// `member` does not let us in; the others know no more of us than it does.
    pub(super) fn refused(&self, member: Member, why: &str) {
        let is_new = self.set_trouble(format!("etcd {} refuses: {why}", self.address(member)));
        if is_new {
            tracing::error!(member = self.address(member), why, "etcd does not let us in");
        }
    }

    /// Says what the trouble is; yields whether there was none before.
    fn set_trouble(&self, text: String) -> bool {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        (self.on_trouble)(Some(text.clone()));
        trouble.replace(text).is_none()
    }

    /// `member` answered.
    pub(super) fn answered(&self, member: Member) {
        if self.current() != member {
            return;
        }
        self.settled.send_if_modified(|settled| std::mem::replace(settled, member) != member);
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if trouble.take().is_some() {
            tracing::info!(member = self.address(member), "etcd answers");
            (self.on_trouble)(None);
        }
    }

    /// Returns once a member other than `member` has answered since it failed.
    pub(super) async fn settled_elsewhere(&self, member: Member) {
        let mut settled = self.settled.subscribe();
        let _sender_lives = settled.wait_for(|at| *at != member).await;
    }
}

#[cfg(test)]
mod tests {
    use super::Route;

    #[test]
    fn the_first_to_see_a_failure_moves_on_and_the_others_follow() {
        let route = Route::new(vec![String::from("a:1"), String::from("b:1")], Box::new(|_| {}));
        let first = route.current();
        route.failed(first, "gone");
        let second = route.current();
        assert_ne!(first, second);
        route.failed(first, "gone");
        assert_eq!(route.current(), second, "a late report of the same failure changes nothing");
    }
}
