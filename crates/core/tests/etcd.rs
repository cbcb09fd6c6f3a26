//! A bot's way to etcd under faults: real servers that crash, freeze and fall silent; a network that delays and cuts.

mod support;

use std::{path::Path, process::Command, time::Duration};

use bots_core::{
    dcs::{DcsAction, DcsEvent, LeaseId, Outcome, RequestId, Transaction, View, Write},
    machine::{Span, Time},
    shell::{
        Clock, Etcd, Secret, config,
        testing::{EtcdCluster, EtcdServer},
    },
};
use futures_util::StreamExt;
use support::{Bench, PATIENCE, eventually, ms_between, proxy::Proxy};
use tempfile::TempDir;

const TTL: Span = Span::from_secs(3);
const PREFIX: &str = "/service/s/";

fn one() -> (EtcdServer, TempDir) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    (EtcdServer::start(dir.path()).expect("etcd"), dir)
}

fn three() -> (EtcdCluster, TempDir) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    (EtcdCluster::start(dir.path(), 3).expect("etcd"), dir)
}

fn put(key: &str, value: &str) -> Transaction {
    Transaction::new(vec![], vec![Write::put(format!("{PREFIX}{key}"), value)])
}

async fn must_put(client: &Etcd, key: &str, value: &str) {
    eventually("write", async || matches!(client.transact(&put(key, value)).await, Outcome::Done(_)).then_some(()))
        .await;
}

fn granted(event: &DcsEvent) -> Option<(LeaseId, Time)> {
    match event {
        DcsEvent::LeaseGranted { lease, valid_until } => Some((*lease, *valid_until)),
        _ => None,
    }
}

fn renewed(event: &DcsEvent) -> Option<Time> {
    match event {
        DcsEvent::LeaseRenewed { valid_until, .. } => Some(*valid_until),
        _ => None,
    }
}

fn lost(event: &DcsEvent) -> Option<String> {
    match event {
        DcsEvent::LeaseLost { why, .. } => Some(why.clone()),
        _ => None,
    }
}

fn watch_lost(event: &DcsEvent) -> Option<()> {
    matches!(event, DcsEvent::WatchLost { .. }).then_some(())
}

/// The values of a list.
fn listed(event: &DcsEvent) -> Option<Vec<String>> {
    match event {
        DcsEvent::Listed { entries, .. } => Some(entries.iter().map(|kv| kv.value.clone()).collect()),
        _ => None,
    }
}

/// Whether the view shows exactly these values once it has taken in the event.
fn shows(view: &mut View, event: &DcsEvent, values: &[&str]) -> Option<()> {
    view.apply(event);
    view.below(PREFIX).map(|kv| kv.value.as_str()).eq(values.iter().copied()).then_some(())
}

fn answered(event: &DcsEvent) -> Option<Outcome> {
    match event {
        DcsEvent::Answered { outcome, .. } => Some(outcome.clone()),
        _ => None,
    }
}

#[tokio::test]
async fn a_watch_resumes_after_the_member_crashed_and_history_was_compacted() {
    let (mut server, _dir) = one();
    let mut bench = Bench::new(&server.endpoint());
    let other = server.client();
    must_put(&other, "a", "1").await;
    bench.dcs.watch([PREFIX.to_owned()]);
    let mut view = View::of([PREFIX.to_owned()]);
    bench.until("list", |event| shows(&mut view, event, &["1"])).await;

    server.kill().expect("kill -9");
    bench.until("broken watch", watch_lost).await;
    server.restart().expect("restart");
    must_put(&other, "a", "2").await;
    must_put(&other, "b", "3").await;
    let (revision, _) = other.list(PREFIX).await.expect("list");
    other.compact(revision).await.expect("compact");
    // The list may come before, between or after the writes, and the watch may begin before or after the compaction: the
    // view must end at the truth by whichever way.
    bench.until("the writes", |event| shows(&mut view, event, &["2", "3"])).await;
    must_put(&other, "c", "4").await;
    bench.until("a later write", |event| shows(&mut view, event, &["2", "3", "4"])).await;
}

#[tokio::test]
async fn a_watch_resumes_after_its_connection_was_cut() {
    let (server, _dir) = one();
    let proxy = Proxy::start(&server.endpoint()).await;
    let mut bench = Bench::new(&proxy.hosts());
    bench.dcs.watch([PREFIX.to_owned()]);
    assert!(bench.until("list", listed).await.is_empty());
    proxy.cut();
    bench.until("broken watch", watch_lost).await;
    must_put(&server.client(), "a", "1").await;
    let mut view = View::of([PREFIX.to_owned()]);
    bench.until("the write", |event| shows(&mut view, event, &["1"])).await;
}

#[tokio::test]
async fn a_watch_on_a_silent_connection_is_given_up() {
    let (server, _dir) = one();
    let proxy = Proxy::start(&server.endpoint()).await;
    let mut bench = Bench::new(&proxy.hosts());
    bench.dcs.watch([PREFIX.to_owned()]);
    bench.until("list", listed).await;
    must_put(&server.client(), "a", "1").await;
    bench.until("change", |event| matches!(event, DcsEvent::Changed { .. }).then_some(())).await;
    proxy.partition(true);
    let silent = Clock::now();
    // Nothing is asked and nothing is renewed: only the connection's own pings can tell.
    bench.until("broken watch", watch_lost).await;
    let took = ms_between(silent, Clock::now());
    assert!(took < 9_000, "the silence was noticed after {took} ms");
    proxy.partition(false);
    bench.until("second list", listed).await;
}

#[tokio::test]
async fn every_client_works_with_one_member_of_three_dead() {
    let (mut cluster, _dir) = three();
    cluster.members[1].kill().expect("kill -9");
    // Each client begins at a random member; twelve of them meet the dead one.
    for n in 0..12 {
        let client = cluster.client();
        must_put(&client, "a", &n.to_string()).await;
        let (_, found) = client.list(PREFIX).await.expect("list");
        assert_eq!(found[0].value, n.to_string());
        let (lease, _) = client.grant(TTL).await.expect("grant");
        assert!(client.keep_alive_once(lease).await.expect("keep alive"));
        assert!(client.revoke(lease).await.expect("revoke"));
    }
}

#[tokio::test]
async fn a_refused_connection_is_not_unknown() {
    let (mut cluster, _dir) = three();
    must_put(&cluster.client(), "a", "0").await;
    cluster.members[0].kill().expect("kill -9");
    let client = cluster.client();
    eventually("leader", async || client.list(PREFIX).await.ok()).await;
    for n in 0..12 {
        let outcome = cluster.client().transact(&put("a", &n.to_string())).await;
        assert!(matches!(outcome, Outcome::Done(_)), "nothing was sent to the dead member: {outcome:?}");
    }
}

#[tokio::test]
async fn a_lease_and_a_watch_move_on_when_their_member_freezes() {
    let (cluster, _dir) = three();
    let mut bench = Bench::new(&cluster.hosts());
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    bench.until("lease", granted).await;
    bench.dcs.watch([PREFIX.to_owned()]);
    bench.until("list", listed).await;
    let address = bench.dcs.etcd().address();
    let member = cluster.members.iter().find(|m| m.endpoint() == address).expect("one of three");
    member.freeze().expect("SIGSTOP");
    let frozen = Clock::now();
    let (mut relisted, mut was_renewed) = (None, None);
    while relisted.is_none() || was_renewed.is_none() {
        let event = bench
            .until("list or renewal elsewhere", |e| match e {
                DcsEvent::Listed { .. } | DcsEvent::LeaseRenewed { .. } | DcsEvent::LeaseLost { .. } => Some(e.clone()),
                _ => None,
            })
            .await;
        match event {
            DcsEvent::Listed { .. } => relisted = Some(Clock::now()),
            // One that was on its way when the member froze does not count.
            DcsEvent::LeaseRenewed { valid_until, .. } if valid_until > frozen + TTL => was_renewed = Some(()),
            DcsEvent::LeaseLost { why, .. } => panic!("a majority lives, yet: {why}"),
            _ => {}
        }
    }
    member.thaw().expect("SIGCONT");
    let took = ms_between(frozen, relisted.expect("set above"));
    // The frozen member may be etcd's leader, so an election may lie in between; without that it is about half a TTL.
    assert!(took < 9_000, "the silent member was noticed after {took} ms");
}

#[tokio::test]
async fn a_lease_on_which_a_lock_hangs_is_renewed_more_often() {
    let (server, _dir) = one();
    let mut bench = Bench::new(&server.endpoint());
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    let (lease, _) = bench.until("lease", granted).await;
    let every = Span::from_millis(200);
    bench.dcs.perform(DcsAction::PaceLease { lease, every });
    let mut last = bench.until("first renewal", renewed).await;
    let began = Clock::now();
    for _ in 0..4 {
        let next = bench.until("renewal", renewed).await;
        assert!(next >= last + every, "renewed after {}, not before {every}", next.since(last));
        last = next;
    }
    assert!(Clock::now() < began + TTL, "five renewals within one TTL");
}

#[tokio::test]
async fn a_revoked_lease_is_lost_at_the_next_renewal_and_can_be_had_again() {
    let (server, _dir) = one();
    let mut bench = Bench::new(&server.endpoint());
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    let (lease, _) = bench.until("lease", granted).await;
    assert!(server.client().revoke(lease).await.expect("revoke"));
    let revoked = Clock::now();
    bench.until("loss", lost).await;
    assert!(ms_between(revoked, Clock::now()) < TTL.as_millis(), "known before it would have run out");
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    let (again, _) = bench.until("second lease", granted).await;
    assert_ne!(lease, again);
}

#[tokio::test]
async fn a_lease_counts_from_when_the_request_was_sent() {
    let (server, _dir) = one();
    let proxy = Proxy::start(&server.endpoint()).await;
    let delay = Duration::from_millis(100);
    proxy.delay_replies(delay);
    let mut bench = Bench::new(&proxy.hosts());
    let asked = Clock::now();
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    let (_, until) = bench.until("lease", granted).await;
    let slack = ms_between(Clock::now(), until);
    assert!(slack + 100 <= TTL.as_millis(), "counted from the reply: {slack} ms are left");
    assert!(until >= asked + TTL);
    let mut last = until;
    for _ in 0..3 {
        let until = bench.until("renewal", renewed).await;
        let left = ms_between(Clock::now(), until);
        assert!(left + 100 <= TTL.as_millis(), "counted from the reply: {left} ms are left");
        assert!(until > last);
        last = until;
    }
}

#[tokio::test]
async fn a_silent_network_lets_validity_run_out_and_the_lease_is_lost_when_it_comes_back() {
    let (server, _dir) = one();
    let proxy = Proxy::start(&server.endpoint()).await;
    let mut bench = Bench::new(&proxy.hosts());
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    let (lease, _) = bench.until("lease", granted).await;
    let bound = Transaction::new(vec![], vec![Write::put_leased(format!("{PREFIX}lock"), "a", lease)]);
    bench.dcs.perform(DcsAction::Transact { id: RequestId(1), transaction: bound });
    assert!(matches!(bench.until("answer", answered).await, Outcome::Done(_)));

    proxy.partition(true);
    let silent = Clock::now();
    let direct = server.client();
    eventually("expiry", async || direct.get(&format!("{PREFIX}lock")).await.expect("get").is_none().then_some(()))
        .await;
    let expired = Clock::now();
    proxy.partition(false);
    // A request of before the silence may be answered late; its validity still ends before the store's own patience.
    let why = bench
        .until("loss", |event| {
            if let Some(until) = renewed(event) {
                assert!(until <= expired, "validity is claimed beyond the end of the lease");
                assert!(until <= silent + TTL + Span::from_millis(50));
            }
            lost(event)
        })
        .await;
    assert!(why.contains("expired"), "{why}");
}

#[tokio::test]
async fn a_bot_that_stands_still_loses_its_lease() {
    let (server, _dir) = one();
    let mut bench = Bench::standing_still(&server.endpoint());
    bench.pulse.beat();
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    let (lease, _) = bench.until("lease", granted).await;
    let direct = server.client();
    let bound = Transaction::new(vec![], vec![Write::put_leased(format!("{PREFIX}lock"), "a", lease)]);
    assert!(matches!(direct.transact(&bound).await, Outcome::Done(_)));
    let stood_still = Clock::now();
    let why = bench
        .until("loss", |event| {
            assert!(renewed(event).is_none(), "a zombie keeps its lease");
            lost(event)
        })
        .await;
    assert!(why.contains("stood still"), "{why}");
    assert!(ms_between(stood_still, Clock::now()) < TTL.as_millis());
    eventually("expiry", async || direct.get(&format!("{PREFIX}lock")).await.expect("get").is_none().then_some(()))
        .await;
}

#[tokio::test]
async fn a_lost_answer_is_unknown_although_the_write_was_made() {
    let (server, _dir) = one();
    let proxy = Proxy::start(&server.endpoint()).await;
    let mut bench = Bench::new(&proxy.hosts());
    bench.dcs.perform(DcsAction::Transact { id: RequestId(1), transaction: put("a", "1") });
    assert!(matches!(bench.until("answer", answered).await, Outcome::Done(_)));
    proxy.swallow_replies(true);
    bench.dcs.perform(DcsAction::Transact { id: RequestId(2), transaction: put("a", "2") });
    assert!(matches!(bench.until("answer", answered).await, Outcome::Unknown(_)));
    let found = server.client().get(&format!("{PREFIX}a")).await.expect("get").expect("there");
    assert_eq!(found.value, "2");
}

#[tokio::test]
async fn requests_are_performed_in_order_and_the_goodbye_is_said() {
    let (server, _dir) = one();
    let mut bench = Bench::new(&server.endpoint());
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    let (lease, _) = bench.until("lease", granted).await;
    for n in 1..=20 {
        bench.dcs.perform(DcsAction::Transact { id: RequestId(n), transaction: put("a", &n.to_string()) });
    }
    let bound = Transaction::new(vec![], vec![Write::put_leased(format!("{PREFIX}member"), "a", lease)]);
    bench.dcs.perform(DcsAction::Transact { id: RequestId(21), transaction: bound });
    bench.dcs.perform(DcsAction::RevokeLease { lease });
    bench.dcs.drain(support::PATIENCE).await;
    let (_, left) = server.client().list(PREFIX).await.expect("list");
    assert_eq!(left.iter().map(|kv| kv.value.as_str()).collect::<Vec<_>>(), ["20"]);
    let count = bench.metrics.text();
    assert!(count.contains("bots_etcd_requests_total{op=\"txn\"} 21"), "{count}");
}

#[tokio::test]
async fn an_unreachable_store_is_waited_for_and_named_in_the_status() {
    let (mut server, _dir) = one();
    server.kill().expect("kill -9");
    let mut bench = Bench::new(&server.endpoint());
    bench.dcs.watch([PREFIX.to_owned()]);
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    let endpoint = server.endpoint();
    let trouble = eventually("trouble", async || bench.hub.status().report.troubles.pop()).await;
    assert!(trouble.contains(&endpoint) && trouble.contains("refused"), "{trouble}");
    bench.dcs.perform(DcsAction::Transact { id: RequestId(1), transaction: put("a", "1") });
    let outcome = bench.until("answer", answered).await;
    assert!(matches!(&outcome, Outcome::Unknown(why) if why.contains("refused")), "{outcome:?}");

    server.restart().expect("restart");
    let (mut has_lease, mut has_list) = (false, false);
    while !(has_lease && has_list) {
        let event = bench.until("lease and list", |e| Some(e.clone())).await;
        has_lease |= granted(&event).is_some();
        has_list |= listed(&event).is_some();
    }
    assert_eq!(bench.hub.status().report.troubles, Vec::<String>::new());
}

#[tokio::test]
async fn a_compacted_start_is_seen_and_listed_anew() {
    let (server, _dir) = one();
    let client = server.client();
    for n in 0..5 {
        must_put(&client, "a", &n.to_string()).await;
    }
    let (revision, _) = client.list(PREFIX).await.expect("list");
    client.compact(revision).await.expect("compact");
    assert!(client.compact(revision).await.is_err(), "a second compaction is refused, not lost");
    let bad = config::Etcd { protocol: Some("https".into()), ..config::Etcd::from_hosts("a:1") };
    assert!(Etcd::new(&bad).err().expect("refused").to_string().contains("etcd3.protocol"));
}

#[tokio::test]
async fn one_lease_takes_the_place_of_another_while_both_are_renewed() {
    let (server, _dir) = one();
    let mut bench = Bench::new(&server.endpoint());
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    let (short, _) = bench.until("short lease", granted).await;
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL.times(3) });
    let (long, _) = bench.until("long lease", granted).await;
    let of = |wanted: LeaseId| {
        move |event: &DcsEvent| match event {
            DcsEvent::LeaseRenewed { lease, valid_until } if *lease == wanted => Some(*valid_until),
            DcsEvent::LeaseLost { lease, why } => panic!("{} is lost: {why}", lease.0),
            _ => None,
        }
    };
    bench.until("the short one is renewed beside the long one", of(short)).await;
    bench.until("the short one is renewed again", of(short)).await;
    bench.dcs.perform(DcsAction::RevokeLease { lease: short });
    // Given back, it is neither renewed nor missed.
    bench.until("the long one is renewed", of(long)).await;
    assert!(!server.client().keep_alive_once(short).await.expect("keep alive"), "the short one is gone");
    assert!(server.client().keep_alive_once(long).await.expect("keep alive"));
}

/// The way to `server` as a user whose password is `secret`.
fn as_user(server: &EtcdServer, name: &str) -> config::Etcd {
    let (username, password) = (Some(name.to_owned()), Some(Secret::new("secret")));
    config::Etcd { username, password, ..config::Etcd::from_hosts(&server.endpoint()) }
}

fn enable_users(server: &EtcdServer) {
    server.ctl(&["user", "add", "root:secret"]).expect("a first user");
    server.ctl(&["auth", "enable"]).expect("authentication");
}

/// The arguments of an etcd that signs its tokens, with a key of its own.
fn signed_tokens(dir: &Path) -> String {
    let file = |name: &str| dir.join(name).display().to_string();
    let (private, public) = (file("private.pem"), file("public.pem"));
    for arguments in
        [vec!["genrsa", "-out", &private, "2048"], vec!["rsa", "-in", &private, "-pubout", "-out", &public]]
    {
        let made = Command::new("openssl").args(arguments).output().expect("openssl");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    format!("jwt,pub-key={public},priv-key={private},sign-method=RS256,ttl=10m")
}

#[tokio::test]
async fn a_signed_token_of_before_a_change_of_users_is_replaced_at_once() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let tokens = signed_tokens(dir.path());
    let server = EtcdServer::start_with(dir.path(), &["--auth-token", &tokens, "--bcrypt-cost", "4"]).expect("etcd");
    enable_users(&server);
    let client = Etcd::new(&as_user(&server, "root")).expect("a client");
    must_put(&client, "a", "1").await;
    for n in 0..2 {
        let newcomer = format!("user{n}:secret");
        server.ctl(&["--user", "root:secret", "user", "add", &newcomer]).expect("a change of users");
        let outcome = client.transact(&put("a", "2")).await;
        assert!(matches!(outcome, Outcome::Done(_)), "nothing was done with the old token: {outcome:?}");
        server.ctl(&["--user", "root:secret", "user", "delete", &format!("user{n}")]).expect("another change");
        client.list(PREFIX).await.expect("list");
    }
}

#[tokio::test]
async fn a_user_is_let_in_before_etcd_asks_for_one_and_after() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let server = EtcdServer::start_with(dir.path(), &["--bcrypt-cost", "4"]).expect("etcd");
    let client = Etcd::new(&as_user(&server, "root")).expect("a client");
    let outcome = client.transact(&put("a", "1")).await;
    assert!(matches!(outcome, Outcome::Done(_)), "etcd asks nobody: {outcome:?}");
    enable_users(&server);
    let outcome = client.transact(&put("a", "2")).await;
    assert!(matches!(outcome, Outcome::Done(_)), "etcd asks, and is told: {outcome:?}");
    client.list(PREFIX).await.expect("list");
    server.ctl(&["--user", "root:secret", "auth", "disable"]).expect("no authentication");
    let outcome = client.transact(&put("a", "3")).await;
    assert!(matches!(outcome, Outcome::Done(_)), "etcd asks nobody any more: {outcome:?}");
}

#[tokio::test]
async fn a_list_that_etcd_refuses_is_named_in_the_status_until_it_is_allowed() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let server = EtcdServer::start_with(dir.path(), &["--bcrypt-cost", "4"]).expect("etcd");
    for arguments in [
        vec!["role", "add", "some"],
        vec!["role", "grant-permission", "some", "--prefix=true", "readwrite", "/other/"],
        vec!["user", "add", "bot:secret"],
        vec!["user", "grant-role", "bot", "some"],
    ] {
        server.ctl(&arguments).expect("a user with few rights");
    }
    enable_users(&server);
    let mut bench = Bench::with(&as_user(&server, "bot"));
    bench.dcs.watch([PREFIX.to_owned()]);
    let trouble = || bench.hub.status().report.troubles.pop();
    let refused = eventually("trouble", async || trouble()).await;
    assert_eq!(refused, format!("etcd refuses the list of {PREFIX}: etcdserver: permission denied"));
    // Whatever else etcd answers does not make it less.
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    bench.until("lease", granted).await;
    assert_eq!(bench.hub.status().report.troubles, [refused]);

    let root = ["--user", "root:secret", "role", "grant-permission", "some", "--prefix=true", "readwrite"];
    server.ctl(&[&root[..], &[PREFIX]].concat()).expect("more rights");
    assert!(bench.until("list", listed).await.is_empty());
    assert_eq!(bench.hub.status().report.troubles, Vec::<String>::new());
}

#[tokio::test]
async fn an_open_watch_is_compared_with_a_list_now_and_then() {
    let (server, _dir) = one();
    let client = server.client().audited_every(Span::from_millis(200));
    must_put(&client, "a", "1").await;
    let mut watch = client.watch(PREFIX);
    let mut view = View::of([PREFIX.to_owned()]);
    for n in 0..3 {
        let event = tokio::time::timeout(PATIENCE, watch.next()).await.expect("another list").expect("no end");
        assert!(listed(&event).is_some(), "the watch stays as it is: {event:?}");
        assert_eq!(view.apply(&event), n == 0, "a list that shows nothing new changes nothing");
    }
}

/// Whether the etcd of these tests answers renewals without making sure that it leads.
fn is_old_etcd() -> bool {
    let output = Command::new("etcd").arg("--version").output().expect("etcd");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.lines().find_map(|line| line.strip_prefix("etcd Version: ")).expect("a version");
    let figures: Vec<u64> = version.trim().split('.').map(|part| part.parse().expect("a figure")).collect();
    match figures[..] {
        [3, 4, patch] => patch < 31,
        [3, 5, patch] => patch < 13,
        _ => false,
    }
}

/// How many reads `renewals` of a lease under a lock took.
async fn reads_for(renewals: u64, hosts: &str) -> u64 {
    let mut bench = Bench::new(hosts);
    let reads = |bench: &Bench| {
        let text = bench.metrics.text();
        let count = text.lines().find_map(|line| line.strip_prefix("bots_etcd_requests_total{op=\"range\"} "));
        count.map_or(0, |count| count.parse::<u64>().expect("a figure"))
    };
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    let (lease, _) = bench.until("lease", granted).await;
    bench.until("renewal without a lock", renewed).await;
    assert_eq!(reads(&bench), 0, "where no lock hangs on it, the answer is enough");
    bench.dcs.perform(DcsAction::PaceLease { lease, every: Span::from_millis(200) });
    for _ in 0..renewals {
        bench.until("renewal under a lock", renewed).await;
    }
    reads(&bench)
}

#[tokio::test]
async fn under_an_old_etcd_a_lock_is_renewed_by_a_read_besides() {
    let (cluster, _dir) = three();
    let reads = reads_for(5, &cluster.hosts()).await;
    if is_old_etcd() {
        assert!(reads >= 5, "each renewal lies between two reads, and there were {reads}");
    } else {
        assert_eq!(reads, 0, "this etcd makes sure by itself");
    }
}

#[tokio::test]
async fn an_etcd_of_one_member_cannot_have_been_replaced() {
    let (server, _dir) = one();
    assert_eq!(reads_for(5, &server.endpoint()).await, 0);
}
