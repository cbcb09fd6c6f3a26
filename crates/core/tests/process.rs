//! Child processes: their output, their end, their identity.

use std::{fs, time::Duration};

use bots_core::shell::process::{Ended, Identity, Output, Program, exit_of, send_signal};
use rustix::process::Signal;

fn shell(script: &str) -> Program {
    Program::new("test", "/bin/sh").arg("-c").arg(script)
}

#[tokio::test]
async fn an_end_is_a_code_or_a_signal() {
    assert_eq!(shell("exit 7").run().await.expect("run"), Ended::Code(7));
    assert!(shell("true").run().await.expect("run").is_success());
    let mut running = shell("sleep 60").spawn().expect("spawn");
    running.signal(Signal::KILL).expect("signal");
    assert_eq!(running.ended().await.expect("end"), Ended::Signal(9));
    running.signal(Signal::KILL).expect("a child that was waited for is left alone");
}

#[tokio::test]
async fn output_goes_to_a_file_with_the_environment_and_directory_given() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let log = dir.path().join("log");
    let program =
        shell("echo $WORD; pwd; echo $HOME >&2").env("WORD", "hello").dir("/").output(Output::File(log.clone()));
    let program = Program { clear_env: true, ..program };
    assert!(program.run().await.expect("run").is_success());
    assert_eq!(fs::read_to_string(log).expect("log"), "hello\n/\n\n");
}

#[tokio::test]
async fn a_child_runs_as_somebody_else_if_we_may() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let program = shell("test $(id -u):$(id -g) = 65534:65534").identity(Some(Identity { uid: 65_534, gid: 65_534 }));
    assert!(program.run().await.expect("run").is_success());
}

#[tokio::test]
async fn the_end_of_a_process_that_is_not_ours_is_seen() {
    let mut running = shell("sleep 60").spawn().expect("spawn");
    let pid = running.pid();
    let seen = tokio::spawn(exit_of(pid));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!seen.is_finished());
    send_signal(pid, Signal::TERM).expect("signal");
    seen.await.expect("no panic").expect("a pidfd");
    assert_eq!(running.ended().await.expect("end"), Ended::Signal(15));
    send_signal(pid, Signal::TERM).expect("a process that is gone is no error");
    assert!(exit_of(0).await.is_err());
}

#[tokio::test]
async fn what_a_child_leaves_behind_in_its_group_is_killed_at_its_end() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let word = dir.path().join("word");
    let program = shell("sleep 600 & echo $! > word; exit 7").dir(dir.path()).output(Output::Discard);
    let mut running = program.spawn().expect("spawn");
    assert_eq!(running.ended_with_group().await.expect("end"), Ended::Code(7));
    let left: u32 = fs::read_to_string(word).expect("its word").trim().parse().expect("a process id");
    // It is not our child: others wait for it, or nobody does.
    let gone = async {
        while lives(left) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(10), gone).await.is_ok(), "process {left} lives on");
    assert_eq!(running.ended_with_group().await.expect("end"), Ended::Code(7), "and can be asked again");
}

fn lives(pid: u32) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !state.is_empty() && !state.contains(") Z ")
}

#[test]
fn a_missing_program_is_an_error() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let error = runtime.block_on(async { Program::new("test", "/no/such/program").spawn() }).expect_err("refused");
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
}
