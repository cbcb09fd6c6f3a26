//! Bringing the server down.

use super::super::{hands::Hands, inspect::Control};
use crate::machine::{JobResult, StopMode};

/// Stops whatever runs on the data directory; returns once every process of it is gone.
pub(super) async fn run(hands: &Hands, mode: StopMode) -> anyhow::Result<JobResult> {
    hands.postmaster.stop(mode).await;
    // A program of a job that was given up may have started a server of its own.
    hands.quiet().await;
    let control = Control::read(hands, &hands.node.data_dir).await.ok();
    let shutdown_checkpoint = control.filter(|c| c.state == "shut down").map(|c| c.checkpoint);
    Ok(JobResult::Stopped { shutdown_checkpoint })
}
