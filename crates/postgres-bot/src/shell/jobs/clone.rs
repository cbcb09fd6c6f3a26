//! `pg_basebackup`: another member's data in an empty data directory.

use std::sync::Arc;

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
    hands.tools.run(command).await?;
    let finish = |hands: &Hands| {
        data::unstage(hands)?;
        // A copy must never come up as a primary of its own.
        files::write_signal(&hands.node, &Mode::Standby(None))?;
        data::complete(hands)
    };
    hands.on_disk(finish).await
}
