//! Lets commits go that wait, when `synchronous_standby_names` has changed. Postgres looks whether it may acknowledge them whenever a
//! standby answers; one that had flushed them before it was waited for has answered already, and does not again before there is
//! more to flush. If all clients wait, nobody writes: so the bot does.

use std::time::Duration;

use anyhow::Context;

use super::{hands::Hands, server::connect};

/// Nobody says when the last process of the server has read its files anew: it takes a few milliseconds, and on a saturated machine some
/// hundred. Each of these costs a hundred bytes of log.
const AFTER: [Duration; 4] =
    [Duration::from_millis(15), Duration::from_millis(50), Duration::from_millis(150), Duration::from_millis(400)];

/// Its own commits wait for nobody.
const OPTIONS: &str = "-c synchronous_commit=local -c statement_timeout=2s";

/// A commit that says nothing, and is flushed. A standby's server can have none.
const WRITE: &str = "SELECT pg_logical_emit_message(true, 'bots', '') WHERE NOT pg_is_in_recovery()";

/// Has the standbys answer, a few times from now on.
pub(super) async fn nudge(hands: &Hands) {
    let mut since = Duration::ZERO;
    let told = async {
        let client = connect(&hands.node, OPTIONS).await?;
        for after in AFTER {
            tokio::time::sleep(after - since).await;
            since = after;
            client.batch_execute(WRITE).await.context("write")?;
        }
        anyhow::Ok(())
    };
    if let Err(error) = told.await {
        tracing::debug!(error = format!("{error:#}"), "the standbys were not made to answer");
    }
}
