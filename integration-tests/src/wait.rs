//! Waiting for conditions: look, and look again soon, until a deadline that tells what was seen. Never a sleep for luck.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};

use crate::process;

/// Between two looks. Short beside anything that is measured, long beside the cost of a look.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// What a look did not like: kept for the message of a missed deadline.
pub type Seen = String;

/// Looks until `look` yields something, and returns it.
///
/// # Errors
/// After `deadline`: `what`, what was seen last, and the ends of all logs.
pub async fn until<T, F, Fut>(what: &str, deadline: Duration, mut look: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, Seen>>,
{
    let start = Instant::now();
    let mut seen = String::from("nothing");
    loop {
        let left = deadline.saturating_sub(start.elapsed());
        // A look that is late is cut off; one that is never late must not go on for ever either.
        match tokio::time::timeout(left, look()).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(other)) => seen = other,
            Err(_elapsed) => {}
        }
        if start.elapsed() >= deadline {
            return Err(anyhow!("{what}: not within {deadline:?}; seen last: {seen}{}", process::log_tails()));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Runs `work` and says how long it took, in milliseconds.
///
/// # Errors
/// Those of `work`.
pub async fn timed<T>(work: impl Future<Output = Result<T>>) -> Result<(T, u64)> {
    let start = Instant::now();
    let done = work.await?;
    Ok((done, millis(start.elapsed())))
}

/// Whole milliseconds.
#[must_use]
pub fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::until;

    #[tokio::test]
    async fn a_condition_that_never_holds_ends_with_what_was_seen() {
        let never =
            until("it holds", Duration::from_millis(50), || async { Err::<(), _>(String::from("seven")) }).await;
        let said = never.expect_err("it never holds").to_string();
        assert!(said.starts_with("it holds: not within 50ms; seen last: seven"), "{said}");
        let stuck = until("it answers", Duration::from_millis(50), std::future::pending::<Result<(), String>>).await;
        assert!(stuck.is_err());
    }
}
