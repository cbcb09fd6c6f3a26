//! The real HAProxy does what the model in `world` says: places, checks, drains, sessions, and the hold.

mod proxy;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bots_core::shell::{Clock, process::send_signal};
use edge_bot::{
    machine::{Admin, Backend, Command, Look, Place, Started},
    shell::{launch::Launch, socket::converse},
};
use proxy::{Backing, HOLD_MS, Proxy, STEP, served};
use rustix::process::Signal;
use tokio::{net::TcpStream, task::JoinSet};

/// How much sooner it may end: HAProxy counts from when it last looked at the clock.
const EARLY_MS_MAX: u64 = 200;
/// How much later it may end, for a proxy that does not get the processor.
const LATE_MS_MAX: u64 = 2_000;

/// From when a server has answered a check until HAProxy has counted it, and not yet as long as until the next one.
const AFTER_AN_ANSWER: Duration = Duration::from_millis(100);

/// The connections that a stalled proxy holds: enough for it to be caught at a look whenever it is stopped.
const HELD: usize = 600;
/// Longer than between two looks (`hold.lua`).
const STALL: Duration = Duration::from_millis(70);
const BETWEEN_STALLS: Duration = Duration::from_millis(30);

#[tokio::test]
async fn haproxy_does_what_the_model_says() {
    let proxy = Proxy::start().await;
    let backing = Backing::start().await;
    let shown = proxy.look(&[]).await;
    assert_eq!(shown.servers.len(), 6, "two places in each of three backends");
    assert!(shown.servers.iter().all(|s| s.admin == Admin::Maint && !s.up && s.weight == 100 && s.sessions == 0));
    let place = shown.servers.iter().find(|s| s.place.backend == Backend::Primary).expect("one").place.clone();
    let at = || place.clone();

    // Somebody connects while there is no primary: he is held, and served as soon as there is one.
    let mut held = proxy.connect().await;
    let address = Command::SetAddress { place: at(), serve: backing.serve, check: backing.check };
    let quiet = proxy.server(&place, &[address, Command::SetAdmin { place: at(), admin: Admin::Drain }]).await;
    assert_eq!((quiet.serve, quiet.check), (Some(backing.serve), Some(backing.check)));
    assert_eq!((quiet.admin, quiet.up, quiet.sessions), (Admin::Drain, true, 0), "up until its check, and drained");
    proxy.until("the check fails", &place, |s| !s.up).await;
    assert_eq!(
        proxy.server(&place, &[Command::SetAdmin { place: at(), admin: Admin::Ready }]).await.admin,
        Admin::Ready
    );
    backing.healthy.store(true, Ordering::Relaxed);
    let began = Clock::now();
    assert!(proxy.server(&place, &[Command::SetUp { place: at() }]).await.up, "healthy on our word");
    assert!(served(&mut held).await, "the held connection is served");
    println!("held, and served {} after the primary was there", Clock::now().since(began));
    assert_eq!(proxy.server(&place, &[]).await.sessions, 1);

    // It stops being the leader: no new connections, and the old ones are shut.
    let shut = [Command::SetAdmin { place: at(), admin: Admin::Drain }, Command::ShutSessions { place: at() }];
    proxy.look(&shut).await;
    assert!(!served(&mut held).await, "the session is shut");
    proxy.until("no session is left", &place, |s| s.sessions == 0 && s.up && s.admin == Admin::Drain).await;
    let began = Clock::now();
    assert!(!served(&mut proxy.connect().await).await, "nobody is there");
    let waited = Clock::now().since(began).as_millis();
    assert!((HOLD_MS - EARLY_MS_MAX..HOLD_MS + LATE_MS_MAX).contains(&waited), "held for {waited} ms, then let go");

    // The checks alone bring a ready server up and down, and shut its sessions.
    backing.healthy.store(false, Ordering::Relaxed);
    proxy.until("the check fails", &place, |s| !s.up).await;
    proxy.look(&[Command::SetAdmin { place: at(), admin: Admin::Ready }]).await;
    backing.healthy.store(true, Ordering::Relaxed);
    let mut client = proxy.connect().await;
    assert!(served(&mut client).await, "served once the check is good");
    backing.healthy.store(false, Ordering::Relaxed);
    proxy.until("the check shuts the session", &place, |s| !s.up && s.sessions == 0).await;
    assert!(!served(&mut client).await);

    // Back to rest; its weight is kept.
    let rest = [Command::SetWeight { place: at(), weight: 25 }, Command::SetAdmin { place: at(), admin: Admin::Maint }];
    let resting = proxy.server(&place, &rest).await;
    assert_eq!((resting.admin, resting.up, resting.weight), (Admin::Maint, false, 25));
    let nowhere = Place { backend: Backend::Primary, slot: String::from("nowhere") };
    let Look::Up { complaints, .. } = converse(&proxy.socket, &[Command::SetUp { place: nowhere }]).await else {
        panic!("it answers")
    };
    assert_eq!(complaints.len(), 1, "a place that is not there: {complaints:?}");
}

/// A server whose check has failed twice is a bad answer away from being down. On our word it begins anew, whether it is up,
/// or down already, or comes from rest: an answer of the time before it led does not take it away from its clients.
#[tokio::test]
async fn a_bad_answer_of_before_does_not_take_down_who_is_set_up() {
    let proxy = Proxy::start().await;
    let backing = Backing::start().await;
    let shown = proxy.look(&[]).await;
    let place = shown.servers.iter().find(|s| s.place.backend == Backend::Primary).expect("one").place.clone();
    let at = || place.clone();
    let open = || [Command::SetAdmin { place: at(), admin: Admin::Ready }, Command::SetUp { place: at() }];

    let address = Command::SetAddress { place: at(), serve: backing.serve, check: backing.check };
    let from_rest: Vec<Command> = std::iter::once(address).chain(open()).collect();
    assert!(proxy.server(&place, &from_rest).await.up, "healthy on our word");
    proxy.fails(&backing, 1).await;
    tokio::time::sleep(AFTER_AN_ANSWER).await;
    assert!(proxy.server(&place, &[]).await.up, "one bad answer does not take down who came from rest");

    proxy.look(&[Command::SetAdmin { place: at(), admin: Admin::Drain }]).await;
    proxy.until("the check fails", &place, |s| !s.up).await;
    assert!(proxy.server(&place, &open()).await.up, "healthy on our word");
    proxy.look(&[Command::SetAdmin { place: at(), admin: Admin::Drain }]).await;
    proxy.fails(&backing, 2).await;
    tokio::time::sleep(AFTER_AN_ANSWER).await;
    assert!(proxy.server(&place, &open()).await.up, "two bad answers do not take it down");
    proxy.fails(&backing, 1).await;
    tokio::time::sleep(AFTER_AN_ANSWER).await;
    assert!(proxy.server(&place, &[]).await.up, "nor does the third, since the count began anew");
    assert!(served(&mut proxy.connect().await).await, "it serves meanwhile");
    proxy.until("its own bad answers take it down", &place, |s| !s.up).await;
}

/// HAProxy 2.6 forgets to wake a held connection that goes to sleep too late: it once was held for an hour. Here the proxy
/// is stopped again and again for longer than between two looks, while the holds of many connections end one by one,
/// before and after a server comes up.
#[tokio::test]
async fn a_stalled_proxy_does_not_hold_connections_for_ever() {
    let proxy = Proxy::start().await;
    let backing = Backing::start().await;
    let shown = proxy.look(&[]).await;
    let place = shown.servers.iter().find(|s| s.place.backend == Backend::Primary).expect("one").place.clone();
    let address = Command::SetAddress { place: place.clone(), serve: backing.serve, check: backing.check };
    proxy.look(&[address, Command::SetAdmin { place: place.clone(), admin: Admin::Ready }]).await;
    proxy.until("the check fails", &place, |s| !s.up).await;

    let over = Arc::new(AtomicBool::new(false));
    let stalls = tokio::spawn(stall(proxy.pid, Arc::clone(&over)));
    let mut clients = JoinSet::new();
    for client in 0..HELD {
        if client == HELD / 3 * 2 {
            // Two good checks later the first holds are over, and the last ones are not.
            backing.healthy.store(true, Ordering::Relaxed);
        }
        clients.spawn(held_for(proxy.connect().await));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let ends = clients.join_all().await;
    over.store(true, Ordering::Relaxed);
    stalls.await.expect("no panic");

    let count = ends.iter().filter(|(served, _)| *served).count();
    let longest = ends.iter().map(|(_, waited)| *waited).max().expect("clients");
    println!("{count} of {HELD} served, nobody held for longer than {longest} ms");
    assert!((1..HELD).contains(&count), "{count} of {HELD} are served: the server came too early or too late");
    let early = ends.iter().find(|(served, waited)| !served && *waited < HOLD_MS - EARLY_MS_MAX);
    assert_eq!(early, None, "let go before the hold was over");
    assert!(longest < HOLD_MS + LATE_MS_MAX, "held for {longest} ms");
    assert!(served(&mut proxy.connect().await).await, "and the proxy is as good as ever");
}

/// Stops the proxy for longer than between two looks, and lets it go on for a moment, until told that it is over.
async fn stall(pid: u32, over: Arc<AtomicBool>) {
    while !over.load(Ordering::Relaxed) {
        send_signal(pid, Signal::STOP).expect("it lives");
        tokio::time::sleep(STALL).await;
        send_signal(pid, Signal::CONT).expect("it lives");
        tokio::time::sleep(BETWEEN_STALLS).await;
    }
}

/// Whether a connection was served in the end, and after how many milliseconds it was served or closed.
async fn held_for(mut stream: TcpStream) -> (bool, u64) {
    let began = Clock::now();
    let served = served(&mut stream).await;
    (served, Clock::now().since(began).as_millis())
}

/// The operator owns the template: names and numbers of places, other sections, whatever the bot does not need.
#[tokio::test]
async fn an_operators_own_configuration_is_driven_all_the_same() {
    let built_in = include_str!("../src/shell/haproxy.cfg");
    let own = built_in.replace("server-template pg \"${EDGE_PLACES}\"", "server-template database 5");
    assert_ne!(own, built_in);
    let own = own + "\nbackend others\n    server theirs 127.0.0.1:1\n";
    let proxy = Proxy::start_with(Some(&own)).await;
    let backing = Backing::start().await;
    let shown = proxy.look(&[]).await;
    let count = |backend| shown.servers.iter().filter(|s| s.place.backend == backend).count();
    assert_eq!((count(Backend::Primary), count(Backend::Replicas), count(Backend::Web)), (5, 5, 2));
    let place = Place { backend: Backend::Primary, slot: String::from("database3") };
    let address = Command::SetAddress { place: place.clone(), serve: backing.serve, check: backing.check };
    let open = [address, Command::SetAdmin { place: place.clone(), admin: Admin::Ready }, Command::SetUp { place }];
    proxy.look(&open).await;
    assert!(served(&mut proxy.connect().await).await, "it routes there");
}

#[tokio::test]
async fn two_proxies_never_share_their_ports() {
    let mut proxy = Proxy::start().await;
    let launch = proxy.launch.take().expect("started");
    let elsewhere = tempfile::tempdir().expect("a folder");
    let mut other = Launch { data_dir: elsewhere.path().to_owned(), ..launch.clone() };
    let own = elsewhere.path().join("haproxy.sock").display().to_string();
    other.env.iter_mut().filter(|(name, _)| *name == "EDGE_SOCKET").for_each(|(_, value)| value.clone_from(&own));
    let Started::Failed { why } = other.start().await else { panic!("the ports are taken") };
    assert!(why.contains("bind") && !why.contains('\n'), "{why}");

    // One that is not heard of any more hands its ports over, and goes.
    let lost = proxy.pid;
    std::fs::remove_file(&proxy.socket).expect("take its socket away");
    assert_eq!(launch.start().await, Started::Done);
    proxy.pid = proxy.look(&[]).await.pid;
    assert_ne!(proxy.pid, lost);
    let gone = bots_core::shell::process::exit_of(lost);
    // That there is no such process says it just as well.
    let _gone_already = tokio::time::timeout(STEP, gone).await.expect("it ends in time");
}
