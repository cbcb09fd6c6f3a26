//! The guard of a server, on real ones: what stops it, what does not, and that nothing of it is left.

mod shell_support;

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command, time::Duration};

use bots_core::{machine::Span, shell::clock::Clock, wire::Timeline};
use postgres_bot::{
    machine::{DataDir, Event, Job, JobResult, Postgres, Running, StopMode},
    shell::{postmaster::Life, processes},
};
use rustix::process::{Pid, Signal, kill_process};
use shell_support::{AT_ONCE, Member, as_server_user, scratch, started};

/// A member with a running server, whose bot has ended without a word.
fn earlier_life(member: impl Fn() -> Member + Send + Sync) -> Member {
    let live = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let member = member();
            member.bootstraps().await;
            member
        })
    };
    std::thread::scope(|scope| scope.spawn(live).join().expect("it lives"))
}

fn lives(pid: Pid) -> bool {
    processes::lives(pid)
}

/// A process that was killed has given its memory back, by which it is known, before its number.
async fn goes(pid: Pid) -> bool {
    let gone = async {
        while lives(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(1), gone).await.is_ok()
}

/// Moves the fence to a moment from now, and waits until the guard has done what it is for.
async fn fence_falls(member: &mut Member) {
    member.hands.postmaster.set_fence(Clock::now() + Span::from_millis(300), None);
    let how = member.hears_its_end().await;
    assert!(how.contains("guard") && how.contains("lease"), "{how}");
}

#[test]
fn the_death_of_a_postmaster_is_told_at_once_and_leaves_no_process() {
    as_server_user("the_death_of_a_postmaster_is_told_at_once_and_leaves_no_process", || async {
        let dir = scratch();
        let mut a = Member::new(dir.path(), "a");
        a.bootstraps().await;
        let poke = a.observes();
        poke.ask();
        let up = |event| matches!(event, Event::PostgresObserved(Postgres::Up(_))).then_some(());
        a.hears("the server is up", up).await;
        a.busy_backend().await;
        let Life::Alive { pid, .. } = a.hands.postmaster.life() else { panic!("down") };
        assert!(processes::of_server(&[&a.data_dir()]).expect("/proc is read").len() > 5);
        kill_process(pid.expect("said by its guard"), Signal::KILL).expect("kill");
        let how = a.hears("its exit", |event| if let Event::PostgresExited { how } = event { Some(how) } else { None });
        let how = tokio::time::timeout(Duration::from_secs(2), how).await.expect("at once");
        assert!(how.contains("signal: 9"), "{how}");
        assert!(
            processes::of_server(&[&a.data_dir()]).expect("/proc is read").is_empty(),
            "told only when every process is gone"
        );
        // And it comes back in place.
        let up = started(a.does(Job::StartPrimary).await);
        assert_eq!((up.in_recovery, up.timeline), (false, Timeline(1)));
        a.does(Job::Stop { mode: AT_ONCE }).await;
    });
}

#[test]
fn a_guard_stops_a_server_whose_fence_is_not_moved_on() {
    as_server_user("a_guard_stops_a_server_whose_fence_is_not_moved_on", || async {
        let dir = scratch();
        let mut a = Member::new(dir.path(), "a");
        a.bootstraps().await;
        a.busy_backend().await;
        // Moved on a few times, as a lease that is renewed does.
        for _renewal in 0..4 {
            a.hands.postmaster.set_fence(Clock::now() + Span::from_millis(600), None);
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert_eq!(a.asks("SELECT 1").await, "1");
        }
        let fence = Clock::now() + Span::from_millis(400);
        a.hands.postmaster.set_fence(fence, None);
        a.hands.postmaster.confirm_fence().await.expect("the guard says so");
        let how = a.hears("its exit", |event| if let Event::PostgresExited { how } = event { Some(how) } else { None });
        let how = how.await;
        let late = Clock::now().since(fence);
        assert!(how.contains("guard") && how.contains("lease"), "{how}");
        assert!(Clock::now() > fence && late < Span::from_millis(500), "all gone {late} after the fence");
        println!("every process gone, and told, {late} after the fence");
        assert!(processes::of_server(&[&a.data_dir()]).expect("/proc is read").is_empty());

        // A fence that has passed lets nothing start.
        let why = a.fails(Job::StartPrimary).await;
        assert!(why.contains("guard") || why.contains("ended"), "{why}");
        assert!(processes::of_server(&[&a.data_dir()]).expect("/proc is read").is_empty());
        a.hands.postmaster.set_fence(Clock::now() + Span::from_secs(60), None);
        a.does(Job::StartPrimary).await;
        a.does(Job::Stop { mode: AT_ONCE }).await;
    });
}

#[test]
fn the_line_to_the_guard_lasts_and_is_called_again_when_it_is_lost() {
    as_server_user("the_line_to_the_guard_lasts_and_is_called_again_when_it_is_lost", || async {
        let dir = scratch();
        let a = Member::new(dir.path(), "a");
        a.bootstraps().await;
        // As many renewals as some days have.
        let fence = Clock::now() + Span::from_secs(120);
        for many in 0..2_000 {
            for few in 0..50 {
                a.hands.postmaster.set_fence(fence + Span::from_millis(many * 50 + few), None);
            }
            a.hands.postmaster.confirm_fence().await.expect("the guard answers");
        }
        // Somebody else calls the guard, and hangs up.
        drop(std::os::unix::net::UnixStream::connect(a.hands.node.guard_socket()).expect("the guard listens"));
        tokio::time::sleep(Duration::from_millis(200)).await;
        a.hands.postmaster.set_fence(Clock::now() + Span::from_secs(90), None);
        a.hands.postmaster.confirm_fence().await.expect("the guard is called again");
        assert_eq!(a.asks("SELECT 1").await, "1");
        a.does(Job::Stop { mode: StopMode::Fast }).await;
    });
}

#[test]
fn a_server_goes_with_its_guard() {
    as_server_user("a_server_goes_with_its_guard", || async {
        let dir = scratch();
        let mut a = Member::new(dir.path(), "a");
        a.bootstraps().await;
        a.kill_guard();
        let how = a.hears("its exit", |event| if let Event::PostgresExited { how } = event { Some(how) } else { None });
        let how = tokio::time::timeout(Duration::from_secs(3), how).await.expect("at once");
        assert!(how.contains("guard"), "{how}");
        assert!(processes::of_server(&[&a.data_dir()]).expect("/proc is read").is_empty());
        a.does(Job::StartPrimary).await;
        a.does(Job::Stop { mode: StopMode::Fast }).await;
    });
}

#[test]
fn a_bot_that_comes_back_finds_its_server_as_it_was() {
    as_server_user("a_bot_that_comes_back_finds_its_server_as_it_was", || async {
        let dir = scratch();
        let a = earlier_life(|| Member::new(dir.path(), "a"));
        let session = a.client().await;
        session.batch_execute("CREATE TEMP TABLE t (x int)").await.expect("write");
        let mut again = a.again(dir.path());
        let nobodys = again.looks().await;
        assert!(matches!(nobodys, DataDir::Present { running: Running::LeftBehind { .. }, .. }), "{nobodys:?}");
        again.hands.postmaster.adopt(&again.hands.reporter).await;
        let kept = again.looks().await;
        let guarded = |running: Running| matches!(running, Running::Guarded { fence: Some(at) } if at > Clock::now());
        assert!(matches!(kept, DataDir::Present { running, .. } if guarded(running)), "{kept:?}");
        again.hands.postmaster.set_fence(Clock::now() + Span::from_secs(60), None);
        let up = started(again.does(Job::StartPrimary).await);
        assert!(!up.in_recovery);
        session.batch_execute("INSERT INTO t VALUES (1)").await.expect("the session has seen nothing");

        // The new bot is in charge of it as the old one was.
        let stopped = again.does(Job::Stop { mode: StopMode::Fast }).await;
        assert!(matches!(stopped, JobResult::Stopped { shutdown_checkpoint: Some(_) }), "{stopped:?}");
        let how =
            again.hears("its end", |e| if let Event::PostgresExited { how } = e { Some(how) } else { None }).await;
        assert_eq!(how, "shut down");
    });
}

#[test]
fn a_guard_that_was_left_behind_frozen_cannot_take_the_next_server() {
    as_server_user("a_guard_that_was_left_behind_frozen_cannot_take_the_next_server", || async {
        let dir = scratch();
        let a = earlier_life(|| Member::new(dir.path(), "a"));
        let guard = a.guard().expect("a guard");
        kill_process(guard, Signal::STOP).expect("freeze");
        // Another life of the bot, that cannot speak with the guard.
        let again = a.again(dir.path());
        again.does(Job::Stop { mode: AT_ONCE }).await;
        again.does(Job::StartPrimary).await;
        let _gone = kill_process(guard, Signal::CONT);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(again.asks("SELECT 1").await, "1");
        assert_ne!(again.guard(), Some(guard));
        again.does(Job::Stop { mode: AT_ONCE }).await;
    });
}

#[test]
fn a_frozen_server_is_killed_in_time() {
    as_server_user("a_frozen_server_is_killed_in_time", || async {
        let dir = scratch();
        let a = Member::new(dir.path(), "a");
        a.bootstraps().await;
        for pid in processes::of_server(&[&a.data_dir()]).expect("/proc is read") {
            kill_process(pid, Signal::STOP).expect("freeze");
        }
        let stop = a.does(Job::Stop { mode: AT_ONCE });
        tokio::time::timeout(Duration::from_secs(3), stop).await.expect("killed in time");
        assert!(processes::of_server(&[&a.data_dir()]).expect("/proc is read").is_empty());
    });
}

/// Wherever they stand, and whatever they are called: the list of them must not end with the postmaster.
#[test]
fn the_backends_of_a_server_by_another_name_and_what_they_have_started_fall_with_its_fence() {
    as_server_user(
        "the_backends_of_a_server_by_another_name_and_what_they_have_started_fall_with_its_fence",
        || async {
            let dir = scratch();
            let mut a = Member::with_renamed_program(dir.path(), "a");
            a.bootstraps().await;
            let busy = a.busy_backend().await;
            let noted = dir.path().join("elsewhere");
            let program = format!("cd / && echo $$ > {} && exec sleep 600", noted.display());
            a.client().await.batch_execute("CREATE TABLE t (x text)").await.expect("write");
            let copies = a.backend_that_runs(&format!("COPY t FROM PROGRAM '{program}'")).await;
            let elsewhere = noted_pid(&noted).await;
            assert!(
                processes::of_server(&[&a.data_dir()]).expect("/proc is read").contains(&busy),
                "known without any marks"
            );
            assert!(
                a.hands.postmaster.processes().expect("/proc is read").contains(&elsewhere),
                "known as a descendant of its guard"
            );
            fence_falls(&mut a).await;
            assert_eq!([busy, copies, elsewhere].map(lives), [false; 3]);
            assert!(a.hands.postmaster.processes().expect("/proc is read").is_empty());
        },
    );
}

#[test]
fn the_backends_of_a_server_by_another_name_go_with_its_guard() {
    as_server_user("the_backends_of_a_server_by_another_name_go_with_its_guard", || async {
        let dir = scratch();
        let mut a = Member::with_renamed_program(dir.path(), "a");
        a.bootstraps().await;
        let busy = a.busy_backend().await;
        kill_process(busy, Signal::STOP).expect("freeze");
        a.kill_guard();
        let how = a.hears_its_end().await;
        assert!(how.contains("guard") && !lives(busy), "{how}");
    });
}

#[test]
fn the_backends_of_a_server_by_another_name_are_found_by_the_next_life_of_the_bot() {
    as_server_user("the_backends_of_a_server_by_another_name_are_found_by_the_next_life_of_the_bot", || async {
        let dir = scratch();
        let a = earlier_life(|| Member::with_renamed_program(dir.path(), "a"));
        let busy = a.busy_backend().await;
        kill_process(busy, Signal::STOP).expect("freeze");
        a.kill_guard();
        let again = a.again(dir.path());
        let found = again.looks().await;
        assert!(matches!(found, DataDir::Present { running: Running::LeftBehind { .. }, .. }), "{found:?}");
        again.does(Job::Stop { mode: AT_ONCE }).await;
        assert!(goes(busy).await);
        assert!(matches!(again.looks().await, DataDir::Present { running: Running::No, .. }));
    });
}

/// The kernel shows nobody what a process is whose program must not be read.
#[test]
fn a_server_that_could_not_be_found_again_is_not_started() {
    as_server_user("a_server_that_could_not_be_found_again_is_not_started", || async {
        let dir = scratch();
        let a = Member::with_renamed_program(dir.path(), "a");
        a.does(Job::Initialize).await;
        let program = dir.path().join("programs/edb-postgres");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o111)).expect("chmod");
        let why = a.fails(Job::StartPrimary).await;
        assert!(why.contains("its guard") && why.contains("cannot be read"), "{why}");
        assert!(a.hands.postmaster.processes().expect("/proc is read").is_empty());
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("chmod");
        a.does(Job::StartPrimary).await;
        a.does(Job::Stop { mode: AT_ONCE }).await;
    });
}

#[test]
fn a_server_that_is_the_child_of_a_script_is_stopped_and_the_script_is_named() {
    as_server_user("a_server_that_is_the_child_of_a_script_is_stopped_and_the_script_is_named", || async {
        let dir = scratch();
        let a = Member::with_renamed_program(dir.path(), "a");
        a.does(Job::Initialize).await;
        let (postgres, renamed) = (dir.path().join("programs/postgres"), dir.path().join("programs/edb-postgres"));
        fs::remove_file(&postgres).expect("the link");
        let script = |how: &str| format!("#!/bin/sh\n{how} {} \"$@\"\n", renamed.display());
        fs::write(&postgres, script("")).expect("write");
        fs::set_permissions(&postgres, fs::Permissions::from_mode(0o755)).expect("chmod");
        let why = a.fails(Job::StartPrimary).await;
        assert!(why.contains("postgresql.bin_dir") && why.contains("exec"), "{why}");
        assert!(a.hands.postmaster.processes().expect("/proc is read").is_empty());

        // One that becomes the server is none.
        fs::write(&postgres, script("exec")).expect("write");
        a.does(Job::StartPrimary).await;
        let busy = a.busy_backend().await;
        assert!(a.hands.postmaster.processes().expect("/proc is read").contains(&busy));
        a.does(Job::Stop { mode: AT_ONCE }).await;
        assert!(!lives(busy));
    });
}

/// A program that a server has started, and that stands elsewhere; nobody waits for it.
async fn starts_elsewhere(member: &Member, dir: &Path) -> Pid {
    let noted = dir.join("elsewhere");
    let program = format!("cd / && echo $$ > {} && exec sleep 600", noted.display());
    member.client().await.batch_execute("CREATE TABLE IF NOT EXISTS t (x text)").await.expect("write");
    member.backend_that_runs(&format!("COPY t FROM PROGRAM '{program}'")).await;
    noted_pid(&noted).await
}

/// It is no descendant of anybody's any more, and neither stands in the data directory nor is Postgres.
#[test]
fn what_a_server_has_started_elsewhere_goes_with_a_killed_guard() {
    as_server_user("what_a_server_has_started_elsewhere_goes_with_a_killed_guard", || async {
        let dir = scratch();
        let mut a = Member::new(dir.path(), "a");
        a.bootstraps().await;
        let elsewhere = starts_elsewhere(&a, dir.path()).await;
        a.kill_guard();
        let how = a.hears_its_end().await;
        assert!(how.contains("guard") && !lives(elsewhere), "{how}");
    });
}

#[test]
fn what_a_server_has_started_elsewhere_is_gone_before_the_next_life_of_the_bot_starts_another() {
    as_server_user(
        "what_a_server_has_started_elsewhere_is_gone_before_the_next_life_of_the_bot_starts_another",
        || async {
            let dir = scratch();
            let a = earlier_life(|| Member::new(dir.path(), "a"));
            let elsewhere = starts_elsewhere(&a, dir.path()).await;
            // Not the server's: the same user's, in the same place.
            let mut bystander = Command::new("sleep").arg("600").current_dir("/").spawn().expect("a program");
            a.kill_guard();
            let again = a.again(dir.path());
            again.does(Job::Stop { mode: AT_ONCE }).await;
            again.does(Job::StartPrimary).await;
            assert!(!lives(elsewhere));
            assert!(bystander.try_wait().expect("its state").is_none(), "a program of somebody else's was killed");
            bystander.kill().expect("kill");
            bystander.wait().expect("its end");
            again.does(Job::Stop { mode: AT_ONCE }).await;
        },
    );
}

/// The number that a program has left in a file.
async fn noted_pid(file: &Path) -> Pid {
    loop {
        let text = fs::read_to_string(file).unwrap_or_default();
        if let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) {
            return pid;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// It has a hundred fences to hear of, the first of which have passed by the time that it hears of them.
#[test]
fn a_guard_that_stood_still_while_its_fence_was_moved_on_lets_a_healthy_server_live() {
    as_server_user("a_guard_that_stood_still_while_its_fence_was_moved_on_lets_a_healthy_server_live", || async {
        let dir = scratch();
        let mut a = Member::new(dir.path(), "a");
        a.bootstraps().await;
        let (life, guard) = (a.hands.postmaster.life(), a.guard().expect("a guard"));
        kill_process(guard, Signal::STOP).expect("freeze");
        for _renewal in 0..160 {
            a.hands.postmaster.set_fence(Clock::now() + Span::from_secs(1), None);
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        assert!(!a.hears_of_its_guard().await, "it does not answer");
        a.hands.postmaster.set_fence(Clock::now() + Span::from_secs(60), None);
        kill_process(guard, Signal::CONT).expect("thaw");
        assert!(a.hears_of_its_guard().await, "it answers again");
        a.hands.postmaster.confirm_fence().await.expect("the last fence stands");
        assert_eq!((a.hands.postmaster.life(), a.guard()), (life, Some(guard)));
        assert_eq!(a.asks("SELECT 1").await, "1");
        // And it is as it was.
        fence_falls(&mut a).await;
    });
}

#[test]
fn the_server_of_a_guard_that_stands_still_can_be_restarted_under_another() {
    as_server_user("the_server_of_a_guard_that_stands_still_can_be_restarted_under_another", || async {
        let dir = scratch();
        let mut a = Member::new(dir.path(), "a");
        a.bootstraps().await;
        let guard = a.guard().expect("a guard");
        kill_process(guard, Signal::STOP).expect("freeze");
        for _renewal in 0..3 {
            a.hands.postmaster.set_fence(Clock::now() + Span::from_secs(60), None);
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
        assert!(!a.hears_of_its_guard().await, "it does not answer");
        let stop = tokio::time::timeout(Duration::from_secs(4), a.does(Job::Stop { mode: StopMode::Fast }));
        let stopped = stop.await.expect("its last word is not waited for");
        assert!(matches!(stopped, JobResult::Stopped { shutdown_checkpoint: Some(_) }), "{stopped:?}");
        assert!(!lives(guard));
        a.hears_its_end().await;
        a.does(Job::StartPrimary).await;
        assert_ne!(a.guard(), Some(guard));
        fence_falls(&mut a).await;
    });
}
