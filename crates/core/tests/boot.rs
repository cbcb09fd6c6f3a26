//! A whole bot as a process: how it starts, what it says when it cannot, how it shares its state, how it ends.
//! The bot is `examples/lamp.rs`.

#[path = "../examples/lamp.rs"]
#[allow(dead_code, unreachable_pub, reason = "it is a program of its own")]
mod lamp;
mod support;

use std::{
    io::{BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use bots_core::{
    dcs::Scope,
    shell::{
        Status, http, probe_instance,
        process::send_signal,
        replay,
        status::Identity,
        testing::{EtcdServer, free_port},
    },
};
use bytes::Bytes;
use hyper::{HeaderMap, Method};
use rustix::process::Signal;
use support::eventually;

const SECOND: Duration = Duration::from_secs(1);

/// A lamp of the scope `lamps`, killed when dropped.
struct Lamp {
    child: Child,
    api: String,
}

impl Drop for Lamp {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn program() -> PathBuf {
    let tests = std::env::current_exe().expect("our own path");
    let profile = tests.parent().and_then(Path::parent).expect("target/<profile>/deps/<test>");
    profile.join("examples/lamp")
}

fn command(variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(program());
    command
        .env_clear()
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn start(etcd: &str, name: &str, more: &[(&str, &str)]) -> Lamp {
    let api = format!("127.0.0.1:{}", free_port().expect("a port"));
    let mut variables =
        vec![("BOT_SCOPE", "lamps"), ("BOT_NAME", name), ("BOT_ETCD3_HOSTS", etcd), ("BOT_RESTAPI_LISTEN", &api)];
    variables.extend(more);
    let child = command(&variables).stdout(Stdio::null()).spawn().expect("build the examples first");
    Lamp { child, api: format!("http://{api}") }
}

impl Lamp {
    async fn status(&self) -> Option<Status> {
        let (code, body) = http::get(&format!("{}/status", self.api), SECOND).await.ok()?;
        serde_json::from_slice(&body).ok().filter(|_| code == 200)
    }

    async fn is(&self, role: &str) {
        eventually(role, async || self.status().await.filter(|s| s.report.role == role)).await;
    }

    async fn code(&self, path: &str) -> u16 {
        http::get(&format!("{}{path}", self.api), SECOND).await.expect("an answer").0
    }

    fn signal(&self, signal: Signal) {
        send_signal(self.child.id(), signal).expect("signal");
    }

    /// The exit code and all of standard error.
    async fn ended(mut self) -> (i32, String) {
        let status = eventually("end", async || self.child.try_wait().expect("wait")).await;
        let mut text = String::new();
        self.child.stderr.take().expect("piped").read_to_string(&mut text).expect("text");
        (status.code().unwrap_or(-1), text)
    }
}

/// The exit code and the last line of standard error.
fn fails(output: &Output) -> (i32, String) {
    let text = String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap_or(-1), text.lines().last().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn one_lamp_is_lit_and_another_lights_up_when_it_goes() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let etcd = EtcdServer::start(dir.path()).expect("etcd");
    let log = dir.path().join("steps");
    let log = log.to_str().expect("UTF-8");
    let first = start(&etcd.endpoint(), "a", &[("BOT_LOG_STEP_LOG", log)]);
    first.is("lit").await;
    let second = start(&etcd.endpoint(), "b", &[]);
    second.is("dark").await;
    let codes = [first.code("/health").await, second.code("/health").await, second.code("/readiness").await];
    assert_eq!(codes, [200, 503, 200]);
    let (_, metrics) = http::get(&format!("{}/metrics", second.api), SECOND).await.expect("metrics");
    let metrics = String::from_utf8_lossy(&metrics);
    assert!(metrics.contains("bots_steps_total") && metrics.contains("op=\"range\"} 1\n"), "{metrics}");
    let status = first.status().await.expect("status");
    let there = format!("{}/any/path", first.api);
    let ours = status.identity.clone();
    assert_eq!(probe_instance(&there, &ours).await, Some(ours.instance.clone()));
    // Whoever has been given the address since is not the bot that is asked for.
    for other in [
        Identity { name: "b".into(), ..ours.clone() },
        Identity { scope: "others".into(), ..ours.clone() },
        Identity { namespace: "others".into(), ..ours.clone() },
    ] {
        assert_eq!(probe_instance(&there, &other).await, None, "{other:?}");
    }

    first.signal(Signal::TERM);
    let (code, text) = first.ended().await;
    assert_eq!(code, 0, "{text}");
    // The lease was given back, so nobody waits for it to run out.
    let left: Vec<_> = etcd.client().list("/service/lamps/").await.expect("list").1;
    assert!(left.iter().all(|kv| !kv.key.ends_with("members/a")), "{left:?}");
    second.is("lit").await;

    let scope = Scope::new("service", "lamps").expect("valid");
    let initial = lamp::State::new(&scope, "a", &status.identity.instance, &status_api(&status));
    let recorded = std::fs::File::open(log).expect("the step log");
    let replayed =
        replay::<lamp::Lamp>(initial, BufReader::new(recorded)).expect("the machine goes the same way again");
    assert!(replayed.steps > 5, "{}", replayed.steps);
}

fn status_api(status: &Status) -> String {
    status.state["api_url"].as_str().expect("text").to_owned()
}

#[tokio::test]
async fn a_name_that_is_alive_is_refused_and_one_that_is_dead_is_taken_over() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let etcd = EtcdServer::start(dir.path()).expect("etcd");
    let first = start(&etcd.endpoint(), "a", &[]);
    first.is("lit").await;
    let (code, text) = start(&etcd.endpoint(), "a", &[]).ended().await;
    assert_eq!(code, 3, "{text}");
    assert!(text.lines().last().unwrap_or_default().contains("choose another `name`"), "{text}");
    first.signal(Signal::KILL);
    let _killed = first.ended().await;
    start(&etcd.endpoint(), "a", &[]).is("lit").await;
}

#[tokio::test]
async fn a_frozen_lamp_goes_dark_before_another_lights_up() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let etcd = EtcdServer::start(dir.path()).expect("etcd");
    let first = start(&etcd.endpoint(), "a", &[]);
    first.is("lit").await;
    let second = start(&etcd.endpoint(), "b", &[]);
    second.is("dark").await;
    first.signal(Signal::STOP);
    second.is("lit").await;
    first.signal(Signal::CONT);
    first.is("dark").await;
    second.is("lit").await;
}

#[tokio::test]
async fn a_second_signal_does_not_wait_for_the_goodbye() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let etcd = EtcdServer::start(dir.path()).expect("etcd");
    let lamp = start(&etcd.endpoint(), "a", &[]);
    lamp.is("lit").await;
    etcd.freeze().expect("SIGSTOP");
    // The lease cannot be given back to an etcd that is frozen, so the goodbye takes its time.
    lamp.signal(Signal::TERM);
    tokio::time::sleep(Duration::from_millis(200)).await;
    lamp.signal(Signal::INT);
    let (code, text) = lamp.ended().await;
    etcd.thaw().expect("SIGCONT");
    assert!(code == 1 && text.contains("a second signal"), "{code} {text}");
}

#[tokio::test]
async fn changes_are_streamed() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let etcd = EtcdServer::start(dir.path()).expect("etcd");
    let lamp = start(&etcd.endpoint(), "a", &[]);
    lamp.is("lit").await;
    let url = format!("{}/events", lamp.api);
    let streamed = tokio::spawn(async move {
        http::request(Method::GET, &url, HeaderMap::new(), Bytes::new(), support::PATIENCE, http::BODY_BYTES_MAX).await
    });
    // Renewals are steps, so the stream moves without our doing; the end of the lamp ends it.
    tokio::time::sleep(SECOND).await;
    lamp.signal(Signal::TERM);
    let (code, text) = lamp.ended().await;
    assert_eq!(code, 0, "{text}");
    let answer = streamed.await.expect("no panic").expect("an answer that ends");
    let body = String::from_utf8_lossy(&answer.body);
    assert!(body.starts_with("event: state\ndata: {") && body.contains("\"role\":\"lit\""), "{body}");
}

#[test]
fn the_configuration_is_refused_in_one_line() {
    let good = [("BOT_SCOPE", "lamps"), ("BOT_NAME", "a"), ("BOT_ETCD3_HOSTS", "127.0.0.1:1")];
    let with = |name: &'static str, value: &'static str| {
        let mut variables = good.to_vec();
        variables.retain(|(n, _)| *n != name);
        variables.push((name, value));
        fails(&command(&variables).arg("--check").output().expect("run"))
    };
    for (name, value, wanted) in [
        ("BOT_SCOPE", "a/b", "scope `a/b` has the character `/`"),
        ("BOT_NAME", "", "name is empty"),
        ("BOT_ETCD3_HOSTS", "", "etcd3.hosts is empty"),
        ("BOT_ETCD3_HOSTS", "a:b:c", "etcd3.hosts: `a:b:c` is not host:port"),
        ("BOT_ETCD3_USERNAME", "root", "etcd3.password is missing"),
        ("BOT_RESTAPI_LISTEN", "0.0.0.0:8008", "restapi.connect_address: nobody can connect to 0.0.0.0:8008"),
        ("BOT_RESTAPI_LISTEN", "[::]:8008", "restapi.connect_address: nobody can connect to [::]:8008"),
        ("BOT_RESTAPI_CONNECT_ADDRESS", "0.0.0.0:8008", "restapi.connect_address: nobody can connect to 0.0.0.0:8008"),
        ("BOT_RESTAPI_LISTEN", "here", "field restapi.listen: `here` is not an IP address with a port"),
        ("BOT_LOG_LEVEL", "loud", "field log.level: `loud` is not one of"),
        ("BOT_RESTAPI_AUTHENTICATION_USERNAME", "a", "restapi.authentication.password is missing"),
    ] {
        let (code, line) = with(name, value);
        assert!(code == 2 && line.contains(wanted), "{name}={value}: {code} {line}");
    }
    let (code, line) = fails(&command(&good[1..]).output().expect("run"));
    assert!(code == 2 && line.contains("missing field `scope`") && line.contains("BOT_SCOPE"), "{line}");
    let (code, line) = fails(&command(&good).arg("/nowhere.yml").output().expect("run"));
    assert!(code == 2 && line.contains("cannot read the configuration /nowhere.yml"), "{line}");
    let (code, line) = fails(&command(&good).arg("--nonsense").output().expect("run"));
    assert!(code == 2 && line.contains("unknown option --nonsense"), "{line}");
    assert!(command(&good).arg("--check").status().expect("run").success());
    let version = command(&[]).arg("--version").output().expect("run");
    assert_eq!(String::from_utf8_lossy(&version.stdout), "lamp 1\n");
}

#[test]
fn a_port_in_use_is_exit_code_4() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let listen = taken.local_addr().expect("address").to_string();
    let variables = [
        ("BOT_SCOPE", "lamps"),
        ("BOT_NAME", "a"),
        ("BOT_ETCD3_HOSTS", "127.0.0.1:1"),
        ("BOT_RESTAPI_LISTEN", listen.as_str()),
    ];
    let (code, line) = fails(&command(&variables).output().expect("run"));
    assert!(code == 4 && line.contains("restapi.listen") && line.contains("is in use"), "{code} {line}");
}

#[tokio::test]
async fn etcd_that_is_not_there_is_visible_and_a_bot_still_ends_when_asked() {
    let port = free_port().expect("a port");
    let lamp = start(&format!("127.0.0.1:{port}"), "a", &[]);
    let troubles = eventually("trouble", async || {
        lamp.status().await.map(|s| s.report.troubles).filter(|t| t.iter().any(|line| line.contains("does not answer")))
    })
    .await;
    assert!(troubles.iter().any(|line| line.contains(&port.to_string())), "{troubles:?}");
    assert_eq!(lamp.code("/liveness").await, 200);
    lamp.signal(Signal::INT);
    let (code, text) = lamp.ended().await;
    assert_eq!(code, 0, "{text}");
}

#[tokio::test]
async fn a_bot_whose_etcd_was_replaced_by_a_backup_ends_so_that_it_is_started_anew() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut etcd = EtcdServer::start(dir.path()).expect("etcd");
    let snapshot = dir.path().join("snapshot");
    etcd.ctl(&["snapshot", "save", snapshot.to_str().expect("UTF-8")]).expect("a snapshot");
    let lamp = start(&etcd.endpoint(), "a", &[]);
    lamp.is("lit").await;
    etcd.set_back(&snapshot, "restored").expect("a restored etcd");
    let (code, text) = lamp.ended().await;
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("etcd is another cluster than before"), "{text}");
    let again = start(&etcd.endpoint(), "a", &[]);
    again.is("lit").await;
}
