//! The web bot's program.

use std::process::ExitCode;

use web_bot::shell::WebBot;

fn main() -> ExitCode {
    bots_core::shell::run::<WebBot>()
}
