//! The jobs of the shell, each on real servers: what the machine asks for is what happens.

mod shell_support;

use std::{collections::BTreeMap, fs, sync::Arc, time::Duration};

use bots_core::wire::Timeline;
use postgres_bot::{
    machine::{BLOCKED, DataDir, Event, IN_DOUBT, Job, JobResult, Postgres, Rules, Running, StopMode},
    shell::{inspect::inspect, postmaster::Life, processes},
};
use rustix::process::{Signal, kill_process};
use shell_support::{AT_ONCE, Member, as_server_user, scratch, started};

/// What a rewind has left half done is kept.
const DISCARD: Job = Job::DiscardUnfinished { remove_rewound: false };

#[test]
fn a_cluster_is_made_copied_promoted_rewound_and_stopped() {
    as_server_user("a_cluster_is_made_copied_promoted_rewound_and_stopped", || async {
        let dir = scratch();
        let (a, b) = (Member::new(dir.path(), "a"), Member::new(dir.path(), "b"));
        assert_eq!(a.looks().await, DataDir::Empty);

        let JobResult::Initialized { system_id } = a.does(Job::Initialize).await else { panic!("no identifier") };
        let unfinished =
            DataDir::Unfinished { system_id: Some(system_id.clone()), cloning: false, running: Running::No };
        assert_eq!(a.looks().await, unfinished);
        let up = started(a.does(Job::StartPrimary).await);
        assert_eq!((up.in_recovery, up.timeline), (false, Timeline(1)));
        for _idempotent in 0..2 {
            a.does(Job::CreateRoles).await;
        }
        a.does(Job::Complete).await;
        let present = |timeline, was_primary, running| DataDir::Present {
            system_id: system_id.clone(),
            timeline: Timeline(timeline),
            was_primary,
            rewound: false,
            running,
        };
        // Nobody has adopted it, and nobody says where its fence stands: it may be there already.
        let found = a.looks().await;
        let DataDir::Present { running: running @ Running::LeftBehind { fence: Some(_) }, .. } = found else {
            panic!("{found:?}")
        };
        assert_eq!(found, present(1, true, running));
        a.client()
            .await
            .batch_execute("CREATE TABLE t (x text); INSERT INTO t VALUES ('common')")
            .await
            .expect("write");

        b.does(Job::Clone { source: a.as_upstream() }).await;
        assert_eq!(b.looks().await, present(1, false, Running::No));
        let up = started(b.does(Job::StartStandby { upstream: Some(a.as_upstream()) }).await);
        assert!(up.in_recovery);
        b.comes_to("SELECT status FROM pg_stat_wal_receiver", "streaming").await;
        assert_eq!(a.asks("SELECT application_name FROM pg_stat_replication").await, "b");
        a.client().await.batch_execute("INSERT INTO t VALUES ('streamed')").await.expect("write");
        b.comes_to("SELECT count(*) FROM t", "2").await;

        // Two primaries, by hand: what each writes now is what a rewind is for.
        let JobResult::Promoted { server, ancestry } =
            b.does(Job::Promote { timeline: Timeline(2), heeds: false, without_slots: vec![] }).await
        else {
            panic!("not promoted")
        };
        assert_eq!((server.in_recovery, server.timeline), (false, Timeline(2)));
        assert!(matches!(ancestry[..], [(Timeline(1), at)] if at <= server.position), "{ancestry:?}");
        b.client().await.batch_execute("INSERT INTO t VALUES ('kept')").await.expect("the promoted server is writable");
        b.does(Job::Checkpoint).await;
        a.client().await.batch_execute("INSERT INTO t VALUES ('lost')").await.expect("write");

        // Stopped hard: the rewind has to recover it first.
        let stopped = a.does(Job::Stop { mode: AT_ONCE }).await;
        assert_eq!(stopped, JobResult::Stopped { shutdown_checkpoint: None });
        assert_eq!(a.looks().await, present(1, true, Running::No));
        a.does(Job::Rewind { source: b.as_upstream() }).await;
        assert!(matches!(a.looks().await, DataDir::Present { was_primary: false, rewound: true, .. }));
        a.does(Job::StartStandby { upstream: Some(b.as_upstream()) }).await;
        assert!(matches!(a.looks().await, DataDir::Present { rewound: false, .. }));
        a.comes_to("SELECT string_agg(x, ',' ORDER BY x) FROM t", "common,kept,streamed").await;
        a.comes_to("SELECT status FROM pg_stat_wal_receiver", "streaming").await;

        // Turned away and back, without a restart.
        let before = a.asks("SELECT pg_postmaster_start_time()").await;
        a.does(Job::Follow { upstream: None }).await;
        a.comes_to("SELECT count(*) FROM pg_stat_wal_receiver", "0").await;
        a.does(Job::Follow { upstream: Some(b.as_upstream()) }).await;
        a.comes_to("SELECT status FROM pg_stat_wal_receiver", "streaming").await;
        assert_eq!(a.asks("SELECT pg_postmaster_start_time()").await, before);

        // Turned to somebody while it starts, wherever that is met: it comes up with what it was told last.
        for cut_off_after_ms in [0, 5, 10, 20, 50, 100] {
            a.does(Job::Stop { mode: StopMode::Fast }).await;
            let start = a.does(Job::StartStandby { upstream: None });
            let _cut_off_or_not = tokio::time::timeout(Duration::from_millis(cut_off_after_ms), start).await;
            started(a.does(Job::StartStandby { upstream: Some(b.as_upstream()) }).await);
            a.comes_to("SELECT status FROM pg_stat_wal_receiver", "streaming").await;
        }

        // A reload that is asked for while it starts waits until it can be heard: before, it would end the server.
        for asked_after_ms in [1, 3, 6, 10, 20] {
            a.does(Job::Stop { mode: StopMode::Fast }).await;
            let reload = async {
                while a.hands.postmaster.life() == Life::Down {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                tokio::time::sleep(Duration::from_millis(asked_after_ms)).await;
                a.hands.apply().await.expect("written");
            };
            let start = a.does(Job::StartStandby { upstream: Some(b.as_upstream()) });
            let (up, ()) = tokio::join!(start, reload);
            started(up);
            a.comes_to("SELECT status FROM pg_stat_wal_receiver", "streaming").await;
        }

        let JobResult::Stopped { shutdown_checkpoint } = b.does(Job::Stop { mode: StopMode::Fast }).await else {
            panic!("not stopped")
        };
        let last = shutdown_checkpoint.expect("a clean stop of a primary tells where it ended");
        let received = a.asks("SELECT pg_wal_lsn_diff(pg_last_wal_receive_lsn(), '0/0')").await;
        assert!(received.parse::<u64>().expect("a position") > last.0, "the replica has the last word");
        let stopped = a.does(Job::Stop { mode: StopMode::Fast }).await;
        assert_eq!(stopped, JobResult::Stopped { shutdown_checkpoint: None });
        for member in [&a, &b] {
            assert!(processes::of_server(&[&member.data_dir()]).expect("/proc is read").is_empty());
        }
    });
}

#[test]
fn what_the_eye_on_the_disk_has_left_makes_a_directory_no_less_empty() {
    as_server_user("what_the_eye_on_the_disk_has_left_makes_a_directory_no_less_empty", || async {
        let dir = scratch();
        let [a, b] = ["a", "b"].map(|name| Member::new(dir.path(), name));
        for member in [&a, &b] {
            fs::create_dir_all(member.data_dir()).expect("make the directory");
            fs::write(member.data_dir().join("pgsql_tmp_disk_watch"), "").expect("write");
            assert_eq!(member.looks().await, DataDir::Empty);
        }
        a.bootstraps().await;
        b.does(Job::Clone { source: a.as_upstream() }).await;
        assert!(matches!(b.looks().await, DataDir::Present { was_primary: false, .. }));
        a.does(Job::Stop { mode: AT_ONCE }).await;
    });
}

#[test]
fn a_number_that_another_member_has_is_passed_over() {
    as_server_user("a_number_that_another_member_has_is_passed_over", || async {
        let dir = scratch();
        let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| Member::new(dir.path(), name));
        a.bootstraps().await;
        a.client().await.batch_execute("CREATE TABLE t (x text)").await.expect("write");
        for replica in [&b, &c, &d] {
            replica.does(Job::Clone { source: a.as_upstream() }).await;
            replica.does(Job::StartStandby { upstream: Some(a.as_upstream()) }).await;
            replica.comes_to("SELECT status FROM pg_stat_wal_receiver", "streaming").await;
        }
        // A standby that crashed on the leader's own timeline has nothing to rewind, and stays a standby.
        c.does(Job::Stop { mode: AT_ONCE }).await;
        c.does(Job::Rewind { source: a.as_upstream() }).await;
        assert!(matches!(c.looks().await, DataDir::Present { was_primary: false, .. }));
        c.does(Job::StartStandby { upstream: Some(a.as_upstream()) }).await;
        // Else it would lack the leader's last word, which the others have.
        c.comes_to("SELECT status FROM pg_stat_wal_receiver", "streaming").await;

        // Two promotions from timeline 1, neither of which knows of the other.
        a.does(Job::Stop { mode: StopMode::Fast }).await;
        for (promoted, number) in [(&b, 2), (&c, 4)] {
            let timeline = Timeline(number);
            let JobResult::Promoted { server, .. } =
                promoted.does(Job::Promote { timeline, heeds: false, without_slots: vec![] }).await
            else {
                panic!()
            };
            assert_eq!(server.timeline, timeline);
            let write = format!("INSERT INTO t VALUES ('{}')", promoted.hands.node.name);
            promoted.client().await.batch_execute(&write).await.expect("write");
            promoted.does(Job::Checkpoint).await;
        }
        // A replica follows over the gap, and the other primary is told from the leader and rewound.
        d.does(Job::Follow { upstream: Some(c.as_upstream()) }).await;
        d.comes_to("SELECT string_agg(x, ',') FROM t", "c").await;
        b.does(Job::Stop { mode: AT_ONCE }).await;
        b.does(Job::Rewind { source: c.as_upstream() }).await;
        b.does(Job::StartStandby { upstream: Some(c.as_upstream()) }).await;
        b.comes_to("SELECT string_agg(x, ',') FROM t", "c").await;
        b.comes_to("SELECT received_tli FROM pg_stat_wal_receiver WHERE status = 'streaming'", "4").await;

        // However far beyond its last restartpoint it is: a standby that follows nobody tells the timeline that it is on.
        d.does(Job::Stop { mode: AT_ONCE }).await;
        let up = started(d.does(Job::StartStandby { upstream: None }).await);
        assert_eq!((up.timeline, up.streaming), (Timeline(4), false));

        // A number that was taken for a promotion that did not come about keeps no server from starting.
        d.does(Job::Stop { mode: StopMode::Fast }).await;
        let wal = d.data_dir().join("pg_wal");
        fs::copy(wal.join("00000003.history"), wal.join("00000005.history")).expect("as a promotion to 6 leaves it");
        d.does(Job::StartStandby { upstream: Some(c.as_upstream()) }).await;
        d.comes_to("SELECT received_tli FROM pg_stat_wal_receiver WHERE status = 'streaming'", "4").await;
        assert!(!wal.join("00000005.history").exists() && wal.join("00000003.history").exists());
        for member in [&b, &c, &d] {
            member.does(Job::Stop { mode: AT_ONCE }).await;
        }
    });
}

/// It knows of the new timeline, which left its own before the point that its pages have come to: Postgres does not start by that.
#[test]
fn a_crashed_standby_that_has_more_than_the_new_leader_is_rewound() {
    as_server_user("a_crashed_standby_that_has_more_than_the_new_leader_is_rewound", || async {
        let dir = scratch();
        let [a, b, c] = ["a", "b", "c"].map(|name| Member::new(dir.path(), name));
        a.bootstraps().await;
        a.client().await.batch_execute("CREATE TABLE t (x text)").await.expect("write");
        for replica in [&b, &c] {
            replica.does(Job::Clone { source: a.as_upstream() }).await;
            replica.does(Job::StartStandby { upstream: Some(a.as_upstream()) }).await;
            replica.comes_to("SELECT status FROM pg_stat_wal_receiver", "streaming").await;
        }
        b.does(Job::Follow { upstream: None }).await;
        a.client().await.batch_execute("INSERT INTO t VALUES ('lost')").await.expect("write");
        c.comes_to("SELECT count(*) FROM t", "1").await;
        c.client().await.batch_execute("CHECKPOINT").await.expect("a restartpoint");
        a.does(Job::Stop { mode: AT_ONCE }).await;
        b.does(Job::Promote { timeline: Timeline(2), heeds: false, without_slots: vec![] }).await;
        b.does(Job::Checkpoint).await;
        c.does(Job::Follow { upstream: Some(b.as_upstream()) }).await;
        let history = c.data_dir().join("pg_wal/00000002.history");
        while !history.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        c.does(Job::Stop { mode: AT_ONCE }).await;
        let why = c.fails(Job::StartStandby { upstream: Some(b.as_upstream()) }).await;
        assert!(why.contains("does not contain minimum recovery point"), "{why}");

        c.does(Job::Rewind { source: b.as_upstream() }).await;
        c.does(Job::StartStandby { upstream: Some(b.as_upstream()) }).await;
        c.comes_to("SELECT received_tli FROM pg_stat_wal_receiver WHERE status = 'streaming'", "2").await;
        assert_eq!(c.asks("SELECT count(*) FROM t").await, "0");
        for member in [&b, &c] {
            member.does(Job::Stop { mode: AT_ONCE }).await;
        }
    });
}

/// It comes up on timeline 1, and replays the end of it, and what follows, later: `recovery_min_apply_delay` holds back what a large
/// log would.
#[test]
fn a_standby_that_replays_past_a_promotion_is_sure_of_nothing_before_it_tells_the_new_timeline() {
    as_server_user(
        "a_standby_that_replays_past_a_promotion_is_sure_of_nothing_before_it_tells_the_new_timeline",
        || async {
            let dir = scratch();
            let [a, b, mut c] = ["a", "b", "c"].map(|name| Member::new(dir.path(), name));
            a.bootstraps().await;
            a.client().await.batch_execute("CREATE TABLE t (x text)").await.expect("write");
            for replica in [&b, &c] {
                replica.does(Job::Clone { source: a.as_upstream() }).await;
                replica.does(Job::StartStandby { upstream: Some(a.as_upstream()) }).await;
                replica.comes_to("SELECT status FROM pg_stat_wal_receiver", "streaming").await;
            }
            a.client().await.batch_execute("INSERT INTO t VALUES ('on the old timeline')").await.expect("write");
            a.does(Job::Stop { mode: StopMode::Fast }).await;
            let timeline = Timeline(2);
            b.does(Job::Promote { timeline, heeds: false, without_slots: vec![] }).await;
            c.does(Job::Follow { upstream: Some(b.as_upstream()) }).await;
            b.client().await.batch_execute("INSERT INTO t VALUES ('on the new timeline')").await.expect("write");
            let end = b.asks("SELECT pg_current_wal_flush_lsn()").await;
            c.comes_to(&format!("SELECT pg_last_wal_receive_lsn() >= '{end}'"), "true").await;
            for member in [&b, &c] {
                member.does(Job::Stop { mode: AT_ONCE }).await;
            }
            let late = BTreeMap::from([(String::from("recovery_min_apply_delay"), String::from("1h"))]);
            c.hands.configure(late, Rules::default());
            let up = started(c.does(Job::StartStandby { upstream: None }).await);
            assert_eq!((up.timeline, up.settled), (Timeline(1), false), "it has not come to the promotion yet");
            c.observes();
            c.hands.configure(BTreeMap::new(), Rules::default());
            c.hands.apply().await.expect("no delay any more");
            let settled = |event| match event {
                Event::PostgresObserved(Postgres::Up(server)) if server.settled => Some(server),
                _other => None,
            };
            let server = c.hears("it is settled", settled).await;
            assert_eq!(server.timeline, timeline);
            assert_eq!(c.asks("SELECT count(*) FROM t").await, "2");
            c.does(Job::Stop { mode: AT_ONCE }).await;
        },
    );
}

#[test]
fn the_lock_of_a_dead_server_bars_nobody_though_its_number_is_somebodys() {
    as_server_user("the_lock_of_a_dead_server_bars_nobody_though_its_number_is_somebodys", || async {
        let dir = scratch();
        let a = Member::new(dir.path(), "a");
        a.bootstraps().await;
        let lock = a.hands.node.run_dir.join(format!(".s.PGSQL.{}.lock", a.port));
        let texts = [&lock, &a.data_dir().join("postmaster.pid")].map(|path| (path.clone(), fs::read_to_string(path)));
        a.does(Job::Stop { mode: AT_ONCE }).await;
        // As after a crash, with a number that another program has by now.
        let mut other = std::process::Command::new("sleep").arg("60").spawn().expect("another program");
        for (path, text) in texts {
            let text = text.expect("a lock of the running server");
            let (_dead, rest) = text.split_once('\n').expect("lines");
            fs::write(&path, format!("{}\n{rest}", other.id())).expect("write");
        }
        a.does(Job::StartPrimary).await;
        a.does(Job::Stop { mode: AT_ONCE }).await;
        other.kill().and_then(|()| other.wait()).expect("the other program lives on");
    });
}

#[test]
fn a_frozen_server_is_observed_to_be_silent() {
    as_server_user("a_frozen_server_is_observed_to_be_silent", || async {
        let dir = scratch();
        let mut a = Member::new(dir.path(), "a");
        a.bootstraps().await;
        a.observes();
        a.hears("up", |event| matches!(event, Event::PostgresObserved(Postgres::Up(_))).then_some(())).await;
        for pid in processes::of_server(&[&a.data_dir()]).expect("/proc is read") {
            kill_process(pid, Signal::STOP).expect("freeze");
        }
        a.hears("silence", |event| matches!(event, Event::PostgresObserved(Postgres::Silent)).then_some(())).await;
        for pid in processes::of_server(&[&a.data_dir()]).expect("/proc is read") {
            kill_process(pid, Signal::CONT).expect("thaw");
        }
        a.hears("up again", |event| matches!(event, Event::PostgresObserved(Postgres::Up(_))).then_some(())).await;
        a.does(Job::Stop { mode: AT_ONCE }).await;
    });
}

#[test]
fn what_is_not_ours_is_never_touched() {
    as_server_user("what_is_not_ours_is_never_touched", || async {
        let dir = scratch();
        let a = Member::new(dir.path(), "a");
        let data = a.data_dir();
        fs::create_dir_all(&data).expect("folder");
        fs::write(data.join("thesis.txt"), "years of work").expect("write");
        let told = inspect(&a.hands).await;
        assert!(
            matches!(&told, Event::DataUnusable { code: 3, why } if why.contains("postgresql.data_dir")),
            "{told:?}"
        );
        let why = a.fails(Job::Initialize).await;
        assert!(why.contains("not empty") && why.contains("thesis.txt"), "{why}");
        let why = a.fails(Job::Clone { source: a.as_upstream() }).await;
        assert!(why.contains("not empty"), "{why}");
        let why = a.fails(DISCARD).await;
        assert!(why.contains("no mark"), "{why}");
        assert_eq!(fs::read_to_string(data.join("thesis.txt")).expect("still there"), "years of work");
    });
}

#[test]
fn what_is_set_aside_is_kept_and_so_is_what_was_set_aside_before() {
    as_server_user("what_is_set_aside_is_kept_and_so_is_what_was_set_aside_before", || async {
        let dir = scratch();
        let a = Member::new(dir.path(), "a");
        let data = a.data_dir();
        fs::create_dir_all(&a.hands.node.run_dir).expect("folder");
        let half_rewound = |work: &str| {
            fs::create_dir_all(&data).expect("folder");
            fs::write(data.join("thesis.txt"), work).expect("write");
            fs::write(a.hands.node.rewinding(), "").expect("the mark of a rewind");
        };
        let keep = Job::SetAside { remove: false, leader: None };
        fs::create_dir_all(&data).expect("folder");
        fs::write(data.join("thesis.txt"), "whole").expect("write");
        a.does(keep.clone()).await;
        assert_eq!(a.looks().await, DataDir::Empty);
        // What a rewind has left half done is kept as well, by a bot that saw it fail and by one that was started since.
        half_rewound("half, seen");
        a.does(keep.clone()).await;
        assert_eq!(a.looks().await, DataDir::Empty);
        half_rewound("half, found");
        a.does(DISCARD).await;
        assert_eq!(a.looks().await, DataDir::Empty);
        // There is no place for a fourth: it stays where it is, and an operator must look.
        half_rewound("one too many");
        for job in [keep, DISCARD] {
            let why = a.fails(job).await;
            assert!(why.contains("data.diverged and 2 more beside it exist already"), "{why}");
            assert!(why.contains("remove_data_directory_on_rewind_failure"), "{why}");
        }
        let reads = |name: &str| fs::read_to_string(data.with_file_name(name).join("thesis.txt")).expect("kept");
        let kept = ["data.diverged", "data.diverged.2", "data.diverged.3", "data"].map(reads);
        assert_eq!(kept, ["whole", "half, seen", "half, found", "one too many"]);
        // With leave, it alone is deleted.
        a.does(Job::DiscardUnfinished { remove_rewound: true }).await;
        assert_eq!(a.looks().await, DataDir::Empty);
        fs::write(data.join("thesis.txt"), "whole again").expect("write");
        a.does(Job::SetAside { remove: true, leader: None }).await;
        assert_eq!(a.looks().await, DataDir::Empty);
        assert_eq!(reads("data.diverged"), "whole");
    });
}

#[test]
fn data_is_given_up_only_for_a_leader_that_sends_its_log() {
    as_server_user("data_is_given_up_only_for_a_leader_that_sends_its_log", || async {
        let dir = scratch();
        let (a, b) = (Member::new(dir.path(), "a"), Member::new(dir.path(), "b"));
        a.bootstraps().await;
        b.does(Job::Clone { source: a.as_upstream() }).await;
        let give_up = |remove| Job::SetAside { remove, leader: Some(a.as_upstream()) };
        let present = b.looks().await;
        a.does(Job::Stop { mode: AT_ONCE }).await;
        for remove in [false, true] {
            let why = b.fails(give_up(remove)).await;
            assert!(why.contains("a sends no log") && why.contains("the data is kept"), "{why}");
            assert_eq!(b.looks().await, present);
        }
        a.does(Job::StartPrimary).await;
        b.does(give_up(false)).await;
        assert_eq!(b.looks().await, DataDir::Empty);
        a.does(Job::Stop { mode: AT_ONCE }).await;
    });
}

#[test]
fn a_bootstrap_or_clone_that_is_given_up_can_be_discarded() {
    as_server_user("a_bootstrap_or_clone_that_is_given_up_can_be_discarded", || async {
        let dir = scratch();
        let (a, b) = (Member::new(dir.path(), "a"), Member::new(dir.path(), "b"));
        let given_up = tokio::time::timeout(Duration::from_millis(150), a.does(Job::Initialize)).await;
        assert!(given_up.is_err(), "initdb takes longer");
        assert!(matches!(a.looks().await, DataDir::Unfinished { cloning: false, .. }));
        a.does(DISCARD).await;
        assert_eq!(a.looks().await, DataDir::Empty);
        a.bootstraps().await;
        let given_up =
            tokio::time::timeout(Duration::from_millis(50), b.does(Job::Clone { source: a.as_upstream() })).await;
        assert!(given_up.is_err(), "pg_basebackup takes longer");
        assert!(matches!(b.looks().await, DataDir::Unfinished { cloning: true, .. }));
        b.does(DISCARD).await;
        assert_eq!(b.looks().await, DataDir::Empty);
        // A source that is not there is an error that names it, and what was begun can be discarded.
        a.does(Job::Stop { mode: AT_ONCE }).await;
        let why = b.fails(Job::Clone { source: a.as_upstream() }).await;
        assert!(why.contains("pg_basebackup") && why.contains("refused"), "{why}");
        b.does(DISCARD).await;
    });
}

#[test]
fn a_server_that_cannot_start_says_why() {
    as_server_user("a_server_that_cannot_start_says_why", || async {
        let dir = scratch();
        let mut a = Member::new(dir.path(), "a");
        a.does(Job::Initialize).await;
        fs::write(a.data_dir().join("postgresql.base.conf"), "shared_buffers = much\n").expect("write");
        let why = a.fails(Job::StartPrimary).await;
        assert!(why.contains("Postgres ended while it started"), "{why}");
        a.hears("its exit", |event| matches!(event, Event::PostgresExited { .. }).then_some(())).await;
    });
}

#[test]
fn a_configuration_that_cannot_be_written_is_written_once_it_can() {
    as_server_user("a_configuration_that_cannot_be_written_is_written_once_it_can", || async {
        let dir = scratch();
        let a = Member::new(dir.path(), "a");
        a.bootstraps().await;
        tokio::spawn(Arc::clone(&a.hands).keep_applied());
        // As on a full disk, no draft can be made.
        let in_the_way = a.data_dir().join("postgresql.conf.bots-tmp");
        fs::create_dir_all(in_the_way.join("not empty")).expect("a folder");
        a.hands.configure(BTreeMap::from([("work_mem".to_owned(), "5MB".to_owned())]), Rules::default());
        a.hands.apply_soon();
        tokio::task::yield_now().await;
        a.hands.apply().await.expect_err("it cannot be written, and its first try was before ours");
        assert_ne!(a.asks("current_setting('work_mem')").await, "5MB");
        fs::remove_dir_all(in_the_way).expect("out of the way");
        a.comes_to("current_setting('work_mem')", "5MB").await;
        a.does(Job::Stop { mode: AT_ONCE }).await;
    });
}

#[test]
fn passwords_stay_out_of_arguments_and_readable_files() {
    as_server_user("passwords_stay_out_of_arguments_and_readable_files", || async {
        let dir = scratch();
        let (a, b) = (Member::new(dir.path(), "a"), Member::new(dir.path(), "b"));
        a.bootstraps().await;
        b.does(Job::Clone { source: a.as_upstream() }).await;
        b.does(Job::StartStandby { upstream: Some(a.as_upstream()) }).await;
        let log = fs::read_to_string(&a.hands.node.log_file).expect("log");
        for secret in ["su'per", "re:pl", "rew ind"] {
            assert!(!log.contains(secret), "the server's log has {secret}");
            for file in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf", "postgresql.auto.conf"] {
                let text = fs::read_to_string(b.data_dir().join(file)).expect("file");
                assert!(!text.contains(secret), "{file} has {secret}");
            }
        }
        for private in [b.hands.node.passfile(), b.hands.node.run_dir.clone(), a.hands.node.log_file.clone()] {
            let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&private).expect("there").permissions());
            assert_eq!(mode & 0o077, 0, "{}", private.display());
        }
        assert!(!a.hands.node.run_dir.join("initdb-password").exists());
        for member in [&b, &a] {
            member.does(Job::Stop { mode: AT_ONCE }).await;
        }
    });
}

#[test]
fn while_the_rules_cannot_be_made_out_nobody_connects_but_the_bots() {
    as_server_user("while_the_rules_cannot_be_made_out_nobody_connects_but_the_bots", || async {
        let dir = scratch();
        let (a, b) = (Member::new(dir.path(), "a"), Member::new(dir.path(), "b"));
        let in_doubt = Rules { hba: vec![IN_DOUBT.to_owned()], ident: Vec::new() };
        a.hands.configure(BTreeMap::new(), in_doubt);
        a.bootstraps().await;
        let mut client = tokio_postgres::Config::new();
        client.host("127.0.0.1").port(a.port).user("postgres").password("su'per\\").dbname("postgres");
        let refused = client.connect(tokio_postgres::NoTls).await.err().expect("nobody is let in");
        assert_eq!(refused.code(), Some(&tokio_postgres::error::SqlState::INVALID_AUTHORIZATION_SPECIFICATION));
        b.does(Job::Clone { source: a.as_upstream() }).await;
        a.does(Job::Stop { mode: AT_ONCE }).await;
    });
}

/// The checkpointer alone makes commits wait, and it does not read its files in the middle of flushing.
#[test]
fn a_standby_that_may_acknowledge_alone_is_not_promoted() {
    as_server_user("a_standby_that_may_acknowledge_alone_is_not_promoted", || async {
        let dir = scratch();
        let (a, b) = (Member::new(dir.path(), "a"), Member::new(dir.path(), "b"));
        a.bootstraps().await;
        a.client().await.batch_execute("CREATE TABLE t (x int)").await.expect("write");
        b.does(Job::Clone { source: a.as_upstream() }).await;
        // It runs from the start without a name to wait for.
        b.does(Job::StartStandby { upstream: Some(a.as_upstream()) }).await;
        b.comes_to("SELECT status FROM pg_stat_wal_receiver", "streaming").await;
        let stopped = b.stops_its_checkpointer_at_work(&a).await;
        let names = BTreeMap::from([(String::from("synchronous_standby_names"), BLOCKED.to_owned())]);
        b.hands.configure(names, Rules::default());
        b.hands.apply().await.expect("written");
        b.comes_to("SELECT current_setting('synchronous_standby_names')", BLOCKED).await;

        let why = b.fails(Job::Promote { timeline: Timeline(2), heeds: true, without_slots: vec![] }).await;
        assert!(why.contains("would acknowledge commits alone"), "{why}");
        assert_eq!(b.asks("SELECT pg_is_in_recovery()").await, "true");

        kill_process(stopped, Signal::CONT).expect("goes on");
        b.does(Job::Promote { timeline: Timeline(2), heeds: true, without_slots: vec![] }).await;
        let commit = b.client().await;
        let commit = commit.batch_execute("INSERT INTO t VALUES (1)");
        let acknowledged = tokio::time::timeout(Duration::from_secs(2), commit).await;
        assert!(acknowledged.is_err(), "nobody but it has this commit: {acknowledged:?}");
        for member in [&a, &b] {
            member.does(Job::Stop { mode: AT_ONCE }).await;
        }
    });
}

#[test]
fn the_only_data_is_not_taken_for_anothers_because_a_program_failed_once() {
    as_server_user("the_only_data_is_not_taken_for_anothers_because_a_program_failed_once", || async {
        let dir = scratch();
        let a = Member::with_renamed_program(dir.path(), "a");
        let JobResult::Initialized { system_id } = a.does(Job::Initialize).await else { panic!("no identifier") };
        let unfinished = |system_id| DataDir::Unfinished { system_id, cloning: false, running: Running::No };
        let program = dir.path().join("programs/pg_controldata");
        let real = fs::read_link(&program).expect("a link");
        let stands_in = |script: &str| {
            fs::remove_file(&program).expect("gone");
            fs::write(&program, format!("#!/bin/sh\n{script}\n")).expect("written");
            fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("can be run");
        };
        let failed = dir.path().join("failed");
        let once = "test -e FAILED || { touch FAILED; echo 'Cannot allocate memory' >&2; exit 1; }; exec REAL \"$@\"";
        stands_in(&once.replace("FAILED", &failed.display().to_string()).replace("REAL", &real.display().to_string()));
        assert_eq!(a.looks().await, unfinished(Some(system_id)));
        assert!(failed.exists(), "it did fail");

        stands_in("exit 1");
        let Event::DataUnusable { why, .. } = inspect(&a.hands).await else { panic!("it cannot be known whose it is") };
        assert!(why.contains("control file cannot be read"), "{why}");
        fs::remove_file(a.data_dir().join("global/pg_control")).expect("gone");
        assert_eq!(a.looks().await, unfinished(None), "there is nothing yet");
    });
}
