//! The operator's hand on a fleet: reads the store, asks bots, writes what an operator may write.
//!
//! Nothing here is needed for a fleet to run. Everything that is decided from the store's contents is decided in the
//! pure modules; this file and [`act`] carry it out.

mod act;
mod args;
mod config;
mod content;
mod failure;
mod fleet;
mod history;
mod list;
mod member;
mod publish;
mod store;
mod switchover;
mod text;
mod web;
mod why;

use std::process::ExitCode;

use args::{Args, Command};
use clap::{CommandFactory, Parser};
use failure::Failure;

fn main() -> ExitCode {
    let args = Args::parse();
    if let Command::Completions { shell } = args.command {
        clap_complete::generate(shell, &mut Args::command(), "botctl", &mut std::io::stdout());
        return ExitCode::SUCCESS;
    }
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("botctl: {failure}");
            ExitCode::from(failure.code as u8)
        }
    }
}

fn run(args: Args) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Failure::failed(format!("cannot start: {e}")))?;
    runtime.block_on(act::act(args))
}
