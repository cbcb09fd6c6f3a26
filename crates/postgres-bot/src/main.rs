//! `postgres-bot CONFIG`: keeps this member of a Postgres cluster.

use std::process::ExitCode;

fn main() -> ExitCode {
    bots_core::shell::run::<postgres_bot::shell::Program>()
}
