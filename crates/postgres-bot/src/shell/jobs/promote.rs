//! Leaving recovery, and checkpoints.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, bail};
use bots_core::wire::Timeline;

use super::super::{
    hands::Hands,
    heeds,
    server::{Connection, connect},
    timelines,
};
use crate::machine::JobResult;

/// How often the server is asked whether it has left recovery: this is time in which nobody can write.
const ASK_EVERY: Duration = Duration::from_millis(3);

/// The longest that one question may take on the way.
const DEADLINE: Duration = Duration::from_secs(5);

/// A server that does not read its files for so long is busy with a restartpoint. Stopped and started anew, it goes by them.
const HEED_DEADLINE: Duration = Duration::from_secs(3);

/// Leaves recovery for `timeline`; returns once writes are accepted.
pub(super) async fn run(
    hands: &Arc<Hands>,
    timeline: Timeline,
    heeds: bool,
    without_slots: &[String],
) -> anyhow::Result<JobResult> {
    let connection = Connection::open(&hands.node, DEADLINE).await?;
    let before = connection.facts(Timeline::default()).await?;
    // Before it can take the first write.
    hands.postmaster.confirm_fence().await.context("the guard")?;
    if before.in_recovery {
        if heeds {
            let heeded = tokio::time::timeout(HEED_DEADLINE, heed(hands, &connection)).await;
            heeded
                .context("it would acknowledge commits alone: its checkpointer has not read yet whom to wait for")??;
        }
        drop_slots(&connection, without_slots).await;
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

/// Waits until a commit would wait for those for whom it shall: a server that begins a reign acknowledges nothing by itself.
async fn heed(hands: &Arc<Hands>, connection: &Connection) -> anyhow::Result<()> {
    let mut told = false;
    while !heeds::find_out(hands, connection).await? {
        if !told {
            // What is on its way to its files, or was changed by somebody else.
            hands.apply().await?;
            told = true;
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
    Ok(())
}

/// Removes slots before any consumer can come. One that cannot be removed is the new primary's to remove: nobody shall be without a
/// primary for that.
async fn drop_slots(connection: &Connection, names: &[String]) {
    for name in names {
        let sql =
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1::text::name";
        match connection.client().query(sql, &[name]).await {
            Ok(_) => tracing::warn!(name, "a copy of a logical slot that may lack something was removed"),
            Err(error) => {
                tracing::warn!(name, %error, "a copy of a logical slot that may lack something is still there")
            }
        }
    }
}

/// `CHECKPOINT`, however long it takes.
pub(super) async fn checkpoint(hands: &Hands) -> anyhow::Result<JobResult> {
    let client = connect(&hands.node, "-c statement_timeout=0").await?;
    client.batch_execute("CHECKPOINT").await.context("checkpoint")?;
    Ok(JobResult::Done)
}
