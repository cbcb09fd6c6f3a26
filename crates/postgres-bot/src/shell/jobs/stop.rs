//! Bringing the server down.

use std::time::Duration;

use bots_core::wire::Lsn;

use super::super::{hands::Hands, inspect::Control, postmaster::Life, processes};
use crate::machine::{JobResult, StopMode};

/// How often a server that goes down is looked at: a client waits for the next primary meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// So many looks in a row must show it.
const LOOKS: u32 = 2;

/// What the control file says of a primary that was shut down in good order.
const SHUT_DOWN: &str = "shut down";

/// Stops whatever runs on the data directory; returns once every process of it is gone. Tells when a primary is down but for its
/// archiver, which may have much to do.
pub(super) async fn run(hands: &Hands, mode: StopMode) -> anyhow::Result<JobResult> {
    {
        let stop = hands.postmaster.stop(mode);
        tokio::pin!(stop);
        tokio::select! {
            () = &mut stop => {}
            checkpoint = last_word(hands), if mode == StopMode::Fast => {
                tracing::info!("Postgres is shut down, and archives");
                hands.reporter.closed(checkpoint).await;
                stop.await;
            }
        }
    }
    // A program of a job that was given up may have started a server of its own.
    hands.quiet().await;
    let control = Control::read(hands, &hands.node.data_dir).await.ok();
    let shutdown_checkpoint = control.filter(|c| c.state == SHUT_DOWN).map(|c| c.checkpoint);
    Ok(JobResult::Stopped { shutdown_checkpoint })
}

/// Waits until all that is left of a primary archives; for ever, if it does not come to that.
async fn last_word(hands: &Hands) -> Lsn {
    let mut seen = 0;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Life::Alive { pid: Some(postmaster), .. } = hands.postmaster.life() else { continue };
        let archives = tokio::task::spawn_blocking(move || processes::only_archives(postmaster)).await;
        seen = if archives.unwrap_or(false) { seen + 1 } else { 0 };
        if seen < LOOKS {
            continue;
        }
        // The checkpointer and the senders have gone before: it says so now, or it is a standby's, or a server that crashed.
        match Control::read(hands, &hands.node.data_dir).await {
            Ok(control) if control.state == SHUT_DOWN => return control.checkpoint,
            Ok(_) => return std::future::pending().await,
            Err(_) => {}
        }
    }
}
