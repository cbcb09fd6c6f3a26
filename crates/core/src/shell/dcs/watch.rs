//! One watched prefix: list, watch from there on, list again now and then, and begin anew after every break. Never older than
//! what was shown.

use std::convert::Infallible;

use etcd_client::{EventType, WatchResponse};

use super::{DcsSink, Etcd, EtcdError, convert::key_value, etcd::List};
use crate::{
    dcs::{Change, DcsEvent, Revision},
    machine::{Span, Time},
    shell::{clock::Clock, entropy::jitter},
};

/// The first pause after a break, and the longest. Who led waits for a store that comes back, and clients wait with it; one that is
/// gone is asked in vain some twice a second.
const PAUSE_MIN: Span = Span::from_millis(50);
const PAUSE_MAX: Span = Span::from_millis(500);

/// A watch that lived for this long was a good one: the next break begins with the shortest pause.
const GOOD_AFTER: Span = Span::from_secs(5);

/// A watch that shows nothing is compared with a list this often: a member whose disk has stalled answers pings, and falls behind.
/// One request a minute is what an idle bot can spare.
pub(super) const AUDIT_INTERVAL: Span = Span::from_secs(60);

/// For this long every answer may be older than what was shown: a member that was restored by mistake is passed over by then.
const OLDER_MAX: Span = Span::from_secs(30);

/// Shows everything below `prefix` to `sink`. Ends, with the reason, only if etcd has forgotten what was shown.
pub(super) async fn follow(etcd: Etcd, prefix: String, sink: DcsSink) -> String {
    let mut follower = Follower { etcd, prefix, sink, shown: Shown::default(), listed_at: None, finds_older: false };
    let mut pause = PAUSE_MIN;
    loop {
        let Err(broken) = follower.until_broken().await;
        let (Broken::Again(why) | Broken::Forgotten(why)) = &broken;
        if let Some(since) = follower.listed_at.take() {
            if Clock::now().since(since) >= GOOD_AFTER {
                pause = PAUSE_MIN;
            }
            let (prefix, why) = (follower.prefix.clone(), why.clone());
            tracing::debug!(prefix, why, "a watch broke");
            follower.sink.send(DcsEvent::WatchLost { prefix, why }).await;
        }
        if let Broken::Forgotten(why) = broken {
            return why;
        }
        if std::mem::take(&mut follower.finds_older) {
            // It answers, and an answer to anybody makes it no newer.
            tokio::time::sleep(jitter(pause, 50).to_std()).await;
        } else {
            follower.etcd.route().rest(jitter(pause, 50)).await;
        }
        pause = pause.times(2).min(PAUSE_MAX);
    }
}

/// Why a watch has ended.
enum Broken {
    /// The next one goes on from what was shown.
    Again(String),
    /// None can: etcd will never again know what was shown.
    Forgotten(String),
}

impl From<EtcdError> for Broken {
    fn from(error: EtcdError) -> Self {
        Self::Again(error.to_string())
    }
}

struct Follower {
    etcd: Etcd,
    prefix: String,
    sink: DcsSink,
    shown: Shown,
    /// When the present watch began; nothing while there is none.
    listed_at: Option<Time>,
    /// The last member that answered knows less than was shown.
    finds_older: bool,
}

/// What was shown, and what that says of whoever answers.
#[derive(Default)]
struct Shown {
    /// The newest revision that was shown.
    revision: Revision,
    /// The cluster that showed it.
    cluster: Option<u64>,
    /// Since when every answer has been older.
    older_since: Option<Time>,
}

impl Shown {
    /// Takes in that `cluster` has answered as of `revision`.
    fn take_in(&mut self, now: Time, cluster: u64, revision: Revision) -> Result<(), Broken> {
        const WAY_OUT: &str = "the bot must start anew to go by what etcd holds now";
        if let Some(known) = self.cluster.filter(|known| *known != cluster) {
            return Err(Broken::Forgotten(format!(
                "etcd is another cluster than before ({cluster:x}, not {known:x}): {WAY_OUT}"
            )));
        }
        if revision < self.revision {
            // A member restored from a backup, or another cluster: what we know is newer.
            let since = *self.older_since.get_or_insert(now);
            let why = format!("revision {} is older than {}, which it had before", revision.0, self.revision.0);
            return Err(if now.since(since) >= OLDER_MAX {
                Broken::Forgotten(format!("etcd was set back, to a backup perhaps: {why}: {WAY_OUT}"))
            } else {
                Broken::Again(why)
            });
        }
        *self = Self { revision, cluster: Some(cluster), older_since: None };
        Ok(())
    }
}

impl Follower {
    async fn until_broken(&mut self) -> Result<Infallible, Broken> {
        let listed = self.etcd.list_anywhere(&self.prefix).await;
        self.show_all(listed).await?;
        self.listed_at = Some(Clock::now());

        let from = Revision(self.shown.revision.0 + 1);
        let (member, mut stream) = self.etcd.open_watch(&self.prefix, from).await?;
        let etcd = self.etcd.clone();
        let (elsewhere, audit) = (etcd.route().settled_elsewhere(member), audit_due(&etcd));
        tokio::pin!(elsewhere, audit);
        loop {
            let message = tokio::select! {
                message = stream.message() => message,
                () = &mut elsewhere => {
                    return Err(Broken::Again(String::from("the member went silent; another one answers")));
                }
                () = &mut audit => {
                    let listed = etcd.list_at(member, &self.prefix).await;
                    self.show_all(listed).await?;
                    audit.set(audit_due(&etcd));
                    continue;
                }
            };
            match message {
                Ok(Some(response)) => self.show(&response).await?,
                Ok(None) => return Err(Broken::Again(String::from("the member ended the watch"))),
                Err(error) => {
                    etcd.route().failed(member, &error.to_string());
                    return Err(Broken::Again(error.to_string()));
                }
            }
        }
    }

    /// Shows a whole list, unless it is older than what was shown.
    async fn show_all(&mut self, listed: Result<List, EtcdError>) -> Result<(), Broken> {
        let what = format!("the list of {}", self.prefix);
        let List { cluster, revision, entries } = match listed {
            Ok(list) => list,
            Err(error) => {
                if let EtcdError::Refused(why) = &error {
                    self.etcd.route().refused(&what, why);
                }
                return Err(error.into());
            }
        };
        self.etcd.route().accepted(&what);
        if let Err(broken) = self.shown.take_in(Clock::now(), cluster, revision) {
            let (Broken::Again(why) | Broken::Forgotten(why)) = &broken;
            self.etcd.route().failed(self.etcd.route().current(), why);
            self.finds_older = true;
            return Err(broken);
        }
        self.sink.send(DcsEvent::Listed { prefix: self.prefix.clone(), revision, entries }).await;
        Ok(())
    }

    async fn show(&mut self, response: &WatchResponse) -> Result<(), Broken> {
        if response.compact_revision() > 0 {
            let why = format!("history up to revision {} was compacted away", response.compact_revision());
            return Err(Broken::Again(why));
        }
        if response.canceled() {
            return Err(Broken::Again(format!("etcd cancelled the watch: {}", response.cancel_reason())));
        }
        let changes: Vec<Change> = response.events().iter().filter_map(|e| self.newer(e)).collect();
        // The header may be ahead of the changes that this response brings; only what is shown counts.
        let Some(revision) = changes.iter().map(revision_of).max() else { return Ok(()) };
        self.shown.revision = revision;
        self.sink.send(DcsEvent::Changed { prefix: self.prefix.clone(), revision, changes }).await;
        Ok(())
    }

    fn newer(&self, event: &etcd_client::Event) -> Option<Change> {
        let kv = key_value(event.kv()?);
        if kv.modified <= self.shown.revision {
            return None;
        }
        Some(match event.event_type() {
            EventType::Put => Change::Put(kv),
            EventType::Delete => Change::Deleted { key: kv.key, revision: kv.modified },
        })
    }
}

const fn revision_of(change: &Change) -> Revision {
    match change {
        Change::Put(kv) => kv.modified,
        Change::Deleted { revision, .. } => *revision,
    }
}

fn audit_due(etcd: &Etcd) -> tokio::time::Sleep {
    tokio::time::sleep(jitter(etcd.audit_interval(), 20).to_std())
}

#[cfg(test)]
mod tests {
    use super::{Broken, OLDER_MAX, Revision, Shown, Time};
    use crate::machine::Span;

    fn says(shown: &mut Shown, now: Time, cluster: u64, revision: u64) -> &'static str {
        match shown.take_in(now, cluster, Revision(revision)) {
            Ok(()) => "newer",
            Err(Broken::Again(_)) => "older",
            Err(Broken::Forgotten(_)) => "forgotten",
        }
    }

    #[test]
    fn a_store_that_was_set_back_is_given_time_and_then_given_up() {
        let (mut shown, began) = (Shown::default(), Time::from_millis(1_000));
        assert_eq!(says(&mut shown, began, 7, 9), "newer");
        assert_eq!(says(&mut shown, began, 7, 8), "older");
        // One of three that was set back is passed over, and the others are as they were.
        assert_eq!(says(&mut shown, began + OLDER_MAX, 7, 9), "newer");
        let again = began + OLDER_MAX;
        assert_eq!(says(&mut shown, again, 7, 5), "older");
        assert_eq!(says(&mut shown, again + OLDER_MAX - Span::from_millis(1), 7, 6), "older");
        assert_eq!(says(&mut shown, again + OLDER_MAX, 7, 6), "forgotten");
    }

    #[test]
    fn another_cluster_knows_nothing_of_what_was_shown() {
        let (mut shown, now) = (Shown::default(), Time::from_millis(1_000));
        assert_eq!(says(&mut shown, now, 7, 9), "newer");
        assert_eq!(says(&mut shown, now, 8, 12), "forgotten");
    }
}
