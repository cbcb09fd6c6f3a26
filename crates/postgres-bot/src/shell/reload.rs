//! The member's own configuration, read again while the bot runs: on SIGHUP, and on `POST /reload`.

use std::{path::PathBuf, sync::Arc};

use bots_core::shell::{Events, boot};

use super::{Program, config::Config};
use crate::machine::{Command, CommandId, Event, Live};

/// What is needed to read it again.
#[derive(Debug)]
pub(super) struct Reload {
    path: Option<PathBuf>,
    /// What the bot was started with: what of it cannot change while it runs is told.
    first: Config,
    instance: String,
    epoch_unix_ms: u64,
}

impl Reload {
    pub(super) const fn new(path: Option<PathBuf>, first: Config, instance: String, epoch_unix_ms: u64) -> Self {
        Self { path, first, instance, epoch_unix_ms }
    }

    /// Reads and checks it; one line if it cannot be used.
    pub(super) async fn read(&self) -> Result<Live, String> {
        let path = self.path.clone();
        let read = tokio::task::spawn_blocking(move || boot::configure::<Program>(path)).await;
        let config = read.map_err(|error| error.to_string())?.map_err(|exit| exit.message)?;
        for warning in config.warnings()? {
            tracing::warn!("{warning}");
        }
        for field in self.first.fixed_differences(&config) {
            tracing::warn!(field, "a changed field of the configuration takes effect when the bot is started anew");
        }
        Ok(config.settings(self.instance.clone(), env!("CARGO_PKG_VERSION"), self.epoch_unix_ms).live())
    }

    /// Does so whenever the process is told to.
    pub(super) async fn on_hangup(self: Arc<Self>, events: Events<Event>) {
        boot::on_hangup(|| async {
            let command = Command::Reload(self.read().await?);
            events.send(Event::Commanded { id: CommandId(0), command }).await;
            tracing::info!("the configuration was read again");
            Ok(())
        })
        .await;
    }
}
