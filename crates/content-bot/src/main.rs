//! The content bot's program.

fn main() -> std::process::ExitCode {
    bots_core::shell::run::<content_bot::shell::ContentBot>()
}
