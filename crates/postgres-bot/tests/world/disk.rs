//! What is on disk as the jobs leave it: what an inspection would find.

use bots_core::wire::Timeline;
use postgres_bot::machine::{DataDir, Job, Running};

use crate::world::SYSTEM_ID;

/// What is on disk, and where the server is: what the world would answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Disk {
    pub(crate) data: Data,
    pub(crate) timeline: u32,
    pub(crate) position: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Data {
    Empty,
    Unfinished { cloning: bool },
    Standby,
    Primary,
}

impl Disk {
    pub(crate) fn inspected(&self, running: Running) -> DataDir {
        match self.data {
            Data::Empty => DataDir::Empty,
            Data::Unfinished { cloning } => {
                DataDir::Unfinished { system_id: Some(SYSTEM_ID.to_owned()), cloning, running }
            }
            Data::Standby | Data::Primary => DataDir::Present {
                system_id: SYSTEM_ID.to_owned(),
                timeline: Timeline(self.timeline),
                was_primary: self.data == Data::Primary,
                rewound: false,
                running,
            },
        }
    }

    /// What a job leaves behind. Even a failed one may have begun.
    pub(crate) fn after(&mut self, job: &Job, good: bool) {
        self.data = match (job, good) {
            (Job::Initialize, _) => Data::Unfinished { cloning: false },
            (Job::Clone { .. }, false) => Data::Unfinished { cloning: true },
            (Job::Clone { .. } | Job::Rewind { .. } | Job::StartStandby { .. }, true) if self.is_whole() => {
                Data::Standby
            }
            (Job::Clone { .. }, true) => Data::Standby,
            (Job::Complete, true) => Data::Primary,
            (Job::DiscardUnfinished { .. } | Job::SetAside { .. }, true) => Data::Empty,
            (Job::StartPrimary | Job::Promote { .. }, true) if self.is_whole() => Data::Primary,
            (_any_other, _) => self.data,
        };
        if let (Job::Promote { timeline, .. }, true) = (job, good) {
            self.timeline = timeline.0;
        }
    }

    fn is_whole(&self) -> bool {
        matches!(self.data, Data::Standby | Data::Primary)
    }
}
