//! The jobs: long work that the machine asked for, one file a group. Each does one thing and decides nothing.

mod clone;
mod data;
mod drain;
mod initialize;
mod promote;
mod rewind;
mod roles;
mod start;
mod stop;

use std::sync::Arc;

use super::hands::Hands;
use crate::machine::{Job, JobError, JobResult};

/// Does a job to its end. A future that is dropped gives it up.
///
/// # Errors
/// What failed, on one line.
pub async fn run(hands: &Arc<Hands>, job: Job) -> Result<JobResult, JobError> {
    if works_on_data(&job) {
        hands.quiet().await;
    }
    let ended = match job {
        Job::Initialize => initialize::run(hands).await,
        Job::CreateRoles => roles::run(hands).await,
        Job::Complete => hands.on_disk(data::complete).await,
        Job::DiscardUnfinished { remove_rewound } => {
            hands.on_disk(move |hands| data::discard_unfinished(hands, remove_rewound)).await
        }
        Job::SetAside { remove, leader } => data::give_up(hands, remove, leader.as_ref()).await,
        Job::Clone { source } => clone::run(hands, &source).await,
        Job::StartPrimary => start::primary(hands).await,
        Job::StartStandby { upstream } => start::standby(hands, upstream).await,
        Job::Follow { upstream } => start::follow(hands, upstream).await,
        Job::Promote { timeline, heeds, without_slots } => promote::run(hands, timeline, heeds, &without_slots).await,
        Job::Checkpoint => promote::checkpoint(hands).await,
        Job::Drain => drain::run(hands).await,
        Job::Stop { mode } => stop::run(hands, mode).await,
        Job::Rewind { source } => rewind::run(hands, &source).await,
    };
    ended.map_err(|error| JobError {
        why: one_line(&format!("{error:#}")),
        elsewhere: error.downcast_ref::<rewind::SourceFailed>().is_some(),
    })
}

/// Whether the job must have the data directory to itself.
const fn works_on_data(job: &Job) -> bool {
    match job {
        Job::Initialize
        | Job::Complete
        | Job::DiscardUnfinished { .. }
        | Job::SetAside { .. }
        | Job::Clone { .. }
        | Job::StartPrimary
        | Job::StartStandby { .. }
        | Job::Rewind { .. } => true,
        // A stop makes quiet itself, and the others speak with the server.
        Job::Stop { .. }
        | Job::CreateRoles
        | Job::Follow { .. }
        | Job::Promote { .. }
        | Job::Checkpoint
        | Job::Drain => false,
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
