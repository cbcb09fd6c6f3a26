//! `postgres-bot CONFIG`: keeps this member of a Postgres cluster. `postgres-bot guard …` is for itself alone.

use std::process::ExitCode;

use postgres_bot::shell::{Program, guard};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == guard::COMMAND) {
        return guard::run(arguments);
    }
    bots_core::shell::run::<Program>()
}
