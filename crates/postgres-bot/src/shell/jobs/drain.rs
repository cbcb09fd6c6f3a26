//! Ending the sessions of clients without cutting a transaction off.

use std::time::Duration;

use anyhow::Context;

use super::super::{hands::Hands, server::connect};
use crate::machine::JobResult;

/// How often sessions are looked at: this is time in which nobody can connect.
const ASK_EVERY: Duration = Duration::from_millis(5);

/// The longest that one look may take.
const DEADLINE: Duration = Duration::from_secs(1);

/// How long a session must have rested to be ended, by how many looks there were before. One that has just logged in, or
/// rests between two statements of its setup, is about to begin a transaction; one that is kept in a pool and works all the
/// time never rests for long, and is ended between two transactions in the end.
const REST: [(u32, i64); 3] = [(0, 50), (40, 10), (100, 0)];

/// Ends sessions that rest, and counts all. Our own, by their name, go with the server. A session that begins a transaction
/// between the look and its end loses it: that is what the rest is for.
const END_RESTING: &str = "
SELECT count(*),
       count(CASE WHEN state = 'idle' AND state_change <= clock_timestamp() - $1::bigint * interval '1 millisecond'
                  THEN pg_terminate_backend(pid) END)
  FROM pg_stat_activity
 WHERE backend_type = 'client backend' AND application_name <> 'bots' AND pid <> pg_backend_pid()";

/// Returns once no client has a session. It may never do: the machine bounds it.
pub(super) async fn run(hands: &Hands) -> anyhow::Result<JobResult> {
    let client = connect(&hands.node, &format!("-c statement_timeout={}", DEADLINE.as_millis())).await?;
    let look = client.prepare(END_RESTING).await.context("prepare to look at sessions")?;
    let mut looks = 0;
    loop {
        let rest_ms = REST.iter().rev().find(|(from, _)| looks >= *from).map_or(0, |(_, rest_ms)| *rest_ms);
        let row = client.query_one(&look, &[&rest_ms]).await.context("look at sessions")?;
        let sessions: i64 = row.get(0);
        tracing::debug!(sessions, ended = row.get::<_, i64>(1), rest_ms, "sessions of clients");
        if sessions == 0 {
            return Ok(JobResult::Done);
        }
        looks += 1;
        tokio::time::sleep(ASK_EVERY).await;
    }
}
