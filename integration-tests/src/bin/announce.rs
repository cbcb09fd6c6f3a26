//! The `post-receive` hook of the harness's repositories: tells a content bot of every branch and tag that was pushed, signed as a
//! forge signs. Not for use elsewhere: `deploy/compose/post-receive` is, and needs nothing of this workspace.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use fleet::webhook::{Moved, announcement};

/// Whoever pushes waits for the hook; a bot that is away finds the commit at its next poll.
const DEADLINE: Duration = Duration::from_secs(5);

/// Tells a content bot what was pushed, from standard input as git gives it to `post-receive`
#[derive(Debug, Parser)]
struct Args {
    /// Where the bot's API answers
    address: SocketAddr,
    /// The file that holds what announcements are signed with
    secret_file: PathBuf,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("announce: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let secret = fs::read_to_string(&args.secret_file)
        .with_context(|| format!("read the secret in {}", args.secret_file.display()))?;
    for line in std::io::stdin().lines() {
        let moved = Moved::parse(&line.context("read what was pushed")?)?;
        tell(args.address, &moved, secret.trim_end())?;
    }
    Ok(())
}

fn tell(address: SocketAddr, moved: &Moved, secret: &str) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, DEADLINE).with_context(|| format!("reach {address}"))?;
    stream.set_read_timeout(Some(DEADLINE)).context("set a deadline")?;
    let request = announcement(moved, secret).request(&address.to_string(), "/push");
    stream.write_all(request.as_bytes()).context("send the announcement")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).context("read the answer")?;
    ensure!(answer.starts_with("HTTP/1.1 202 "), "{address} takes no announcement: {}", answer.trim());
    Ok(())
}
