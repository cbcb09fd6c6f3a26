//! A Postgres server as far as a small fleet needs one: a process, a data directory, and a log of numbered records instead of bytes.

use bots_core::{
    machine::Time,
    wire::{Lsn, Timeline},
};
use postgres_bot::machine::{DataDir, Running};

/// Where the log of a new cluster begins.
const BEGINNING: u64 = 0x0100_0000;
/// How long a record is: only which ones there are matters.
const RECORD: u64 = 0x100;

/// The log: which writes of clients are in it, and on which timelines it was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Log {
    pub(crate) records: Vec<u32>,
    pub(crate) timeline: u32,
    /// Each earlier timeline with how many records there were when it was left.
    switches: Vec<(u32, usize)>,
}

impl Log {
    pub(crate) fn new() -> Self {
        Self { records: Vec::new(), timeline: 1, switches: Vec::new() }
    }

    pub(crate) fn end(&self) -> Lsn {
        position(self.records.len())
    }

    pub(crate) fn ancestry(&self) -> Vec<(Timeline, Lsn)> {
        self.switches.iter().map(|(timeline, at)| (Timeline(*timeline), position(*at))).collect()
    }

    pub(crate) fn branch(&mut self, to: u32) {
        self.switches.push((self.timeline, self.records.len()));
        self.timeline = to;
    }

    /// Whether a server with this log can stream from one with `upstream`.
    pub(crate) fn follows(&self, upstream: &Self) -> bool {
        let same = self.timeline == upstream.timeline && self.switches == upstream.switches;
        let earlier = |(timeline, at): &(u32, usize)| *timeline == self.timeline && self.records.len() <= *at;
        upstream.records.starts_with(&self.records) && (same || upstream.switches.iter().any(earlier))
    }
}

fn position(records: usize) -> Lsn {
    Lsn(BEGINNING + RECORD * u64::try_from(records).expect("few"))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Process {
    Down,
    /// Open to clients, and read-only.
    Standby,
    /// It takes writes.
    Primary,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Data {
    Empty,
    Unfinished { cloning: bool },
    Present { standby: bool },
}

#[derive(Debug, Clone)]
pub(crate) struct Server {
    pub(crate) process: Process,
    pub(crate) data: Data,
    /// The system identifier, once there is one.
    pub(crate) system_id: Option<String>,
    pub(crate) log: Log,
    /// Whom its configuration names.
    pub(crate) upstream: Option<String>,
    /// When its guard kills it.
    pub(crate) fence: Option<Time>,
    /// Where the bot wants the fence of the next one that takes writes.
    pub(crate) wanted: Option<Time>,
    /// It runs on without its bot, or beside one that has not taken it over.
    pub(crate) kept: bool,
    /// What its commits wait for.
    pub(crate) names: String,
    /// Clients' writes that are not answered yet.
    pub(crate) waiting: Vec<u32>,
    /// It has ended, and the bot has not heard of that.
    pub(crate) unheard: bool,
}

impl Server {
    pub(crate) fn new() -> Self {
        Self {
            process: Process::Down,
            data: Data::Empty,
            system_id: None,
            log: Log::default(),
            upstream: None,
            fence: None,
            wanted: None,
            kept: false,
            names: String::new(),
            waiting: Vec::new(),
            unheard: false,
        }
    }

    pub(crate) fn inspected(&self) -> DataDir {
        let running = match (self.process, self.kept) {
            (Process::Down, _) => Running::No,
            (_, true) => Running::Guarded { fence: self.fence },
            (_, false) => Running::LeftBehind { fence: None },
        };
        let system_id = self.system_id.clone();
        match self.data {
            Data::Empty => DataDir::Empty,
            Data::Unfinished { cloning } => DataDir::Unfinished { system_id, cloning, running },
            Data::Present { standby } => DataDir::Present {
                system_id: system_id.unwrap_or_default(),
                timeline: Timeline(self.log.timeline),
                was_primary: !standby,
                rewound: false,
                running,
            },
        }
    }

    /// Every process of it is gone.
    pub(crate) fn ends(&mut self) {
        (self.process, self.fence, self.kept) = (Process::Down, None, false);
        self.waiting.clear();
    }

    /// How many standbys a commit waits for, and which may count.
    pub(crate) fn waits_for(&self) -> (usize, Vec<&str>) {
        let (head, list) = self.names.split_once('(').unwrap_or((self.names.as_str(), ""));
        let needed = head.split_whitespace().find_map(|word| word.parse().ok()).unwrap_or(0);
        let names = list.trim_end_matches(')').split(',').map(|name| name.trim().trim_matches('"'));
        (needed, names.filter(|name| !name.is_empty()).collect())
    }
}
