//! The edge bot's program.

fn main() -> std::process::ExitCode {
    bots_core::shell::run::<edge_bot::shell::EdgeBot>()
}
