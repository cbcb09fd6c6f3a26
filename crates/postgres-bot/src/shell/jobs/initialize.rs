//! `initdb`: a new cluster in an empty data directory.

use std::sync::Arc;

use super::{
    super::{files, hands::Hands, inspect::Control, tool::clean_command},
    data,
};
use crate::machine::JobResult;

/// Makes a new cluster; the data directory stays marked unfinished.
pub(super) async fn run(hands: &Arc<Hands>) -> anyhow::Result<JobResult> {
    let node = &hands.node;
    let staging = hands.on_disk(|hands| data::stage(hands, files::MAKING)).await?;
    let mut command = clean_command(node.binaries.program("initdb"));
    command.arg("--pgdata").arg(&staging).args(["--auth-local=peer", "--auth-host=scram-sha-256"]);
    command.arg(format!("--username={}", node.superuser.username));
    let given = |name: &str| node.initdb.iter().any(|o| o == name || o.starts_with(&format!("{name}=")));
    for (option, unless) in [("--data-checksums", "--no-data-checksums"), ("--encoding=UTF8", "--encoding")] {
        if !given(unless) && !given(option) {
            command.arg(option);
        }
    }
    command.args(&node.initdb);
    // In a file of our own for a moment: arguments can be read by everybody on the machine.
    let password_file = node.initdb_password();
    if let Some(password) = &node.superuser.password {
        files::replace(&password_file, &format!("{}\n", password.expose()), 0o600)?;
        command.arg("--pwfile").arg(&password_file);
    }
    let made = hands.tools.run(command).await;
    files::remove(&password_file)?;
    made?;
    hands.on_disk(data::unstage).await?;
    let control = Control::read(hands, &node.data_dir).await?;
    tracing::info!(system_id = control.system_id, "initdb made a new cluster");
    Ok(JobResult::Initialized { system_id: control.system_id })
}
