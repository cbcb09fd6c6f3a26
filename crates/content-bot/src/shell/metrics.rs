//! What a content bot counts.

use bots_core::shell::Metrics;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};

/// The counters; clones share.
#[derive(Debug, Clone, Default)]
pub struct ContentMetrics {
    /// Announcements that were accepted.
    pub pushes: Counter,
    /// Announcements with a wrong signature or none.
    pub pushes_refused: Counter,
    /// Announcements of other branches or other events.
    pub pushes_ignored: Counter,
    /// Announcements that were played back.
    pub pushes_replayed: Counter,
    /// Pushes that the poll found and nobody had announced.
    pub webhook_missed: Counter,
    /// Looks at the origin.
    pub looks: Counter,
    /// Looks that failed.
    pub looks_failed: Counter,
    /// When the origin answered last, in seconds since 1970: tells how stale the bot may be.
    pub last_answer_seconds: Gauge,
    /// Fetches.
    pub fetches: Counter,
    /// Fetches that brought nothing.
    pub fetches_failed: Counter,
    /// Packs handed out.
    pub packs: Counter,
    /// Rounds of purging caches.
    pub purges: Counter,
    /// Rounds of purging that failed.
    pub purges_failed: Counter,
    /// Trees that were put on disk, or looked through.
    pub exports: Counter,
    /// Trees that could not be.
    pub exports_failed: Counter,
}

impl ContentMetrics {
    /// Counters that stand in the bot's registry.
    #[must_use]
    pub fn registered(metrics: &Metrics) -> Self {
        let own = Self::default();
        metrics.with(|r| {
            r.register("content_pushes", "Push announcements accepted", own.pushes.clone());
            r.register(
                "content_pushes_refused",
                "Push announcements with a wrong signature or none",
                own.pushes_refused.clone(),
            );
            r.register(
                "content_pushes_ignored",
                "Push announcements of other branches or events",
                own.pushes_ignored.clone(),
            );
            r.register(
                "content_pushes_replayed",
                "Push announcements that came a second time",
                own.pushes_replayed.clone(),
            );
            r.register(
                "webhook_missed",
                "Pushes that the poll found and that no webhook had announced",
                own.webhook_missed.clone(),
            );
            r.register("content_looks", "Looks at the origin", own.looks.clone());
            r.register("content_looks_failed", "Looks at the origin that failed", own.looks_failed.clone());
            r.register(
                "content_origin_last_answer_seconds",
                "When the origin answered last, in seconds since 1970",
                own.last_answer_seconds.clone(),
            );
            r.register("content_fetches", "Fetches from the origin", own.fetches.clone());
            r.register("content_fetches_failed", "Fetches that brought nothing", own.fetches_failed.clone());
            r.register("content_packs", "Packs handed out", own.packs.clone());
            r.register("content_purges", "Rounds in which the caches in front were purged", own.purges.clone());
            r.register("content_purges_failed", "Rounds of purging that failed", own.purges_failed.clone());
            r.register("content_exports", "Commits put on disk as files", own.exports.clone());
            r.register("content_exports_failed", "Exports that failed", own.exports_failed.clone());
        });
        own
    }
}
