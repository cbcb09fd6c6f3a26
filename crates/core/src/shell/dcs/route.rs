//! Which etcd member to talk to: one current choice for the whole process, moved on by whoever sees it fail.
//!
//! The client library balances over all its endpoints, dead ones included; so every client of ours has one endpoint, and
//! this is the rotation. A watch on a member that went silent learns here that another one answers.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::watch;

use crate::{machine::Span, shell::entropy};

/// Two that are answered in turn and fail in turn wake each other no faster than this.
const REST_MIN: Span = Span::from_millis(50);

/// The index of a member in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Member(usize);

type OnTrouble = Box<dyn Fn(Option<String>) + Send + Sync>;

pub(super) struct Route {
    addresses: Vec<String>,
    current: AtomicUsize,
    /// The last member that answered.
    settled: watch::Sender<Member>,
    /// How often a member has answered after one had not.
    recoveries: watch::Sender<u64>,
    troubles: Mutex<Troubles>,
    on_trouble: OnTrouble,
}

/// What is wrong, each until its own good news.
#[derive(Default)]
struct Troubles {
    /// No member answers.
    silence: Option<String>,
    /// What etcd refuses, and its words.
    refusals: BTreeMap<String, String>,
}

impl Troubles {
    fn worst(&self) -> Option<String> {
        let refusal = || self.refusals.iter().next().map(|(what, why)| format!("etcd refuses {what}: {why}"));
        self.silence.clone().or_else(refusal)
    }
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
            recoveries: watch::Sender::new(0),
            troubles: Mutex::default(),
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
        let text = format!("etcd {} does not answer: {why}", self.address(member));
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        if troubles.silence.is_none() {
            tracing::warn!(member = self.address(member), why, "etcd does not answer; trying the next member");
        }
        (self.on_trouble)(Some(text.clone()));
        troubles.silence = Some(text);
    }

    /// `member` answered.
    pub(super) fn answered(&self, member: Member) {
        if self.current() != member {
            return;
        }
        self.settled.send_if_modified(|settled| std::mem::replace(settled, member) != member);
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        if troubles.silence.take().is_some() {
            tracing::info!(member = self.address(member), "etcd answers");
            (self.on_trouble)(troubles.worst());
            self.recoveries.send_modify(|times| *times += 1);
        }
    }

    /// etcd answers, and will not do `what`: another member would say the same.
    pub(super) fn refused(&self, what: &str, why: &str) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        if troubles.refusals.insert(what.to_owned(), why.to_owned()).is_none() {
            tracing::warn!(what, why, "etcd refuses");
        }
        (self.on_trouble)(troubles.worst());
    }

    /// etcd does `what`.
    pub(super) fn accepted(&self, what: &str) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        if troubles.refusals.remove(what).is_some() {
            tracing::info!(what, "etcd does it again");
            (self.on_trouble)(troubles.worst());
        }
    }

    /// A pause before the next try: who fails at the same etcd tries again as soon as anybody is answered, but never at once.
    pub(super) async fn rest(&self, pause: Span) {
        let mut recoveries = self.recoveries.subscribe();
        let (pause, least) = (pause.to_std(), pause.min(REST_MIN).to_std());
        tokio::time::sleep(least).await;
        tokio::select! {
            () = tokio::time::sleep(pause.saturating_sub(least)) => {}
            Ok(()) = recoveries.changed() => {}
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
    use std::{
        sync::{Arc, Mutex},
        time::Duration,
    };

    use super::Route;
    use crate::machine::Span;

    #[tokio::test]
    async fn a_pause_ends_with_the_first_answer_that_anybody_gets() {
        let route = Arc::new(Route::new(vec![String::from("a:1")], Box::new(|_| {})));
        let only = route.current();
        route.failed(only, "gone");
        let resting = Arc::clone(&route);
        let rest = tokio::spawn(async move { resting.rest(Span::from_secs(3_600)).await });
        while route.recoveries.receiver_count() == 0 {
            tokio::task::yield_now().await;
        }
        route.answered(only);
        tokio::time::timeout(Duration::from_secs(20), rest).await.expect("it ends").expect("no panic");
        // What goes on answering is no news.
        route.answered(only);
        let long = tokio::time::timeout(Duration::from_millis(50), route.rest(Span::from_secs(3_600))).await;
        assert!(long.is_err(), "it goes on");
    }

    #[test]
    fn a_refusal_is_told_until_that_very_thing_is_done() {
        let told = Arc::new(Mutex::new(None));
        let hears = Arc::clone(&told);
        let route = Route::new(vec![String::from("a:1")], Box::new(move |trouble| *hears.lock().expect("") = trouble));
        let told = || told.lock().expect("nobody panics").clone();
        let only = route.current();
        route.refused("the list of /s/", "permission denied");
        route.answered(only);
        assert_eq!(
            told().as_deref(),
            Some("etcd refuses the list of /s/: permission denied"),
            "other answers cure nothing"
        );
        route.failed(only, "gone");
        assert!(told().is_some_and(|trouble| trouble.contains("does not answer")));
        route.answered(only);
        assert!(told().is_some_and(|trouble| trouble.contains("permission denied")));
        route.accepted("a write");
        assert!(told().is_some());
        route.accepted("the list of /s/");
        assert_eq!(told(), None);
    }

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
