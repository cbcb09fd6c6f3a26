//! What a guard says, and that it says nothing: told to the machine whenever it changes, for as long as the line lasts.

use std::sync::Arc;

use super::{guard::Link, report::Reporter};

/// Tells the machine what the guard says, and that it says nothing.
pub(super) fn tell_of_link(link: &Arc<Link>, reporter: &Arc<Reporter>) {
    tell_of_watchdog(Arc::clone(link), Arc::clone(reporter));
    tell_of_guard(Arc::clone(link), Arc::clone(reporter));
}

/// Tells the machine how the watchdog device stands, and people, whenever it has changed, for as long as the line lasts.
fn tell_of_watchdog(link: Arc<Link>, reporter: Arc<Reporter>) {
    tokio::spawn(async move {
        let mut told = None;
        while let Some(used) = link.watch_changed(told.as_ref()).await {
            match &used {
                Ok(timeout_s) => tracing::info!(timeout_s, "the watchdog device would reset this machine"),
                Err(why) => tracing::warn!(why, "no watchdog device would reset this machine"),
            }
            reporter.watchdog_used(used.clone()).await;
            told = Some(used);
        }
    });
}

/// Tells the machine whether the guard answers, whenever that has changed, for as long as the line lasts.
fn tell_of_guard(link: Arc<Link>, reporter: Arc<Reporter>) {
    tokio::spawn(async move {
        let mut told = true;
        while let Some(answers) = link.answers_changed(told).await {
            if answers {
                tracing::info!(guard = link.guard.as_raw_pid(), "the guard answers again");
            } else {
                tracing::warn!(guard = link.guard.as_raw_pid(), "the guard does not answer");
            }
            reporter.guard_observed(answers).await;
            told = answers;
        }
        // Of whoever is at the other end of the next line, nothing is known.
        if !told {
            reporter.guard_observed(true).await;
        }
    });
}
