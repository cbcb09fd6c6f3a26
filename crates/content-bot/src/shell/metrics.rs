//! What a content bot counts.

use bots_core::shell::Metrics;
use prometheus_client::metrics::{
    counter::Counter,
    gauge::Gauge,
    histogram::{Histogram, exponential_buckets},
};

/// Milliseconds on a good day, and up to a quarter of a minute.
fn flip_buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

/// The counters; clones share.
#[derive(Debug, Clone)]
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
    /// From when a commit went live until every serving web bot served it, as this bot saw it when it led.
    pub flip_seconds: Histogram,
    /// Of that, between the first and the last web bot.
    pub flip_skew_seconds: Histogram,
}

impl Default for ContentMetrics {
    /// Figures that nobody reads.
    fn default() -> Self {
        Self::registered(&Metrics::new())
    }
}

impl ContentMetrics {
    /// Counters that stand in the bot's registry.
    #[must_use]
    pub fn registered(metrics: &Metrics) -> Self {
        let counter = |name, help| metrics.counter(name, help);
        Self {
            pushes: counter("content_pushes", "Push announcements accepted"),
            pushes_refused: counter("content_pushes_refused", "Push announcements with a wrong signature or none"),
            pushes_ignored: counter("content_pushes_ignored", "Push announcements of other branches or events"),
            pushes_replayed: counter("content_pushes_replayed", "Push announcements that came a second time"),
            webhook_missed: counter("webhook_missed", "Pushes that the poll found and that no webhook had announced"),
            looks: counter("content_looks", "Looks at the origin"),
            looks_failed: counter("content_looks_failed", "Looks at the origin that failed"),
            last_answer_seconds: metrics
                .gauge("content_origin_last_answer_seconds", "When the origin answered last, in seconds since 1970"),
            fetches: counter("content_fetches", "Fetches from the origin"),
            fetches_failed: counter("content_fetches_failed", "Fetches that brought nothing"),
            packs: counter("content_packs", "Packs handed out"),
            purges: counter("content_purges", "Rounds in which the caches in front were purged"),
            purges_failed: counter("content_purges_failed", "Rounds of purging that failed"),
            exports: counter("content_exports", "Commits put on disk as files"),
            exports_failed: counter("content_exports_failed", "Exports that failed"),
            flip_seconds: metrics.histogram(
                "content_flip_seconds",
                "From when a commit went live until every serving web bot served it",
                flip_buckets,
            ),
            flip_skew_seconds: metrics.histogram(
                "content_flip_skew_seconds",
                "From when the first serving web bot served a commit that went live until the last one did",
                flip_buckets,
            ),
        }
    }
}
