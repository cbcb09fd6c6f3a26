//! One watched prefix: list, watch from there on, and begin again after every break. Never older than what was shown.

use std::convert::Infallible;

use etcd_client::{EventType, WatchResponse};

use super::{DcsSink, Etcd};
use crate::{
    dcs::{Change, DcsEvent, Revision},
    machine::{Span, Time},
    shell::{clock::Clock, dcs::etcd::key_value, entropy::jitter},
};

/// The first pause after a break, and the longest. Who led waits for a store that comes back, and clients wait with it; one that is
/// gone is asked in vain some twice a second.
const PAUSE_MIN: Span = Span::from_millis(50);
const PAUSE_MAX: Span = Span::from_millis(500);

/// A watch that lived for this long was a good one: the next break begins with the shortest pause.
const GOOD_AFTER: Span = Span::from_secs(5);

/// Shows everything below `prefix` to `sink`, for ever.
pub(super) async fn follow(etcd: Etcd, prefix: String, sink: DcsSink) {
    let mut follower = Follower { etcd, prefix, sink, shown: Revision(0), listed_at: None, finds_older: false };
    let mut pause = PAUSE_MIN;
    loop {
        let Err(why) = follower.until_broken().await;
        if let Some(since) = follower.listed_at.take() {
            if Clock::now().since(since) >= GOOD_AFTER {
                pause = PAUSE_MIN;
            }
            let prefix = follower.prefix.clone();
            tracing::debug!(prefix, why, "a watch broke");
            follower.sink.send(DcsEvent::WatchLost { prefix, why }).await;
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

struct Follower {
    etcd: Etcd,
    prefix: String,
    sink: DcsSink,
    /// The newest revision that was shown.
    shown: Revision,
    /// When the present watch began; nothing while there is none.
    listed_at: Option<Time>,
    /// The last member that answered knows less than was shown.
    finds_older: bool,
}

impl Follower {
    async fn until_broken(&mut self) -> Result<Infallible, String> {
        let (revision, entries) = self.etcd.list(&self.prefix).await.map_err(|e| e.to_string())?;
        if revision < self.shown {
            // A member restored from a backup, or another cluster: what we know is newer.
            let member = self.etcd.route().current();
            let why = format!("revision {} is older than {}, which it had before", revision.0, self.shown.0);
            self.etcd.route().failed(member, &why);
            self.finds_older = true;
            return Err(why);
        }
        self.shown = revision;
        self.listed_at = Some(Clock::now());
        self.sink.send(DcsEvent::Listed { prefix: self.prefix.clone(), revision, entries }).await;

        let from = Revision(revision.0 + 1);
        let (member, mut stream) = self.etcd.open_watch(&self.prefix, from).await.map_err(|e| e.to_string())?;
        let etcd = self.etcd.clone();
        let elsewhere = etcd.route().settled_elsewhere(member);
        tokio::pin!(elsewhere);
        loop {
            let message = tokio::select! {
                message = stream.message() => message,
                () = &mut elsewhere => return Err(String::from("the member went silent; another one answers")),
            };
            match message {
                Ok(Some(response)) => self.show(&response).await?,
                Ok(None) => return Err(String::from("the member ended the watch")),
                Err(error) => {
                    etcd.route().failed(member, &error.to_string());
                    return Err(error.to_string());
                }
            }
        }
    }

    async fn show(&mut self, response: &WatchResponse) -> Result<(), String> {
        if response.compact_revision() > 0 {
            return Err(format!("history up to revision {} was compacted away", response.compact_revision()));
        }
        if response.canceled() {
            return Err(format!("etcd cancelled the watch: {}", response.cancel_reason()));
        }
        let changes: Vec<Change> = response.events().iter().filter_map(|e| self.newer(e)).collect();
        // The header may be ahead of the changes that this response brings; only what is shown counts.
        let Some(revision) = changes.iter().map(revision_of).max() else { return Ok(()) };
        self.shown = revision;
        self.sink.send(DcsEvent::Changed { prefix: self.prefix.clone(), revision, changes }).await;
        Ok(())
    }

    fn newer(&self, event: &etcd_client::Event) -> Option<Change> {
        let kv = key_value(event.kv()?);
        if kv.modified <= self.shown {
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
