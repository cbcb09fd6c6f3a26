//! `pg_basebackup`: another member's data in an empty data directory.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use super::{
    super::{
        conninfo::Conninfo,
        files::{self, Mode},
        hands::Hands,
        tool::clean_command,
    },
    data,
};
use crate::machine::{JobResult, Upstream};

/// The machine hears how far the copy is at most this often.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Copies `source`; marked unfinished until all of it is there.
pub(super) async fn run(hands: &Arc<Hands>, source: &Upstream) -> anyhow::Result<JobResult> {
    let node = &hands.node;
    let staging = hands.on_disk(|hands| data::stage(hands, files::COPYING)).await?;
    files::write_passfile(node)?;
    let conninfo = Conninfo::new(source, &node.replication)?.passfile(&node.passfile());
    let conninfo = conninfo.application_name(&format!("{}-clone", node.name));
    let mut command = clean_command(node.binaries.program("pg_basebackup"));
    command.arg("--pgdata").arg(&staging).args(["--wal-method=stream", "--checkpoint=fast", "--no-password"]);
    command.arg("--dbname").arg(conninfo.to_string());
    tracing::info!(source = source.name, "pg_basebackup starts");
    command.arg("--progress");
    let (progress, mut news) = watch::channel(None);
    let told = |said: &str| {
        if let Some(found) = how_far(said) {
            progress.send_replace(Some(found));
        }
    };
    // The machine hears of it now and then, whatever it is that takes long.
    let tell = async {
        while news.changed().await.is_ok() {
            let found = *news.borrow_and_update();
            if let Some((done, total)) = found {
                hands.reporter.copied(done, total).await;
            }
            tokio::time::sleep(TELL_EVERY).await;
        }
    };
    tokio::select! {
        ended = hands.tools.run_telling(command, told) => ended?,
        () = tell => {}
    }
    let finish = |hands: &Hands| {
        data::unstage(hands)?;
        // A copy must never come up as a primary of its own.
        files::write_signal(&hands.node, &Mode::Standby(None))?;
        data::complete(hands)
    };
    hands.on_disk(finish).await
}

/// Reads `  24614/31459 kB (78%), 0/1 tablespace`: bytes that have arrived, and bytes in all.
fn how_far(said: &str) -> Option<(u64, u64)> {
    let line = said.rsplit(['\r', '\n']).find(|line| line.contains(" kB ("))?;
    let (done, total) = line.trim().split_once(" kB")?.0.split_once('/')?;
    let bytes = |kb: &str| kb.trim().parse::<u64>().ok()?.checked_mul(1_024);
    Some((bytes(done)?, bytes(total)?))
}

#[cfg(test)]
mod tests {
    use super::how_far;

    #[test]
    fn progress_is_read() {
        assert_eq!(
            how_far("      0/31459 kB (0%), 0/1 tablespace\r  24614/31459 kB (78%), 0/1 tablespace (x)\r"),
            Some((25_204_736, 32_214_016))
        );
        assert_eq!(how_far("pg_basebackup: error: connection to server failed"), None);
    }
}
