//! botctl as a script sees it: the real program, a real etcd, what it prints and how it exits.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    process::{Command, Output, Stdio},
    thread,
    time::Duration,
};

use bots_core::{
    dcs::{Outcome, Transaction, Write as DcsWrite},
    shell::testing::EtcdServer,
};

/// One etcd a test, with the keys of a small fleet in it.
struct World {
    etcd: EtcdServer,
    runtime: tokio::runtime::Runtime,
    folder: tempfile::TempDir,
}

const PRIMARY: &str = r#"{"kind":"postgres","state":"running","role":"primary","api_url":"http://127.0.0.1:1/patroni","timeline":1,"xlog_location":4096}"#;
const REPLICA: &str = r#"{"kind":"postgres","state":"running","role":"replica","api_url":"http://127.0.0.1:1/patroni","timeline":1,"xlog_location":2048,"replication_state":"streaming"}"#;

/// A replica whose base backup is under way.
const COPYING: &str = r#"{"kind":"postgres","state":"creating replica","role":"replica","api_url":"http://127.0.0.1:1/patroni","copying":{"bytes_done":1073741824,"bytes_total":4294967296,"percent":25}}"#;
/// What a bot answers that has begun one.
const COPY_BEGINS: &str = "reinitialize started";

impl World {
    fn new(keys: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let etcd = EtcdServer::start(folder.path()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let world = Self { etcd, runtime, folder };
        for (key, value) in keys {
            world.put(key, value);
        }
        world
    }

    fn postgres() -> Self {
        Self::new(&[("main/leader", "pg-1"), ("main/members/pg-1", PRIMARY), ("main/members/pg-2", REPLICA)])
    }

    fn put(&self, key: &str, value: &str) {
        let write = DcsWrite::put(format!("/service/{key}"), value);
        self.write(vec![write]);
    }

    fn write(&self, writes: Vec<DcsWrite>) {
        let client = self.etcd.client();
        let outcome = self.runtime.block_on(client.transact(&Transaction::new(Vec::new(), writes)));
        assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    }

    fn value(&self, key: &str) -> Option<String> {
        let client = self.etcd.client();
        self.runtime.block_on(client.get(&format!("/service/{key}"))).unwrap().map(|kv| kv.value)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_botctl"));
        command.env("BOTCTL_ETCD", self.etcd.endpoint()).env_remove("EDITOR").env_remove("VISUAL").args(args);
        command.stdin(Stdio::null());
        command
    }

    /// Runs botctl and checks its exit code and all that it says.
    fn check(&self, args: &[&str], code: i32, stdout: &str, stderr: &str) {
        let output = self.command(args).output().unwrap();
        assert_eq!(said(&output), (Some(code), stdout.to_owned(), stderr.to_owned()), "botctl {}", args.join(" "));
    }
}

fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Answers every connection with `status`, or with the beginning of a copy, as a bot's API does.
fn bot_that_says(status: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let line = request_line(&mut BufReader::new(stream.try_clone().unwrap()));
            let (code, body) = match line.rsplit_once(' ').map(|(request, _)| request) {
                Some("GET /status") => (200, status),
                Some("POST /reinitialize") => (200, COPY_BEGINS),
                _ => (404, ""),
            };
            let _asker_gone = write!(
                stream,
                "HTTP/1.1 {code} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
        }
    });
    url
}

/// Reads a request to its end: who closes before cuts off his own answer.
fn request_line(request: &mut impl BufRead) -> String {
    let (mut first, mut line, mut length) = (String::new(), String::new(), 0);
    request.read_line(&mut first).unwrap();
    loop {
        line.clear();
        if request.read_line(&mut line).unwrap() == 0 || line == "\r\n" {
            break;
        }
        let header = line.to_ascii_lowercase();
        length = header.strip_prefix("content-length:").map_or(length, |figure| figure.trim().parse().unwrap());
    }
    request.read_exact(&mut vec![0; length]).unwrap();
    first
}

#[test]
fn list_shows_every_scope_and_knows_the_unknown() {
    let world = World::postgres();
    world.put("web/config", "{}");
    world.check(
        &["list"],
        0,
        "SCOPE  NAME  KIND      ROLE              STATE      FOR  TL      LAG  LOAD  REVISION\n\
         main   pg-1  postgres  primary (leader)  running          1\n\
         main   pg-2  postgres  replica           streaming        1  2.0 KiB\n\
         \nweb: it has keys, but no bot is alive\n",
        "",
    );
    let output = world.command(&["list", "main", "--format", "json"]).output().unwrap();
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&rows[0]["leader"], &rows[1]["lag_bytes"]), (&true.into(), &2_048.into()));
    world.check(&["list", "mian"], 4, "", "botctl: no scope mian in /service: there is main, web\n");
    world.check(&["list", "a/b"], 2, "", "botctl: scope `a/b` has the character `/`: use letters, digits, `-`, `_` and `.`, and begin with a letter or digit\n");
}

#[test]
fn reinit_shows_how_far_the_copy_is_until_it_is_done() {
    let world = World::postgres();
    let api = bot_that_says("{}");
    let at = |member: &str| member.replace("http://127.0.0.1:1", &api);
    world.put("main/members/pg-2", &at(COPYING));
    world.check(
        &["list", "main"],
        0,
        "SCOPE  NAME  KIND      ROLE              STATE                                        FOR  TL  LAG  LOAD  REVISION\n\
         main   pg-1  postgres  primary (leader)  running                                            1\n\
         main   pg-2  postgres  replica           creating replica, 25 % (1.0 GiB of 4.0 GiB)\n",
        "",
    );
    let mut command = world.command(&["reinit", "pg-2", "--force"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(lines.next().as_deref(), Some(&*format!("main/pg-2: {COPY_BEGINS}")));
    assert_eq!(lines.next().as_deref(), Some("main/pg-2: creating replica, 25 % (1.0 GiB of 4.0 GiB)"));
    let further = COPYING.replace("1073741824", "3221225472").replace(r#""percent":25"#, r#""percent":75"#);
    world.put("main/members/pg-2", &at(&further));
    assert_eq!(lines.next().as_deref(), Some("main/pg-2: creating replica, 75 % (3.0 GiB of 4.0 GiB)"));
    world.put("main/members/pg-2", &at(REPLICA));
    assert_eq!(lines.next().as_deref(), Some("main/pg-2: running"));
    assert_eq!((lines.next(), child.wait().unwrap().code()), (None, Some(0)));
}

#[test]
fn list_watch_prints_again_on_a_change() {
    let world = World::postgres();
    let mut child = world.command(&["list", "--watch"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.starts_with("main   pg-2  postgres  replica")));
    world.put("main/members/pg-2", &REPLICA.replace("streaming", "in archive recovery"));
    assert!(lines.any(|line| line.contains("in archive recovery")));
    child.kill().unwrap();
    child.wait().unwrap();
    world.check(&["list", "--watch", "typo"], 4, "", "botctl: no scope typo in /service: there is main\n");
}

#[test]
fn a_user_of_etcd_and_his_password_belong_together() {
    let world = World::new(&[]);
    let together = "botctl: --etcd-username and --etcd-password-file belong together\n";
    world.check(&["list", "--etcd-username", "root"], 2, "", together);
    world.check(&["list", "--etcd-password-file", "/dev/null"], 2, "", together);
}

#[test]
fn what_etcd_refuses_is_no_silence() {
    let world = World::new(&[("main/config", "{}")]);
    let password = world.folder.path().join("password");
    std::fs::write(&password, "secret").unwrap();
    for arguments in [
        vec!["role", "add", "reader"],
        vec!["role", "grant-permission", "reader", "--prefix=true", "read", "/service/"],
        vec!["user", "add", "reader:secret"],
        vec!["user", "grant-role", "reader", "reader"],
        vec!["user", "add", "root:secret"],
        vec!["auth", "enable"],
    ] {
        world.etcd.ctl(&arguments).unwrap();
    }
    let refused = format!("botctl: etcd at {} refuses: etcdserver: permission denied\n", world.etcd.endpoint());
    let who = ["--etcd-username", "reader", "--etcd-password-file", password.to_str().unwrap()];
    let as_reader = |command: &[&'static str]| [&who[..], command].concat();
    world.check(&as_reader(&["config", "edit", "main", "--set", "ttl=5"]), 1, "- {}\n+ ttl: 5\n", &refused);
    world.check(&as_reader(&["--namespace", "other", "list"]), 1, "", &refused);
}

#[test]
fn web_requests_go_to_web_bots_that_are_there() {
    let world = World::postgres();
    world.put("web/members/web-1", r#"{"kind":"web","state":"serving","role":"leader"}"#);
    world.check(&["web", "drain", "web", "wbe-1"], 4, "", "botctl: web has no bot wbe-1: it has web-1\n");
    world.check(
        &["web", "scale", "main", "--max", "3"],
        1,
        "",
        "botctl: main is no web scope: pg-1 is a postgres bot\n",
    );
    let said = "botctl: nothing was written: restart is \"now\": use a whole number, another than before\n";
    world.check(&["config", "edit", "web", "--set", "restart=now"], 1, "", said);
    assert_eq!((world.value("web/config"), world.value("main/config")), (None, None));
}

#[test]
fn why_prints_the_report_or_the_member_key() {
    let world = World::postgres();
    let status = r#"{"name":"pg-2","version":"0.1.0","report":{"role":"replica","doing":"streams from pg-1","for_ms":1500,"waiting_for":"the leader key to become free","next_deadline":[2000,"look again"],"why_not":[],"troubles":[]},"state":{"password":"s3cret"}}"#;
    let url = bot_that_says(status);
    world.put("main/members/pg-2", &REPLICA.replace("http://127.0.0.1:1", &url));
    world.check(
        &["why", "pg-2"],
        0,
        "main/pg-2  postgres bot 0.1.0\n  is       replica, for 1 s\n  does     streams from pg-1\n  \
         waits    for the leader key to become free\n  next     in 2 s: look again\n",
        "",
    );
    let output = said(&world.command(&["why", "main/pg-2", "--format", "json"]).output().unwrap());
    assert!(!output.1.contains("s3cret") && output.1.contains("******"), "{output:?}");
    world.check(
        &["why", "pg-1"],
        1,
        "main/pg-1  postgres bot \n  says     in its member key: primary, running\n",
        "botctl: main/pg-1 does not answer at http://127.0.0.1:1/patroni: connect to 127.0.0.1:1: \
         Connection refused (os error 111)\n",
    );
    let output = said(&world.command(&["why", "pg-1", "--format", "json"]).output().unwrap());
    let silent: serde_json::Value = serde_json::from_str(&output.1).unwrap();
    assert_eq!((&silent["answers"], &silent["member"]["state"]), (&false.into(), &"running".into()));
    world.check(&["why", "pg-9"], 4, "", "botctl: no bot pg-9 is alive: `botctl list` shows who is\n");
    world.put("web/members/pg-1", r#"{"kind":"web","state":"idle","role":"member"}"#);
    world.check(&["why", "pg-1"], 2, "", "botctl: pg-1 is the name of several bots: say main/pg-1 or web/pg-1\n");
    world.put("site/members/content-1", r#"{"kind":"content","state":"watching","role":"leader"}"#);
    let refusal = "botctl: site/content-1 is a content bot: that is asked of postgres and web bots only\n";
    world.check(&["reload", "content-1"], 1, "", refusal);
}

#[test]
fn switchover_is_refused_clearly() {
    let world = World::postgres();
    world.put("main/members/pg-3", &REPLICA.replace("streaming", "starting"));
    world.check(&["switchover", "main", "--to", "pg-1", "--force"], 1, "", "botctl: pg-1 leads main already\n");
    world.check(
        &["switchover", "main", "--to", "pg-9", "--force"],
        4,
        "",
        "botctl: main has no member pg-9: it has pg-1, pg-2, pg-3\n",
    );
    world.check(
        &["switchover", "main", "--to", "pg-3", "--force"],
        1,
        "",
        "botctl: pg-3 is not streaming, it is starting\n",
    );
    world.check(
        &["switchover", "main", "--to", "pg-2"],
        2,
        "",
        "botctl: Hand the lead of main from pg-1 to pg-2? Nobody is there to answer: add --force to mean yes\n",
    );
    world.write(vec![DcsWrite::delete("/service/main/leader")]);
    world.check(
        &["switchover", "main", "--force"],
        1,
        "",
        "botctl: main has no leader: there is nobody to hand over from\n",
    );
    assert_eq!(world.value("main/failover"), None, "a refusal writes nothing");
}

#[test]
fn switchover_waits_for_the_new_primary() {
    let world = World::postgres();
    let child = world.command(&["switchover", "main", "--to", "pg-2", "--force", "--format", "json"]);
    let output = run_beside(child, || {
        wait_for_value(&world, "main/failover", r#"{"leader":"pg-1","member":"pg-2"}"#);
        world.write(vec![DcsWrite::delete("/service/main/leader")]);
        world.put("main/leader", "pg-2");
        world.write(vec![
            DcsWrite::put("/service/main/failover", "{}"),
            DcsWrite::put("/service/main/members/pg-2", PRIMARY),
        ]);
    });
    assert_eq!(output.0, Some(0), "{output:?}");
    let done: serde_json::Value = serde_json::from_str(&output.1).unwrap();
    assert_eq!((&done["from"], &done["to"]), (&"pg-1".into(), &"pg-2".into()));
}

#[test]
fn switchover_that_another_wins_fails() {
    let world = World::postgres();
    let output = run_beside(world.command(&["switchover", "main", "--to", "pg-2", "--force"]), || {
        wait_for_value(&world, "main/failover", r#"{"leader":"pg-1","member":"pg-2"}"#);
        world.put("main/members/pg-3", PRIMARY);
        world.put("main/leader", "pg-3");
    });
    let said = "botctl: pg-3 leads main in place of pg-1, and not pg-2: `botctl why main/pg-2` may say what kept it\n";
    assert_eq!(output, (Some(1), String::new(), said.to_owned()));
}

#[test]
fn switchover_that_is_taken_back_fails_with_the_leaders_reason() {
    let world = World::postgres();
    let status = r#"{"report":{"role":"primary","doing":"","for_ms":1,"waiting_for":"","next_deadline":null,"why_not":[],"troubles":["the switchover to pg-2 failed: it lags by 3 MiB"]}}"#;
    world.put("main/members/pg-1", &PRIMARY.replace("http://127.0.0.1:1", &bot_that_says(status)));
    let output = run_beside(world.command(&["switchover", "main", "--to", "pg-2", "--force"]), || {
        wait_for_value(&world, "main/failover", r#"{"leader":"pg-1","member":"pg-2"}"#);
        world.put("main/failover", "{}");
    });
    let said = "botctl: pg-1 did not hand main over to pg-2 and still leads: the switchover to pg-2 failed: it lags by 3 MiB\n";
    assert_eq!(output, (Some(1), String::new(), said.to_owned()));
}

#[test]
fn switchover_that_nobody_answers_ends_in_time() {
    let world = World::postgres();
    let output = said(&world.command(&["switchover", "main", "--force", "--timeout", "1"]).output().unwrap());
    assert_eq!(output.0, Some(1));
    assert!(output.2.starts_with("botctl: main was not handed over within 1.0 s: pg-1 leads"), "{output:?}");
    world.check(
        &["switchover", "main", "--force"],
        1,
        "",
        "botctl: a switchover of main to any replica is under way already: wait for its end\n",
    );
}

#[test]
fn config_is_shown_set_and_edited() {
    let world = World::postgres();
    world.put("main/config", r#"{"ttl":5,"postgresql":{"parameters":{"work_mem":"4MB"}}}"#);
    world.check(
        &["config", "edit", "main", "--set", "ttl=4", "--unset", "postgresql.parameters.work_mem"],
        0,
        "  postgresql:\n-   parameters:\n-     work_mem: 4MB\n- ttl: 5\n+   parameters: {}\n+ ttl: 4\nwritten\n",
        "",
    );
    assert_eq!(world.value("main/config").as_deref(), Some(r#"{"postgresql":{"parameters":{}},"ttl":4}"#));
    world.check(&["config", "edit", "main", "--set", "ttl=4"], 0, "nothing changes\n", "");
    world.check(
        &["config", "show", "main", "-f", "json"],
        0,
        "{\n  \"postgresql\": {\n    \"parameters\": {}\n  },\n  \"ttl\": 4\n}\n",
        "",
    );
    world.check(
        &["config", "edit", "main"],
        2,
        "",
        "botctl: EDITOR is not set: name your editor there, or use --set and --unset\n",
    );
    let edit = |editor: &str| {
        said(&world.command(&["config", "edit", "main", "--force"]).env("EDITOR", editor).output().unwrap())
    };
    let output = edit("sed -i s/4/3/");
    assert_eq!((output.0, output.2.as_str()), (Some(0), ""), "{output:?}");
    assert!(output.1.contains("- ttl: 4\n+ ttl: 3\n") && output.1.ends_with("written\n"), "{output:?}");
    let output = edit("sh -c 'echo [ > $0'");
    assert!(output.0 == Some(1) && output.2.starts_with("botctl: not valid YAML: "), "{output:?}");
    let kept = output.2.trim_end().rsplit(' ').next().unwrap();
    assert_eq!(std::fs::read_to_string(kept).unwrap(), "[\n");
    std::fs::remove_file(kept).unwrap();
    let output = edit("false");
    assert_eq!(output.2, "botctl: the editor `false` failed: nothing was written\n");
    assert_eq!(world.value("main/config").as_deref(), Some(r#"{"postgresql":{"parameters":{}},"ttl":3}"#));
}

#[test]
fn config_edit_never_overwrites_what_another_wrote() {
    let world = World::postgres();
    world.put("main/config", r#"{"ttl":5}"#);
    // The editor is where the other one is faster.
    let other = format!(
        "ETCDCTL_API=3 etcdctl --endpoints {} put /service/main/config {{}} >&2; sed -i s/5/4/",
        world.etcd.endpoint()
    );
    let output = said(&world.command(&["config", "edit", "main", "--force"]).env("EDITOR", other).output().unwrap());
    assert_eq!(output.0, Some(1));
    let (why, kept) = output.2.trim_end().split_once("; your edit is kept in ").expect("it says where");
    assert!(
        why.ends_with("somebody else has changed the configuration in the meantime: nothing was written; try again"),
        "{output:?}"
    );
    assert_eq!(std::fs::read_to_string(kept).unwrap(), "ttl: 4\n");
    std::fs::remove_file(kept).unwrap();
    assert_eq!(world.value("main/config").as_deref(), Some("{}"));
}

#[test]
fn history_and_completions() {
    let world = World::postgres();
    world.check(
        &["history", "main"],
        1,
        "",
        "botctl: main has no history: no timeline has ended and no revision is published\n",
    );
    world.put("main/history", r#"[[1,67110576,"no recovery target specified","2026-07-24T12:00:00+00:00","pg-1"]]"#);
    let output = said(&world.command(&["history", "main"]).output().unwrap());
    assert!(output.1.contains("0/40006B0"), "{output:?}");
    let output = said(&world.command(&["completions", "bash"]).output().unwrap());
    assert!(output.0 == Some(0) && output.1.contains("_botctl"));
}

#[test]
fn an_etcd_that_is_away_is_named() {
    let output = Command::new(env!("CARGO_BIN_EXE_botctl")).args(["-e", "127.0.0.1:1", "list"]).output().unwrap();
    let (code, stdout, stderr) = said(&output);
    assert_eq!((code, stdout.as_str()), (Some(3), ""));
    assert!(stderr.starts_with("botctl: etcd at 127.0.0.1:1 does not answer: "), "{stderr}");
    assert_eq!(stderr.lines().count(), 1);
}

/// Runs `command` while `beside` plays the fleet.
fn run_beside(mut command: Command, beside: impl FnOnce()) -> (Option<i32>, String, String) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    beside();
    let (mut stdout, mut stderr) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    (child.wait().unwrap().code(), stdout, stderr)
}

fn wait_for_value(world: &World, key: &str, value: &str) {
    for _ in 0..500 {
        if world.value(key).as_deref() == Some(value) {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("{key} did not become {value}: {:?}", world.value(key));
}

#[test]
fn figures_that_would_shrink_a_web_fleet_are_not_written() {
    let before = r#"{"scaling":{"min":10,"max":20}}"#;
    let world = World::new(&[("web/config", before)]);
    let told =
        "botctl: nothing was written: scaling.min is 25 and scaling.max is 20: raise the one or lower the other\n";
    world.check(&["web", "scale", "web", "--min", "25"], 1, "", told);
    let told = "botctl: nothing was written: scaling.max is 0: use a whole number from 1 to 1000\n";
    world.check(&["web", "pin", "web", "0"], 1, "", told);
    assert_eq!(world.value("web/config").as_deref(), Some(before));
}
