//! The whole bot as a process: what it does to its server when it dies, and how it refuses to run.

mod shell_support;

use std::{
    fs::{self, File},
    net::TcpListener,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use axum::http::{Method, header::CONTENT_TYPE};
use bots_core::shell::{
    http,
    testing::{EtcdServer, free_port},
};
use postgres_bot::{
    machine::{Job, StopMode},
    shell::processes,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use shell_support::{Member, as_server_user, bot_program, document, scratch};

/// Patroni's figures, which dashboards and alerts go by. Those of its main branch that no release has are not among them.
const PATRONIS_FIGURES: [&str; 23] = [
    "version",
    "postgres_running",
    "postmaster_start_time",
    "primary",
    "xlog_location",
    "standby_leader",
    "replica",
    "sync_standby",
    "quorum_standby",
    "xlog_received_location",
    "xlog_replayed_location",
    "xlog_replayed_timestamp",
    "xlog_paused",
    "postgres_streaming",
    "postgres_in_archive_recovery",
    "postgres_server_version",
    "cluster_unlocked",
    "failsafe_mode_is_active",
    "postgres_timeline",
    "dcs_last_seen",
    "pending_restart",
    "is_paused",
    "postgres_state",
];

/// What we count beside those.
const OUR_FIGURES: [&str; 8] = [
    "promotions",
    "promotion_seconds",
    "restarts_in_place",
    "restart_in_place_seconds",
    "fences",
    "guard_fences",
    "fence_margin_seconds",
    "fence_margin_seconds_min",
];

/// A bot that runs.
struct Bot {
    child: Child,
    api: String,
}

impl Bot {
    fn start(dir: &Path, name: &str, document: &Value) -> Self {
        let file = dir.join(format!("{name}.yml"));
        fs::write(&file, document.to_string()).expect("write the configuration");
        let log = File::options().create(true).append(true).open(dir.join(format!("{name}.log"))).expect("log");
        let child = Command::new(bot_program())
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("start the bot");
        let listen = document["restapi"]["listen"].as_str().expect("an address");
        Self { child, api: format!("http://{listen}") }
    }

    /// Waits until `path` answers with `code`.
    async fn answers(&self, path: &str, code: u16) {
        let url = format!("{}{path}", self.api);
        let wait = async {
            while http::get(&url, Duration::from_secs(2)).await.map_or(0, |(found, _)| found) != code {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        assert!(tokio::time::timeout(Duration::from_secs(60), wait).await.is_ok(), "{url} does not come to {code}");
    }

    /// What `/metrics` says.
    async fn figures(&self) -> String {
        let url = format!("{}/metrics", self.api);
        let (_, body) = http::get(&url, Duration::from_secs(2)).await.expect("an answer");
        String::from_utf8(body.to_vec()).expect("text")
    }

    /// What one line of `/metrics` says: nothing has labels but Patroni's figures.
    async fn figure(&self, name: &str) -> f64 {
        let text = self.figures().await;
        let rest = text.lines().find_map(|line| line.strip_prefix(name).filter(|rest| rest.starts_with([' ', '{'])));
        let value = rest.and_then(|rest| rest.rsplit(' ').next()).unwrap_or_else(|| panic!("no {name} in\n{text}"));
        value.parse().expect("a number")
    }

    /// Waits until one line of `/metrics` says so.
    async fn comes_to(&self, name: &str, wanted: f64) {
        let wait = async {
            while (self.figure(name).await - wanted).abs() > f64::EPSILON {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        assert!(tokio::time::timeout(Duration::from_secs(30), wait).await.is_ok(), "{name} does not come to {wanted}");
    }

    /// Sends JSON, as whoever has the right.
    async fn sends(&self, method: Method, path: &str, body: &Value) -> http::Response {
        let headers = [(CONTENT_TYPE, "application/json".parse().expect("a header"))].into_iter().collect();
        let url = format!("{}{path}", self.api);
        let body = body.to_string().into();
        http::request(method, &url, headers, body, Duration::from_secs(60), 10_000).await.expect("an answer")
    }

    async fn shows(&self, path: &str) -> Value {
        let (_, body) = http::get(&format!("{}{path}", self.api), Duration::from_secs(2)).await.expect("an answer");
        serde_json::from_slice(&body).expect("JSON")
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed()).expect("a pid");
        kill_process(pid, signal).expect("signal the bot");
    }
}

impl Drop for Bot {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

fn member(dir: &Path, name: &str, etcd: &str) -> Value {
    let port = free_port().expect("a port");
    fs::create_dir_all(dir.join(name)).expect("a folder");
    let mut document = document(dir, name, port);
    document["etcd3"] = json!({"hosts": etcd});
    document["restapi"] = json!({"listen": format!("127.0.0.1:{}", free_port().expect("a port"))});
    document["bootstrap"]["dcs"] = json!({"ttl": 3});
    document
}

async fn nothing_runs_on(data_dir: &Path, within: Duration) {
    let wait = async {
        while !processes::of_server(&[data_dir]).expect("/proc is read").is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(within, wait).await.is_ok(), "the server outlives its bot");
}

#[test]
fn a_bot_makes_a_cluster_and_a_server_does_not_outlive_the_lease_of_its_bot() {
    as_server_user("a_bot_makes_a_cluster_and_a_server_does_not_outlive_the_lease_of_its_bot", || async {
        let dir = scratch();
        let etcd = EtcdServer::start(&dir.path().join("etcd")).expect("etcd");
        let document = member(dir.path(), "a", &etcd.endpoint());
        let data_dir = dir.path().join("a/data");
        let mut bot = Bot::start(dir.path(), "a", &document);
        bot.answers("/primary", 200).await;
        let shown = bot.shows("/patroni").await;
        assert_eq!((shown["state"].as_str(), shown["role"].as_str()), (Some("running"), Some("primary")));
        assert_eq!(bot.shows("/cluster").await["members"][0]["role"], "leader");
        bot.answers("/replica", 503).await;
        let figures = bot.figures().await;
        let names = PATRONIS_FIGURES.iter().map(|name| format!("patroni_{name}"));
        for name in names.chain(OUR_FIGURES.iter().map(|name| format!("bots_postgres_{name}"))) {
            let lines = figures.lines().filter(|line| line.starts_with(&format!("# TYPE {name} "))).count();
            assert_eq!(lines, 1, "{name} in\n{figures}");
        }
        let ours = figures.lines().filter(|line| line.starts_with("# TYPE bots_postgres_")).count();
        assert_eq!(ours, OUR_FIGURES.len(), "one that is not in the list:\n{figures}");

        bot.signal(Signal::KILL);
        bot.child.wait().expect("the end of the bot");
        // Its guard stops it within the lease.
        nothing_runs_on(&data_dir, Duration::from_secs(5)).await;

        let mut bot = Bot::start(dir.path(), "a", &document);
        bot.answers("/primary", 200).await;
        assert_eq!(bot.shows("/patroni").await["timeline"], 1, "back in place, not promoted");
        assert!(bot.figures().await.contains("bots_postgres_guard_fences_total 0\n"));
        bot.signal(Signal::STOP);
        nothing_runs_on(&data_dir, Duration::from_secs(5)).await;
        bot.signal(Signal::CONT);
        // It has stood still for longer than a lease, and its loop turns when it is asked to.
        bot.answers("/liveness", 200).await;
        bot.answers("/primary", 200).await;
        assert!(bot.figures().await.contains("bots_postgres_guard_fences_total 1\n"), "stopped by its guard");
        bot.signal(Signal::TERM);
        assert!(bot.child.wait().expect("the end of the bot").success());
        assert!(processes::of_server(&[&data_dir]).expect("/proc is read").is_empty());
        let left = etcd.client().get("/service/main/leader").await.expect("etcd");
        assert_eq!(left, None, "a bot that goes gives the lock back");
    });
}

#[test]
fn three_bots_hand_over_on_request_and_on_the_loss_of_a_node() {
    as_server_user("three_bots_hand_over_on_request_and_on_the_loss_of_a_node", || async {
        let dir = scratch();
        let etcd = EtcdServer::start(&dir.path().join("etcd")).expect("etcd");
        let documents: Vec<Value> = ["a", "b", "c"].map(|name| member(dir.path(), name, &etcd.endpoint())).into();
        let start = |n: usize| Bot::start(dir.path(), ["a", "b", "c"][n], &documents[n]);
        let a = start(0);
        a.answers("/primary", 200).await;
        let (b, mut c) = (start(1), start(2));
        for replica in [&b, &c] {
            replica.answers("/replica?replication_state=streaming", 200).await;
        }
        let ask = async |body: Value| a.sends(Method::POST, "/switchover", &body).await;
        assert_eq!(ask(json!({"leader": "b"})).await.status, 412);
        assert_eq!(ask(json!({"leader": "a", "candidate": "x"})).await.status, 412);
        let answer = ask(json!({"leader": "a", "candidate": "c"})).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        c.answers("/primary", 200).await;
        a.answers("/replica?replication_state=streaming", 200).await;
        b.answers("/replica?replication_state=streaming", 200).await;
        for (bot, promotions) in [(&a, 0.0), (&b, 0.0), (&c, 1.0)] {
            for figure in ["promotions_total", "promotion_seconds_count"] {
                bot.comes_to(&format!("bots_postgres_{figure}"), promotions).await;
            }
        }

        c.signal(Signal::KILL);
        c.child.wait().expect("the end of the bot");
        let lost = async {
            loop {
                for survivor in [&a, &b] {
                    let shown = survivor.shows("/patroni").await;
                    if shown["timeline"] == 3 && shown["role"] == "primary" {
                        return survivor;
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let leads = tokio::time::timeout(Duration::from_secs(30), lost).await.expect("another member leads");
        leads.answers("/primary", 200).await;
        a_failover_moves_the_figures(leads, if std::ptr::eq(leads, &a) { &b } else { &a }).await;
        let c = start(2);
        c.answers("/replica?replication_state=streaming", 200).await;
        assert_eq!(c.shows("/patroni").await["timeline"], 3);
        let history = a.shows("/history").await;
        assert_eq!(history.as_array().map(Vec::len), Some(2), "{history}");
    });
}

/// A lease of 3 s ends, and its leader is replaced by one that was never promoted before.
async fn a_failover_moves_the_figures(leads: &Bot, follows: &Bot) {
    for (bot, promotions) in [(leads, 1.0), (follows, 0.0)] {
        for figure in ["promotions_total", "promotion_seconds_count"] {
            bot.comes_to(&format!("bots_postgres_{figure}"), promotions).await;
        }
    }
    let outage = leads.figure("bots_postgres_promotion_seconds_sum").await;
    assert!(outage > 0.0 && outage < 30.0, "{outage} s without a primary");
    let margins = async {
        while leads.figure("bots_postgres_fence_margin_seconds_count").await < 2.0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), margins).await.expect("each renewal of a leader is a margin");
    let least = leads.figure("bots_postgres_fence_margin_seconds_min").await;
    assert!(least > 0.0 && least < 3.0, "{least} s of a lease of 3 s");
}

/// Two bots, the second of which follows the first and never leads.
async fn leader_and_follower(dir: &Path, documents: &mut [Value; 2]) -> [Bot; 2] {
    documents[1]["tags"] = json!({"nofailover": true});
    let leader = Bot::start(dir, "a", &documents[0]);
    leader.answers("/primary", 200).await;
    let follower = Bot::start(dir, "b", &documents[1]);
    follower.answers("/replica?replication_state=streaming", 200).await;
    [leader, follower]
}

#[test]
fn failsafe_is_answered_as_patroni_answers_it_on_and_off() {
    as_server_user("failsafe_is_answered_as_patroni_answers_it_on_and_off", || async {
        let dir = scratch();
        let etcd = EtcdServer::start(&dir.path().join("etcd")).expect("etcd");
        let mut documents = ["a", "b"].map(|name| member(dir.path(), name, &etcd.endpoint()));
        let [a, b] = leader_and_follower(dir.path(), &mut documents).await;
        let leader = etcd.client().get("/service/main/leader").await.expect("etcd").expect("somebody leads");
        let to = |member: &str| json!({"name": "a", "to": member, "generation": leader.created});
        for bot in [&a, &b] {
            bot.answers("/failsafe", 502).await;
            // Neither is anybody bound by it, nor is it looked at.
            for body in [to("a"), to("b"), json!({"name": "a", "api_url": "x"})] {
                assert_eq!(bot.sends(Method::POST, "/failsafe", &body).await.status, 502);
            }
        }

        assert_eq!(a.sends(Method::PATCH, "/config", &json!({"failsafe_mode": true})).await.status, 200);
        for bot in [&a, &b] {
            bot.answers("/failsafe", 200).await;
        }
        let named = async {
            while b.shows("/failsafe").await.as_object().is_none_or(|roll| roll.len() < 2) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), named).await.expect("both are on the roll");
        let leads = a.sends(Method::POST, "/failsafe", &to("a")).await;
        assert_eq!((leads.status, leads.body.trim_ascii()), (500, &b"Running as a leader"[..]));
        // Who was started just now may have said otherwise before.
        let vouches = async {
            loop {
                let answer = b.sends(Method::POST, "/failsafe", &to("b")).await;
                if answer.status != 409 {
                    return answer;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let vouches = tokio::time::timeout(Duration::from_secs(10), vouches).await.expect("it knows what it has said");
        assert_eq!((vouches.status, vouches.body.trim_ascii()), (200, &b"Accepted"[..]));
        let lsn = vouches.headers.get("lsn").and_then(|lsn| lsn.to_str().ok()?.parse::<u64>().ok());
        assert!(lsn.is_some_and(|lsn| lsn > 0), "{vouches:?}");
        assert_eq!(b.sends(Method::POST, "/failsafe", &to("c")).await.status, 421);
        assert_eq!(b.sends(Method::POST, "/failsafe", &json!({"name": "a", "to": "b"})).await.status, 400);

        assert_eq!(a.sends(Method::PATCH, "/config", &json!({"failsafe_mode": false})).await.status, 200);
        for bot in [&a, &b] {
            bot.answers("/failsafe", 502).await;
            assert_eq!(bot.sends(Method::POST, "/failsafe", &to("b")).await.status, 502);
        }
    });
}

#[test]
fn a_follower_is_ready_by_its_lag_and_tells_when_only_an_archive_is_left_to_it() {
    as_server_user("a_follower_is_ready_by_its_lag_and_tells_when_only_an_archive_is_left_to_it", || async {
        let dir = scratch();
        let etcd = EtcdServer::start(&dir.path().join("etcd")).expect("etcd");
        let mut documents = ["a", "b"].map(|name| member(dir.path(), name, &etcd.endpoint()));
        documents[0]["watchdog"] = json!({"mode": "automatic", "device": "/nowhere/watchdog", "safety_margin": 0});
        // An archive that has nothing.
        documents[1]["postgresql"]["parameters"] = json!({"restore_command": "false"});
        let [mut a, b] = leader_and_follower(dir.path(), &mut documents).await;
        let log = fs::read_to_string(dir.path().join("a.log")).expect("its log");
        let told =
            log.lines().filter(|line| line.contains("watchdog.safety_margin is 0 and has no effect: at a ttl of 3 s"));
        assert_eq!(told.count(), 1, "{log}");

        let ready = async |bot: &Bot, table: &[(&str, u16)]| {
            for (query, code) in table {
                bot.answers(&format!("/readiness{query}"), *code).await;
            }
        };
        let all: Vec<(&str, u16)> =
            ["", "?lag=0", "?lag=16MB", "?mode=apply", "?lag=0&mode=write"].map(|query| (query, 200)).into();
        ready(&a, &all).await;
        ready(&b, &all).await;
        ready(&b, &[("?lag=much", 400), ("?lag=-1", 400)]).await;
        // What it has received goes on, and what it has replayed does not.
        sql(&documents[1], "SELECT pg_wal_replay_pause()").await;
        sql(&documents[0], "CREATE TABLE much AS SELECT generate_series(1, 100000) AS x").await;
        let behind =
            [("", 503), ("?lag=0", 503), ("?lag=100kB", 503), ("?mode=apply", 503), ("?lag=1MB&mode=apply", 503)];
        ready(&b, &behind).await;
        ready(&b, &[("?lag=1GB", 200), ("?mode=write", 200), ("?lag=0&mode=write", 200), ("?lag=1GB&mode=apply", 200)])
            .await;
        ready(&a, &all).await;
        sql(&documents[1], "SELECT pg_wal_replay_resume()").await;
        ready(&b, &all).await;

        let replicates = ["patroni_postgres_streaming", "patroni_postgres_in_archive_recovery"];
        for (figure, value) in replicates.into_iter().zip([1.0, 0.0]) {
            b.comes_to(figure, value).await;
            a.comes_to(figure, 0.0).await;
        }
        a.signal(Signal::TERM);
        assert!(a.child.wait().expect("the end of the bot").success());
        for (figure, value) in replicates.into_iter().zip([0.0, 1.0]) {
            b.comes_to(figure, value).await;
        }
        assert_eq!(b.shows("/patroni").await["replication_state"], "in archive recovery");
        b.answers("/replica?replication_state=streaming", 503).await;
        b.answers("/liveness", 200).await;
    });
}

/// Has the server of a bot carry out a statement.
async fn sql(document: &Value, statement: &str) {
    let (host, port) = document["postgresql"]["listen"].as_str().and_then(|at| at.split_once(':')).expect("an address");
    let mut config = tokio_postgres::Config::new();
    config.host(host).port(port.parse().expect("a port")).user("postgres").password("su'per\\").dbname("postgres");
    let (client, connection) = config.connect(tokio_postgres::NoTls).await.expect("connect");
    tokio::spawn(connection);
    client.batch_execute(statement).await.expect("carried out");
}

fn refuses(dir: &Path, document: &Value) -> (i32, String) {
    let file = dir.join("refused.yml");
    fs::write(&file, document.to_string()).expect("write the configuration");
    let Output { status, stderr, .. } = Command::new(bot_program()).arg(&file).output().expect("run the bot");
    let said = String::from_utf8(stderr).expect("text");
    let last = said.lines().last().unwrap_or_default().to_owned();
    (status.code().expect("an exit code"), last)
}

#[test]
fn what_cannot_work_is_refused_with_one_line_and_a_code() {
    as_server_user("what_cannot_work_is_refused_with_one_line_and_a_code", || async {
        let dir = scratch();
        let etcd = EtcdServer::start(&dir.path().join("etcd")).expect("etcd");
        let good = member(dir.path(), "a", &etcd.endpoint());
        let with = |pointer: &str, value: Value| {
            let mut document = good.clone();
            let (parent, field) = pointer.rsplit_once('/').expect("a pointer");
            document.pointer_mut(parent).expect("the parent")[field] = value;
            document
        };
        let check = |document: &Value, code: i32, words: &[&str]| {
            let (found, said) = refuses(dir.path(), document);
            assert_eq!(found, code, "{said}");
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
        };
        check(&with("/postgresql/bin_dir", json!("/nowhere")), 4, &["postgresql.bin_dir", "/nowhere"]);
        check(&with("/postgresql/listen", json!("x")), 2, &["postgresql.listen"]);
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = taken.local_addr().expect("its address").to_string();
        check(&with("/postgresql/listen", json!(address)), 4, &["postgresql.listen", &address, "in use"]);
        // Somebody's files are not a data directory; nothing happens to them.
        let thesis = dir.path().join("a/data/thesis.txt");
        fs::create_dir_all(thesis.parent().expect("a folder")).expect("folder");
        fs::write(&thesis, "years of work").expect("write");
        check(&good, 3, &["postgresql.data_dir", "nothing was touched"]);
        assert_eq!(fs::read_to_string(&thesis).expect("still there"), "years of work");
    });
}

#[test]
fn a_data_directory_of_another_cluster_is_refused_and_left_alone() {
    as_server_user("a_data_directory_of_another_cluster_is_refused_and_left_alone", || async {
        let dir = scratch();
        let etcd = EtcdServer::start(&dir.path().join("etcd")).expect("etcd");
        let document = member(dir.path(), "a", &etcd.endpoint());
        let mut bot = Bot::start(dir.path(), "a", &document);
        bot.answers("/primary", 200).await;
        bot.signal(Signal::TERM);
        bot.child.wait().expect("the end of the bot");
        let put = bots_core::dcs::Write::put("/service/main/initialize", "1234567890123456789");
        etcd.client().transact(&bots_core::dcs::Transaction::new(vec![], vec![put])).await;
        let (code, said) = refuses(dir.path(), &document);
        assert_eq!(code, 3, "{said}");
        assert!(said.contains("postgresql.data_dir") && said.contains("1234567890123456789"), "{said}");
        assert!(dir.path().join("a/data/PG_VERSION").exists());
    });
}

#[test]
fn a_server_of_another_cluster_or_another_bot_goes_on_undisturbed() {
    as_server_user("a_server_of_another_cluster_or_another_bot_goes_on_undisturbed", || async {
        let dir = scratch();
        let etcd = EtcdServer::start(&dir.path().join("etcd")).expect("etcd");
        let other = Member::new(dir.path(), "a");
        other.bootstraps().await;
        let put = bots_core::dcs::Write::put("/service/main/initialize", "1234567890123456789");
        etcd.client().transact(&bots_core::dcs::Transaction::new(vec![], vec![put])).await;
        let (code, said) = refuses(dir.path(), &member(dir.path(), "a", &etcd.endpoint()));
        assert_eq!(code, 3, "{said}");
        assert_eq!(other.asks("SELECT pg_is_in_recovery()").await, "false", "it still serves");

        let document = member(dir.path(), "b", &etcd.endpoint());
        let bot = Bot::start(dir.path(), "b", &document);
        bot.answers("/status", 200).await;
        let mut twin = member(dir.path(), "c", &etcd.endpoint());
        twin["postgresql"]["data_dir"] = document["postgresql"]["data_dir"].clone();
        let (code, said) = refuses(dir.path(), &twin);
        assert_eq!(code, 3, "{said}");
        assert!(said.contains("another bot works on"), "{said}");
        other.does(Job::Stop { mode: StopMode::Fast }).await;
    });
}

#[test]
fn root_is_refused() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let dir = scratch();
    let (code, said) = refuses(dir.path(), &member(dir.path(), "a", "127.0.0.1:1"));
    assert_eq!(code, 4, "{said}");
    assert!(said.contains("root") && said.contains("setpriv"), "{said}");
}
