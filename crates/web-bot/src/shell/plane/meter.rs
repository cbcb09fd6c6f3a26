//! The meter: how many requests are in flight, how many there were, how long they took. Counts; decides nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bots_core::{shell::Clock, wire::WebLoad};
use tokio::sync::Notify;

/// Response times are counted in steps of an eighth of a power of two: enough for a percentile, small enough to keep.
const BUCKETS: usize = 8 * 34;

/// After a silence of this length nobody samples any more, and the silence must not thin out the next sample.
const SILENCE_US: u64 = 1_000_000;

/// Counts requests. Clones share.
#[derive(Clone)]
pub(crate) struct Meter {
    inner: Arc<Inner>,
}

struct Inner {
    figures: Mutex<Figures>,
    /// Wakes who waits for a request after silence.
    busy: Notify,
    /// Wakes who waits for the end of the last request.
    still: Notify,
}

struct Figures {
    in_flight: u64,
    /// Requests in flight, summed over microseconds, since the last sample.
    area: u64,
    touched_us: u64,
    sampled_us: u64,
    ended: u64,
    times: [u32; BUCKETS],
    total: u64,
    of_commit: OfCommit,
}

/// What is counted for the commit that is served, and for no other.
#[derive(Default)]
struct OfCommit {
    sha: String,
    /// How many requests there were before it was served.
    total_before: u64,
    errors: u64,
}

/// A request in flight, until it is dropped.
pub(crate) struct InFlight {
    meter: Meter,
    began_us: u64,
}

impl Meter {
    /// A meter that has seen nothing.
    pub(crate) fn new() -> Self {
        let now = Clock::micros();
        let figures = Figures {
            in_flight: 0,
            area: 0,
            touched_us: now,
            sampled_us: now,
            ended: 0,
            times: [0; BUCKETS],
            total: 0,
            of_commit: OfCommit::default(),
        };
        Self { inner: Arc::new(Inner { figures: Mutex::new(figures), busy: Notify::new(), still: Notify::new() }) }
    }

    /// A request begins.
    pub(crate) fn begin(&self) -> InFlight {
        let began_us = Clock::micros();
        let mut figures = self.figures();
        figures.touch(began_us);
        if figures.is_silent() && began_us.saturating_sub(figures.sampled_us) > SILENCE_US {
            figures.sampled_us = began_us;
        }
        figures.in_flight += 1;
        figures.total += 1;
        drop(figures);
        self.inner.busy.notify_one();
        InFlight { meter: self.clone(), began_us }
    }

    /// A commit is served from now on; if it is another one, its errors are counted from zero.
    pub(crate) fn follow(&self, sha: &str) {
        let mut figures = self.figures();
        if figures.of_commit.sha != sha {
            let total_before = figures.total;
            figures.of_commit = OfCommit { sha: sha.to_owned(), total_before, errors: 0 };
        }
    }

    /// A request to a commit was answered with a status of 500 or above.
    pub(crate) fn failed(&self, sha: &str) {
        let mut figures = self.figures();
        if figures.of_commit.sha == sha {
            figures.of_commit.errors = figures.of_commit.errors.saturating_add(1);
        }
    }

    /// Requests in flight at this moment, and all there ever were.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let figures = self.figures();
        (figures.in_flight, figures.total)
    }

    /// What happened since the last sample, and whether anything is in flight.
    pub(crate) fn sample(&self) -> (WebLoad, bool) {
        let now = Clock::micros();
        let mut figures = self.figures();
        figures.touch(now);
        let span = now.saturating_sub(figures.sampled_us).max(1);
        let load = WebLoad {
            in_flight_milli: figures.area.saturating_mul(1_000) / span,
            rps: figures.ended.saturating_mul(1_000_000) / span,
            p99_us: figures.percentile(99),
            requests: figures.total.saturating_sub(figures.of_commit.total_before),
            errors: figures.of_commit.errors,
        };
        (figures.area, figures.ended, figures.sampled_us, figures.times) = (0, 0, now, [0; BUCKETS]);
        (load, figures.in_flight > 0)
    }

    /// Waits until a request begins.
    pub(crate) async fn busy(&self) {
        self.inner.busy.notified().await;
    }

    /// Waits until nothing is in flight.
    pub(crate) async fn still(&self) {
        loop {
            let still = self.inner.still.notified();
            tokio::pin!(still);
            // Registered before the look, so that an end between look and wait is not missed.
            still.as_mut().enable();
            if self.counts().0 == 0 {
                return;
            }
            still.await;
        }
    }

    fn figures(&self) -> MutexGuard<'_, Figures> {
        self.inner.figures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Figures {
    const fn is_silent(&self) -> bool {
        self.in_flight == 0 && self.ended == 0
    }

    fn touch(&mut self, now_us: u64) {
        let span = now_us.saturating_sub(self.touched_us);
        self.area = self.area.saturating_add(self.in_flight.saturating_mul(span));
        self.touched_us = self.touched_us.max(now_us);
    }

    fn percentile(&self, percent: u64) -> u64 {
        let rank = (self.ended * percent).div_ceil(100);
        let mut seen = 0;
        for (bucket, count) in self.times.iter().enumerate() {
            seen += u64::from(*count);
            if rank > 0 && seen >= rank {
                return upper_bound(bucket);
            }
        }
        0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let now = Clock::micros();
        let mut figures = self.meter.figures();
        figures.touch(now);
        figures.in_flight -= 1;
        figures.ended += 1;
        let bucket = bucket(now.saturating_sub(self.began_us));
        figures.times[bucket] = figures.times[bucket].saturating_add(1);
        let still = figures.in_flight == 0;
        drop(figures);
        if still {
            self.meter.inner.still.notify_waiters();
        }
    }
}

/// The bucket of a time: itself below eight, then eight to a power of two.
fn bucket(us: u64) -> usize {
    let index = match us {
        0..8 => us,
        _ => {
            let power = u64::from(us.ilog2());
            (power - 2) * 8 + ((us >> (power - 3)) & 7)
        }
    };
    usize::try_from(index).unwrap_or(usize::MAX).min(BUCKETS - 1)
}

/// The greatest time that falls into a bucket.
fn upper_bound(bucket: usize) -> u64 {
    let bucket = u64::try_from(bucket).unwrap_or(u64::MAX);
    match bucket {
        0..8 => bucket,
        _ => {
            let (power, step) = (bucket / 8 + 2, bucket % 8);
            ((8 + step + 1) << (power - 3)) - 1
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_falls_into_them() {
        for us in (0..5_000).chain([1 << 20, (1 << 30) + 12_345, u64::from(u32::MAX)]) {
            let bucket = bucket(us);
            assert!(us <= upper_bound(bucket), "{us} in {bucket}");
            assert!(bucket == 0 || us > upper_bound(bucket - 1), "{us} in {bucket}");
            assert!(upper_bound(bucket) - us <= us / 8, "{us} in {bucket} is off by more than an eighth");
        }
    }

    #[tokio::test]
    async fn what_is_in_flight_is_weighed_by_time() {
        let meter = Meter::new();
        let (first, second) = (meter.begin(), meter.begin());
        tokio::time::sleep(std::time::Duration::from_millis(60)).await;
        drop(first);
        let (load, busy) = meter.sample();
        assert!((1_500..=2_000).contains(&load.in_flight_milli), "{load:?}");
        assert!(busy && load.p99_us >= 60_000, "{load:?}");
        drop(second);
        meter.still().await;
        assert_eq!(meter.counts(), (0, 2));
    }

    #[test]
    fn errors_are_counted_for_the_commit_that_is_served() {
        let meter = Meter::new();
        let counts = || {
            let (load, _busy) = meter.sample();
            (load.requests, load.errors)
        };
        meter.follow("a");
        drop(meter.begin());
        drop(meter.begin());
        meter.failed("a");
        assert_eq!(counts(), (2, 1));
        meter.follow("b");
        drop(meter.begin());
        // An answer of the commit before, that came late.
        meter.failed("a");
        assert_eq!(counts(), (1, 0));
        meter.follow("b");
        assert_eq!(counts(), (1, 0));
    }
}
