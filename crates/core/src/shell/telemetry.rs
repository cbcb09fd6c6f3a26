//! Logs: plain for people, JSON for machines, to standard error. Values are fields; messages are fixed text.

use std::io::{self, IsTerminal};

use tracing::level_filters::LevelFilter;

use super::config::{Log, LogFormat};

/// Begins to log as configured. Once a process; later calls change nothing.
pub fn init(log: &Log) {
    let level = LevelFilter::from(log.level);
    let builder = tracing_subscriber::fmt().with_max_level(level).with_writer(io::stderr);
    let _already_set = match log.format {
        LogFormat::Plain => builder.with_ansi(io::stderr().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).try_init(),
    };
}
