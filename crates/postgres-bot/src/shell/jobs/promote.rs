//! Leaving recovery, and checkpoints.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, bail};
use bots_core::wire::Timeline;

use super::super::{
    hands::Hands,
    server::{Connection, connect},
    timelines,
};
use crate::machine::JobResult;

/// How often the server is asked whether it has left recovery: this is time in which nobody can write.
const ASK_EVERY: Duration = Duration::from_millis(3);

/// The longest that one question may take on the way.
const DEADLINE: Duration = Duration::from_secs(5);

/// Leaves recovery for `timeline`; returns once writes are accepted.
pub(super) async fn run(hands: &Arc<Hands>, timeline: Timeline) -> anyhow::Result<JobResult> {
    let connection = Connection::open(&hands.node, DEADLINE).await?;
    let before = connection.facts(Timeline::default()).await?;
    // Before it can take the first write.
    hands.postmaster.confirm_fence().await.context("the guard")?;
    if before.in_recovery {
        hands.on_disk(move |hands| timelines::take(&hands.node.data_dir, timeline.0)).await?;
        let asked = connection.client().query_one("SELECT pg_promote(false)", &[]).await;
        if !asked.context("pg_promote")?.get::<_, bool>(0) {
            bail!("the server refused to be promoted");
        }
    }
    loop {
        let now = connection.facts(Timeline::default()).await?;
        if !now.in_recovery {
            let mut ancestry = timelines::ancestry(&hands.node.data_dir, now.timeline);
            if ancestry.is_empty() {
                ancestry.push((before.timeline, before.position));
            }
            tracing::info!(timeline = now.timeline.0, ?ancestry, "promoted");
            return Ok(JobResult::Promoted { server: now, ancestry });
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// `CHECKPOINT`, however long it takes.
pub(super) async fn checkpoint(hands: &Hands) -> anyhow::Result<JobResult> {
    let client = connect(&hands.node, "-c statement_timeout=0").await?;
    client.batch_execute("CHECKPOINT").await.context("checkpoint")?;
    Ok(JobResult::Done)
}
