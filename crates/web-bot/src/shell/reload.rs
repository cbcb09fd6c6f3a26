//! The bot's own configuration, read again while it runs: on SIGHUP, and on `POST /reload`.

use std::{path::PathBuf, sync::Arc};

use axum::{
    http::StatusCode,
    response::{IntoResponse, Response},
};
use bots_core::shell::{Events, boot};
use tokio::sync::Mutex;

use super::{WebBot, WebConfig, app::Recipes, recipe};
use crate::machine::{Event, Mode};

/// What is needed to read it again.
pub(super) struct Reload {
    path: Option<PathBuf>,
    /// What the bot was started with: what of it cannot change while it runs is told.
    first: WebConfig,
    recipes: Recipes,
    events: Events<Event>,
    /// One at a time, so that the machine hears of what was read last at last.
    turn: Mutex<()>,
}

impl Reload {
    pub(super) fn new(path: Option<PathBuf>, first: WebConfig, recipes: Recipes, events: Events<Event>) -> Self {
        Self { path, first, recipes, events, turn: Mutex::default() }
    }

    /// Reads and checks it, and hands over what of it can change. One line: what comes of it, or why it cannot be used.
    async fn read(&self) -> Result<String, String> {
        let _turn = self.turn.lock().await;
        let path = self.path.clone();
        let read = tokio::task::spawn_blocking(move || boot::configure::<WebBot>(path)).await;
        let config = read.map_err(|error| error.to_string())?.map_err(|exit| exit.message)?;
        let (configuration, is_new) = if self.first.has_the_app_of(&config) {
            self.recipes.note(recipe(&config))
        } else {
            (self.recipes.newest(), false)
        };
        self.events.send(Event::Reconfigured(config.live(configuration))).await;
        let replaced = is_new && self.first.web.mode == Mode::App;
        let app = if replaced { "the app is replaced by one that is run in the new way" } else { "the app runs on" };
        let fixed = self.first.fixed_differences(&config);
        for field in &fixed {
            tracing::warn!(field, "a changed field of the configuration takes effect when the bot is started anew");
        }
        let anew = if fixed.is_empty() { "" } else { "; this takes effect when the bot is started anew: " };
        Ok(format!("the configuration was read again: {app}{anew}{}", fixed.join(", ")))
    }

    /// `POST /reload`.
    pub(super) async fn answer(self: Arc<Self>) -> Response {
        match self.read().await {
            Ok(said) => (StatusCode::ACCEPTED, format!("{said}\n")).into_response(),
            Err(why) => (StatusCode::UNPROCESSABLE_ENTITY, format!("nothing was changed: {why}\n")).into_response(),
        }
    }

    /// Does so whenever the process is told to.
    pub(super) async fn on_hangup(self: Arc<Self>) {
        boot::on_hangup(|| async {
            let said = self.read().await?;
            tracing::info!("{said}");
            Ok(())
        })
        .await;
    }
}
