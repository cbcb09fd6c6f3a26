//! A bot's way to an etcd that shows a certificate, asks for one, and asks for a login: also after etcd was restarted, which
//! forgets every login, and after certificates were renewed.

mod support;

use std::{fs, path::Path};

use bots_core::{
    dcs::{DcsAction, DcsEvent, LeaseId, Outcome, RequestId, Transaction, Write},
    machine::{Span, Time},
    shell::{
        Clock, Etcd, Secret, config,
        dcs::EtcdError,
        testing::{Authority, EtcdServer, enable_users},
    },
};
use support::{Bench, eventually};
use tempfile::TempDir;

const TTL: Span = Span::from_secs(5);
const PREFIX: &str = "/service/";

/// An etcd that is reached by TLS, and what a client of it has to have.
struct Secured {
    server: EtcdServer,
    authority: Authority,
    dir: TempDir,
}

impl Secured {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let authority = Authority::new(dir.path()).expect("openssl");
        let own = authority.issue("etcd").expect("openssl");
        let server = EtcdServer::start_with_tls(dir.path(), &authority, &own).expect("etcd");
        Self { server, authority, dir }
    }

    /// How somebody with a certificate in the name of `client` gets there, without a login.
    fn by_certificate(&self, client: &str) -> config::Etcd {
        let pair = self.authority.issue(client).expect("openssl");
        config::Etcd {
            protocol: Some("https".into()),
            cacert: Some(self.authority.certificate()),
            cert: Some(pair.certificate),
            key: Some(pair.key),
            ..config::Etcd::from_hosts(&self.server.endpoint())
        }
    }

    /// The same with the login that a bot has.
    fn with_login(&self) -> config::Etcd {
        let password = Some(Secret::new("secret"));
        config::Etcd { username: Some("bots".into()), password, ..self.by_certificate("host") }
    }
}

fn put(value: &str) -> Transaction {
    Transaction::new(vec![], vec![Write::put(format!("{PREFIX}key"), value)])
}

fn client(config: &config::Etcd) -> Etcd {
    Etcd::new(config).expect("a good configuration")
}

fn granted(event: &DcsEvent) -> Option<LeaseId> {
    match event {
        DcsEvent::LeaseGranted { lease, .. } => Some(*lease),
        _ => None,
    }
}

/// Until when the lease is valid after this renewal.
fn renewed(event: &DcsEvent) -> Option<Time> {
    match event {
        DcsEvent::LeaseLost { why, .. } => panic!("the lease is lost: {why}"),
        DcsEvent::LeaseRenewed { valid_until, .. } => Some(*valid_until),
        _ => None,
    }
}

/// Whether a list or a change shows this value.
fn shown(event: &DcsEvent, value: &str) -> Option<()> {
    format!("{event:?}").contains(&format!("value: {value:?}")).then_some(())
}

#[tokio::test]
async fn a_login_that_a_restarted_etcd_has_forgotten_is_made_anew() {
    let mut etcd = Secured::start();
    let config = etcd.with_login();
    enable_users(&config, PREFIX).expect("etcdctl");
    let mut bench = Bench::of(&config);
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    let lease = bench.until("lease", granted).await;
    let bound = Transaction::new(vec![], vec![Write::put_leased(format!("{PREFIX}lock"), "mine", lease)]);
    bench.dcs.perform(DcsAction::Transact { id: RequestId(1), transaction: bound });
    bench.dcs.watch([PREFIX.to_owned()]);
    bench.until("the lock", |event| shown(event, "mine")).await;
    for round in ["first", "second"] {
        etcd.server.restart().expect("restart");
        let restarted = Clock::now();
        // The first request of all: the connection is new, or it is not; the login is unknown.
        let outcome = bench.dcs.etcd().transact(&put(round)).await;
        let outcome = match outcome {
            Outcome::Unknown(_connection_was_lost) => bench.dcs.etcd().transact(&put(round)).await,
            known => known,
        };
        assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
        let (mut is_renewed, mut is_seen) = (false, false);
        while !(is_renewed && is_seen) {
            let event = bench.until("a renewal, and the write", |event| Some(event.clone())).await;
            is_renewed |= renewed(&event).is_some_and(|until| until > restarted + TTL);
            is_seen |= shown(&event, round).is_some();
        }
        eventually("end of troubles", async || bench.hub.status().report.troubles.is_empty().then_some(())).await;
    }
    let (again, _) = bench.dcs.etcd().grant(TTL).await.expect("grant");
    assert!(bench.dcs.etcd().revoke(again).await.expect("revoke"));
}

#[tokio::test]
async fn a_changed_password_is_named_and_a_restored_one_logs_in_again() {
    let etcd = Secured::start();
    let config = etcd.with_login();
    enable_users(&config, PREFIX).expect("etcdctl");
    let ours = client(&config);
    ours.list(PREFIX).await.expect("list");
    // Every change makes etcd forget the user's logins.
    let mut root = etcd_client_of(&config).await;
    root.user_change_password("bots", "other").await.expect("change");
    let refused = ours.list(PREFIX).await.expect_err("the password is another");
    assert!(refused.to_string().contains("the login as `bots` fails"), "{refused}");
    root.user_change_password("bots", "secret").await.expect("change");
    ours.list(PREFIX).await.expect("list");
}

/// The library's own client, as root.
async fn etcd_client_of(config: &config::Etcd) -> etcd_client::Client {
    let pems = config.tls().expect("good").expect("by TLS").read().expect("good");
    let (certificate, key) = pems.pair.expect("a pair");
    let tls = etcd_client::TlsOptions::new()
        .ca_certificate(etcd_client::Certificate::from_pem(pems.authorities))
        .identity(etcd_client::Identity::from_pem(certificate, key));
    let options = etcd_client::ConnectOptions::new().with_user("root", "root").with_tls(tls);
    let endpoints = config.endpoints().expect("good");
    Box::pin(etcd_client::Client::connect(endpoints, Some(options))).await.expect("connect")
}

#[tokio::test]
async fn a_login_may_be_configured_before_etcd_has_users() {
    let etcd = Secured::start();
    let config = etcd.with_login();
    let bot = client(&config);
    assert!(matches!(bot.transact(&put("1")).await, Outcome::Done(_)));
    enable_users(&config, PREFIX).expect("etcdctl");
    assert!(matches!(bot.transact(&put("2")).await, Outcome::Done(_)), "the login is made when etcd asks for it");
    let elsewhere = Transaction::new(vec![], vec![Write::put("/elsewhere", "3")]);
    let outcome = bot.transact(&elsewhere).await;
    assert!(matches!(&outcome, Outcome::Unknown(why) if why.contains("permission denied")), "{outcome:?}");
}

#[tokio::test]
async fn a_name_in_a_certificate_is_a_login() {
    let etcd = Secured::start();
    enable_users(&etcd.with_login(), PREFIX).expect("etcdctl");
    assert!(matches!(client(&etcd.by_certificate("bots")).transact(&put("1")).await, Outcome::Done(_)));
    let stranger = client(&etcd.by_certificate("host")).list(PREFIX).await.expect_err("etcd has no such user");
    assert!(matches!(&stranger, EtcdError::Refused(why) if why.contains("permission denied")), "{stranger}");
}

#[tokio::test]
async fn who_is_not_let_in_is_told_why() {
    let etcd = Secured::start();
    let config = etcd.with_login();
    enable_users(&config, PREFIX).expect("etcdctl");
    let check = async |config: config::Etcd, wanted: &[&str]| {
        let said = client(&config).list(PREFIX).await.expect_err("not let in").to_string();
        assert!(wanted.iter().all(|part| said.contains(part)) && !said.contains("secret"), "{wanted:?}: {said}");
    };
    let wrong = config::Etcd { password: Some(Secret::new("guessed-secret")), ..config.clone() };
    check(wrong.clone(), &["etcd refuses: ", "the login as `bots` fails: authentication failed", "etcd3.password"])
        .await;
    let other = tempfile::tempdir().expect("a temporary directory");
    let other = Authority::new(other.path()).expect("openssl");
    check(config::Etcd { cacert: Some(other.certificate()), ..config.clone() }, &["invalid peer certificate"]).await;
    check(config::Etcd { cert: None, key: None, ..config.clone() }, &["no etcd member answers"]).await;
    let plain = config::Etcd { username: None, password: None, ..config::Etcd::from_hosts(&etcd.server.endpoint()) };
    check(plain, &["no etcd member answers"]).await;

    let bench = Bench::of(&wrong);
    bench.dcs.perform(DcsAction::GrantLease { ttl: TTL });
    let trouble = eventually("trouble", async || bench.hub.status().report.troubles.pop()).await;
    assert!(trouble.contains("refuses: the login as `bots` fails"), "{trouble}");
}

#[tokio::test]
async fn renewed_certificates_are_used_by_the_next_connection() {
    let mut etcd = Secured::start();
    let config = etcd.by_certificate("host");
    let bot = client(&config);
    assert!(matches!(bot.transact(&put("1")).await, Outcome::Done(_)));

    // All of it is new: the old certificates are worth nothing any more, on either side.
    let dir = etcd.dir.path();
    etcd.authority = Authority::new(dir).expect("openssl");
    for name in ["etcd", "host"] {
        etcd.authority.issue(name).expect("openssl");
    }
    etcd.server.restart().expect("restart");
    must_put(&bot, "2").await;

    // While the files are half written, what they held before goes on, also for a new connection.
    let certificate = config.cert.as_deref().expect("given");
    let whole = fs::read(certificate).expect("read");
    fs::write(certificate, &whole[..whole.len() / 2]).expect("write");
    etcd.server.kill().expect("kill -9");
    assert!(matches!(bot.transact(&put("lost")).await, Outcome::Unknown(_)), "nobody is there");
    etcd.server.restart().expect("restart");
    must_put(&bot, "3").await;
    assert!(Etcd::new(&config).err().is_some_and(|e| e.to_string().contains(&named("etcd3.cert", certificate))));
}

fn named(field: &str, path: &Path) -> String {
    format!("{field}: {}", path.display())
}

async fn must_put(client: &Etcd, value: &str) {
    eventually("write", async || matches!(client.transact(&put(value)).await, Outcome::Done(_)).then_some(())).await;
}
