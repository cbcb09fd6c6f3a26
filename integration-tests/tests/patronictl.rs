//! Patroni's own `patronictl`, unmodified, on a cluster of ours: what it shows, and what it does. The commands come from
//! PyPI; only where they cannot be had does the test stand aside, and says so.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bots_core::wire::rfc3339_from_unix_ms;
use bytes::Bytes;
use fleet::{
    Fleet,
    fleet::MAIN,
    http::{Answer, Http},
    patroni::Patroni,
    process::{Finished, Program},
    skipped,
    wait::until,
};
use hyper::Method;
use serde_json::{Value, json};

const STEP: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn patronis_own_commands_work_on_a_cluster_of_ours() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    let logs = fleet.logs().to_owned();
    let patroni = match Patroni::install(&fleet.scratch, &logs).await {
        Ok(patroni) => patroni,
        Err(error) => {
            skipped("patronis_own_commands_work_on_a_cluster_of_ours", error.context("Patroni cannot be installed"));
            return Ok(());
        }
    };
    fleet.add_postgres(3)?;
    fleet.postgres_up(Duration::from_secs(90)).await?;
    let ctl = Ctl::new(&fleet, &patroni)?;
    shows_the_cluster(&fleet, &ctl).await?;
    answers_what_patroni_answers(&fleet).await?;
    edits_the_configuration(&fleet, &ctl).await?;
    restarts_what_waits_for_it(&fleet, &ctl).await?;
    lowers_what_a_standby_may_not_lower(&fleet, &ctl).await?;
    schedules_a_restart(&fleet, &ctl).await?;
    switches_over(&mut fleet, &ctl).await?;
    makes_a_replica_anew(&mut fleet, &ctl).await?;
    shows_who_is_waited_for(&ctl).await?;
    pauses_and_resumes(&mut fleet, &ctl).await?;
    fleet.stop().await
}

/// `patronictl`, with a configuration of its own.
struct Ctl {
    program: PathBuf,
    config: PathBuf,
    logs: PathBuf,
    password: String,
    began: Instant,
}

impl Ctl {
    fn new(fleet: &Fleet, patroni: &Patroni) -> Result<Self> {
        let config = fleet.scratch.path().join("patronictl.yaml");
        let yaml = format!("scope: {MAIN}\nnamespace: service\netcd3:\n  hosts: {}\n", fleet.etcd.hosts());
        std::fs::write(&config, yaml).context("write patronictl's configuration")?;
        let (program, logs) = (patroni.patronictl(), fleet.logs().to_owned());
        let password = fleet.passwords.superuser.clone();
        Ok(Self { program, config, logs, password, began: Instant::now() })
    }

    async fn run(&self, args: &[&str]) -> Result<Finished> {
        let config = self.config.display().to_string();
        let program = Program::new("patronictl", &self.program).args(["-c", &config]).args(args.iter().copied());
        let done = program.env("PGPASSWORD", &self.password).run(&self.logs, Duration::from_secs(90)).await?;
        println!("{:6.1} s  patronictl {}", self.began.elapsed().as_secs_f64(), args.join(" "));
        Ok(done)
    }

    /// Runs a command that must succeed and print all of `expected`.
    async fn says(&self, args: &[&str], expected: &[&str]) -> Result<String> {
        let done = self.run(args).await?;
        let said = format!("{}{}", done.stdout, done.stderr);
        ensure!(done.code == Some(0), "patronictl {args:?} ends with {:?}: {said}", done.code);
        for wanted in expected {
            ensure!(said.contains(wanted), "patronictl {args:?} does not say `{wanted}`: {said}");
        }
        Ok(done.stdout)
    }

    /// The rows of `patronictl list`, by member.
    async fn list(&self) -> Result<Vec<Value>> {
        let said = self.says(&["list", MAIN, "-f", "json"], &[]).await?;
        serde_json::from_str(&said).with_context(|| format!("read the list: {said}"))
    }
}

fn row<'r>(rows: &'r [Value], member: &str) -> &'r Value {
    rows.iter().find(|row| row["Member"] == member).unwrap()
}

async fn leader(fleet: &Fleet) -> Result<String> {
    until("somebody leads", STEP, || async {
        let now = fleet.store.look(MAIN).await?;
        now.primary().map(str::to_owned).ok_or_else(|| now.summary())
    })
    .await
}

/// Two that do not lead, in the order of their names.
async fn replicas(fleet: &Fleet) -> Result<Vec<String>> {
    let leader = leader(fleet).await?;
    Ok(fleet.postgres.iter().map(|p| p.bot.name.clone()).filter(|name| *name != leader).collect())
}

async fn ask(fleet: &Fleet, member: &str, method: Method, path: &str, body: &Value) -> Result<Answer> {
    let url = format!("{}{path}", fleet.postgres_bot(member)?.bot.api_url);
    let body = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
    Http::new().send(method, &url, Some("application/json"), body).await
}

async fn shows_the_cluster(fleet: &Fleet, ctl: &Ctl) -> Result<()> {
    let primary = leader(fleet).await?;
    // A replica's slot is made once it streams, and its stream begins anew with it.
    until("all is shown as it is", STEP, || async {
        let rows = ctl.list().await.map_err(|error| format!("{error:#}"))?;
        for member in rows.iter().map(|row| row["Member"].as_str().unwrap()) {
            let (role, state) = if member == primary { ("Leader", "running") } else { ("Replica", "streaming") };
            let found = row(&rows, member);
            let host = found["Host"].as_str().is_some_and(|host| host.starts_with("127.0.0.1:"));
            if found["Role"] != role || found["State"] != state || found["TL"] != 1 || !host {
                return Err(found.to_string());
            }
        }
        Ok(())
    })
    .await?;
    let sysid = fleet.superuser().ask("SELECT system_identifier FROM pg_control_system()").await?;
    ctl.says(&["list", MAIN], &[&format!("Cluster: {MAIN} ({sysid})"), "Leader", "streaming"]).await?;
    ctl.says(&["topology", MAIN], &[&primary, "+ pg-"]).await?;
    ctl.says(&["show-config", MAIN], &["ttl: 5", "max_connections: 50"]).await?;
    ctl.says(&["version", MAIN], &[&format!("{primary}: Patroni "), "PostgreSQL 1"]).await?;
    let port = fleet.postgres_bot(&primary)?.port.to_string();
    ctl.says(&["dsn", MAIN], &["host=127.0.0.1", &format!("port={port}")]).await?;
    let query = ["query", MAIN, "-U", "postgres", "-d", "postgres", "-c", "SELECT 6*7 AS answer", "--format", "tsv"];
    ctl.says(&query, &["answer", "42"]).await?;
    Ok(())
}

async fn answers_what_patroni_answers(fleet: &Fleet) -> Result<()> {
    let (primary, replica) = (leader(fleet).await?, replicas(fleet).await?.remove(0));
    for (path, on_primary, on_replica) in [
        ("/", 200, 503),
        ("/primary", 200, 503),
        ("/read-write", 200, 503),
        ("/leader", 200, 503),
        ("/replica", 503, 200),
        ("/replica?lag=16MB&replication_state=streaming", 503, 200),
        ("/replica?tag_zone=a", 503, 503),
        ("/read-only", 200, 200),
        ("/async", 503, 200),
        ("/sync", 503, 503),
        ("/read-only-sync", 200, 503),
        ("/quorum", 503, 503),
        ("/standby-leader", 503, 503),
        ("/health", 200, 200),
        ("/liveness", 200, 200),
        ("/readiness?lag=16MB&mode=write", 200, 200),
    ] {
        for (member, wanted) in [(&primary, on_primary), (&replica, on_replica)] {
            for method in [Method::GET, Method::HEAD, Method::OPTIONS] {
                let status = ask(fleet, member, method.clone(), path, &Value::Null).await?.status;
                ensure!(status == wanted, "{method} {path} of {member} answers {status}, not {wanted}");
            }
        }
    }
    let wrong = ask(fleet, &replica, Method::GET, "/replica?lag=much", &Value::Null).await?;
    ensure!(wrong.status == 400 && wrong.text.starts_with("lag: `much`"), "{wrong:?}");
    let told = ask(fleet, &primary, Method::GET, "/patroni", &Value::Null).await?;
    let told: Value = serde_json::from_str(&told.text).context("read /patroni")?;
    ensure!(told["role"] == "primary" && told["state"] == "running", "{told}");
    ensure!(told["replication"].as_array().is_some_and(|all| all.len() == 2), "{told}");
    ensure!(told["postmaster_start_time"].as_str().is_some_and(|at| at.ends_with("+00:00")), "{told}");
    let metrics = ask(fleet, &primary, Method::GET, "/metrics", &Value::Null).await?.text;
    for figure in ["primary", "postgres_running"] {
        let line = format!("patroni_{figure}{{scope=\"{MAIN}\",name=\"{primary}\"}} 1\n");
        ensure!(metrics.contains(&line), "no {line} in {metrics}");
    }
    ensure!(
        metrics.contains(&format!("patroni_postgres_state{{scope=\"{MAIN}\",name=\"{primary}\"}} 5\n")),
        "{metrics}"
    );
    Ok(())
}

async fn edits_the_configuration(fleet: &Fleet, ctl: &Ctl) -> Result<()> {
    let primary = leader(fleet).await?;
    let edit = ["edit-config", MAIN, "--force", "-s", "maximum_lag_on_failover=2097152", "-p", "work_mem=7MB"];
    ctl.says(&[&edit[..], &["-p", "max_connections=60"]].concat(), &["Configuration changed"]).await?;
    let login = fleet.superuser();
    for bot in &fleet.postgres {
        login.at(bot.port).wait_for("SHOW work_mem", "7MB", STEP).await?;
    }
    ensure!(login.ask("SHOW max_connections").await? == "50", "max_connections waits for a restart");
    until("every member says that it waits for a restart", STEP, || async {
        let now = fleet.store.look(MAIN).await?;
        let waits = |p: &fleet::bots::PostgresBot| {
            let change = now.postgres(&p.bot.name)?.pending_restart_reason.remove("max_connections")?;
            Some((change.old_value, change.new_value) == (String::from("50"), String::from("60")))
        };
        if fleet.postgres.iter().all(|p| waits(p) == Some(true)) { Ok(()) } else { Err(now.summary()) }
    })
    .await?;
    let rows = ctl.list().await?;
    ensure!(row(&rows, &primary)["Pending restart"] == "*", "{rows:?}");
    ensure!(row(&rows, &primary)["Pending restart reason"] == "max_connections: 50->60", "{rows:?}");
    // What no bot could go by does not get into etcd, whichever way it comes through the API.
    for (method, body, wanted) in [
        (Method::PATCH, json!({"ttl": "soon"}), 400),
        (Method::PATCH, json!([1]), 400),
        (Method::PUT, json!({"postgresql": 3}), 400),
        (Method::PATCH, json!({"loop_wait": 9, "maximum_lag_on_failover": null}), 200),
    ] {
        let answer = ask(fleet, &primary, method.clone(), "/config", &body).await?;
        ensure!(answer.status == wanted, "{method} {body}: {answer:?}");
    }
    let whole = ask(fleet, &primary, Method::GET, "/config", &Value::Null).await?.text;
    let mut whole: Value = serde_json::from_str(&whole).context("read /config")?;
    ensure!(whole["loop_wait"] == 9 && whole.get("maximum_lag_on_failover").is_none(), "{whole}");
    whole["primary_race_backoff"] = json!(3);
    let put = ask(fleet, &primary, Method::PUT, "/config", &whole).await?;
    ensure!(put.status == 200, "{put:?}");
    until("the bot names what has no effect", STEP, || async {
        let report = fleet.postgres_bot(&primary).unwrap().bot.report().await.map_err(|e| format!("{e:#}"))?;
        let named =
            report.troubles.iter().any(|line| line.contains("primary_race_backoff is known and has no effect yet"));
        if named { Ok(()) } else { Err(format!("{:?}", report.troubles)) }
    })
    .await?;
    let off = ask(fleet, &primary, Method::PATCH, "/config", &json!({"primary_race_backoff": null})).await?;
    ensure!(off.status == 200, "{off:?}");
    Ok(())
}

async fn restarts_what_waits_for_it(fleet: &Fleet, ctl: &Ctl) -> Result<()> {
    let (primary, replicas) = (leader(fleet).await?, replicas(fleet).await?);
    let pid = fleet.postgres_bot(&primary)?.postmaster();
    let old = ["restart", MAIN, &primary, "--force", "--pg-version", "9.5.2"];
    ctl.says(&old, &["restart conditions are not satisfied"]).await?;
    let replica = format!("Success: restart on member {}", replicas[0]);
    ctl.says(&["restart", MAIN, "--role", "replica", "--force", "--pending"], &[&replica]).await?;
    ensure!(fleet.postgres_bot(&primary)?.postmaster() == pid, "the primary was left alone");
    let own = format!("Success: restart on member {primary}");
    ctl.says(&["restart", MAIN, &primary, "--force", "--timeout", "50"], &[&own]).await?;
    ensure!(fleet.postgres_bot(&primary)?.postmaster() != pid, "the primary was restarted");
    ensure!(leader(fleet).await? == primary, "a restart is no failover");
    for bot in &fleet.postgres {
        fleet.superuser().at(bot.port).wait_for("SHOW max_connections", "60", STEP).await?;
    }
    let none = ctl.says(&["restart", MAIN, "--force", "--pending"], &[]).await?;
    ensure!(!none.contains("Success"), "nobody waits for a restart any more: {none}");
    ctl.says(&["reload", MAIN, "--force"], &[&format!("Reload request received for member {primary}")]).await?;
    Ok(())
}

/// A standby with fewer connections than its primary had would refuse to start, and be taken for broken.
async fn lowers_what_a_standby_may_not_lower(fleet: &Fleet, ctl: &Ctl) -> Result<()> {
    let (primary, replica) = (leader(fleet).await?, replicas(fleet).await?.remove(0));
    let body = json!({"postgresql": {"parameters": {"max_connections": 55}}});
    ensure!(ask(fleet, &primary, Method::PATCH, "/config", &body).await?.status == 200, "the change is taken");
    let waits = |member: String, wanted: bool| async move {
        until("who waits for a restart", STEP, || async {
            let now = fleet.store.look(MAIN).await?;
            let waits = now.postgres(&member).is_some_and(|facts| facts.pending_restart);
            if waits == wanted { Ok(()) } else { Err(format!("{member} waits: {waits}")) }
        })
        .await
    };
    waits(replica.clone(), true).await?;
    let restart = ["restart", MAIN, &replica, "--force", "--pending"];
    let done = format!("Success: restart on member {replica}");
    ctl.says(&restart, &[&done]).await?;
    let login = fleet.superuser();
    let own = login.at(fleet.postgres_bot(&replica)?.port);
    ensure!(own.ask("SHOW max_connections").await? == "60", "it keeps what its primary has");
    waits(replica.clone(), true).await?;
    let both = fleet.botctl(["restart", &format!("{MAIN}/{primary}"), "--pending", "--force"]).await?;
    ensure!(both.code == Some(0) && both.stdout.contains("restarted successfully"), "{both:?}");
    fleet.caught_up(&replica, STEP).await?;
    ctl.says(&restart, &[&done]).await?;
    own.wait_for("SHOW max_connections", "55", STEP).await?;
    waits(replica.clone(), false).await
}

async fn schedules_a_restart(fleet: &Fleet, ctl: &Ctl) -> Result<()> {
    let replica = replicas(fleet).await?.remove(0);
    let far = ["restart", MAIN, &replica, "--force", "--scheduled", "2099-01-01T00:00:00+00:00"];
    ctl.says(&far, &[&format!("Success: restart scheduled on member {replica}")]).await?;
    let rows = ctl.list().await?;
    let shown = row(&rows, &replica)["Scheduled restart"].as_str().unwrap_or_default();
    ensure!(shown.starts_with("2099-01-01T00:00:00"), "{rows:?}");
    let again = ask(fleet, &replica, Method::POST, "/restart", &json!({"schedule": "2099-01-01T00:00:00Z"})).await?;
    ensure!(again.status == 409, "{again:?}");
    ctl.says(&["flush", MAIN, &replica, "restart", "--force"], &["Success: flush scheduled restart"]).await?;
    for (body, status) in [
        (json!({"schedule": "2001-01-01T00:00:00Z"}), 422),
        (json!({"schedule": "2099-01-01T00:00:00"}), 400),
        (json!({"role": "king"}), 400),
        (json!({"timeout": -1}), 400),
        (json!({"colour": "red"}), 400),
    ] {
        let answer = ask(fleet, &replica, Method::POST, "/restart", &body).await?;
        ensure!(answer.status == status, "{body}: {answer:?}");
    }
    let gone = ask(fleet, &replica, Method::DELETE, "/restart", &Value::Null).await?;
    ensure!(gone.status == 404, "{gone:?}");
    Ok(())
}

async fn switches_over(fleet: &mut Fleet, ctl: &Ctl) -> Result<()> {
    let old = leader(fleet).await?;
    let to = replicas(fleet).await?.remove(0);
    let done = format!("Successfully switched over to \"{to}\"");
    ctl.says(&["switchover", MAIN, "--force", "--leader", &old, "--candidate", &to], &[&done]).await?;
    ensure!(leader(fleet).await? == to, "{to} leads");
    fleet.postgres_up(STEP).await?;
    let history = ctl.says(&["history", MAIN, "-f", "json"], &["no recovery target specified"]).await?;
    ensure!(history.contains(&to), "{history}");
    let far = ["switchover", MAIN, "--force", "--candidate", &old, "--scheduled", "2099-01-01T00:00:00+00:00"];
    ctl.says(&far, &["Switchover scheduled"]).await?;
    ctl.says(&["list", MAIN], &["Switchover scheduled at: 2099-01-01T00:00:00+00:00", &old]).await?;
    ctl.says(&["flush", MAIN, "switchover", "--force"], &["Success: scheduled switchover deleted"]).await?;
    let soon = rfc3339_from_unix_ms(bots_core::shell::Clock::unix_ms() + 4_000);
    let body = json!({"leader": to, "candidate": old, "scheduled_at": soon});
    let asked = ask(fleet, &to, Method::POST, "/switchover", &body).await?;
    ensure!(asked.status == 202, "{asked:?}");
    fleet.new_primary(&to, STEP).await?;
    ensure!(leader(fleet).await? == old, "{old} leads again");
    fleet.postgres_up(STEP).await?;
    let done = format!("Successfully failed over to \"{to}\"");
    ctl.says(&["failover", MAIN, "--force", "--candidate", &to], &[&done]).await?;
    fleet.postgres_up(STEP).await?;
    for (path, body, status) in [
        ("/switchover", json!({"candidate": old}), 400),
        ("/switchover", json!({"leader": to, "candidate": to}), 400),
        ("/switchover", json!({"leader": old}), 412),
        ("/failover", json!({}), 400),
        ("/failover", json!({"candidate": "nobody"}), 412),
        ("/switchover", json!({"leader": to, "scheduled_at": "2001-01-01T00:00:00Z"}), 422),
    ] {
        let answer = ask(fleet, &to, Method::POST, path, &body).await?;
        ensure!(answer.status == status, "{path} {body}: {answer:?}");
    }
    Ok(())
}

async fn makes_a_replica_anew(fleet: &mut Fleet, ctl: &Ctl) -> Result<()> {
    let (primary, replica) = (leader(fleet).await?, replicas(fleet).await?.remove(0));
    let mark = fleet.postgres_bot(&replica)?.data_dir.join("of-the-old-data");
    std::fs::write(&mark, "").context("leave a mark in the old data")?;
    let done = format!("Reinitialize is completed on: {replica}");
    let started = format!("Success: reinitialize for member {replica}");
    ctl.says(&["reinit", MAIN, &replica, "--force", "--wait"], &[&started, &done]).await?;
    fleet.postgres_up(STEP).await?;
    ensure!(!mark.exists(), "the old data is gone");
    std::fs::write(&mark, "").context("leave a mark in the old data")?;
    let again = fleet.botctl(["reinit", &format!("{MAIN}/{replica}"), "--force"]).await?;
    ensure!(again.code == Some(0) && again.stdout.contains("reinitialize started"), "{again:?}");
    ensure!(again.stdout.ends_with("running\n") && !mark.exists(), "{again:?}");
    fleet.postgres_up(STEP).await?;
    let refused = ask(fleet, &primary, Method::POST, "/reinitialize", &Value::Null).await?;
    ensure!(refused.status == 503 && refused.text.contains("I am the leader, can not reinitialize"), "{refused:?}");
    Ok(())
}

/// The synchronous modes, switched on and off by Patroni's own command, with the roles that it shows.
async fn shows_who_is_waited_for(ctl: &Ctl) -> Result<()> {
    for (mode, role, standbys) in [("true", "Sync Standby", 1), ("quorum", "Quorum Standby", 2), ("null", "Replica", 2)]
    {
        ctl.says(&["edit-config", MAIN, "--force", "-s", &format!("synchronous_mode={mode}")], &["changed"]).await?;
        until(&format!("patronictl shows {standbys} as {role}"), STEP, || async {
            let rows = ctl.list().await.map_err(|error| format!("{error:#}"))?;
            let shown = rows.iter().filter(|row| row["Role"] == role).count();
            if shown == standbys { Ok(()) } else { Err(format!("{rows:?}")) }
        })
        .await?;
    }
    Ok(())
}

/// In a pause nobody takes over from a primary whose server died, and nobody starts it, until an operator does.
async fn pauses_and_resumes(fleet: &mut Fleet, ctl: &Ctl) -> Result<()> {
    let primary = leader(fleet).await?;
    ctl.says(&["pause", MAIN, "--wait"], &["Success: cluster management is paused"]).await?;
    ctl.says(&["list", MAIN], &["Maintenance mode: on"]).await?;
    fleet.postgres_bot(&primary)?.crash_postmaster()?;
    until("nobody leads", STEP, || async {
        let now = fleet.store.look(MAIN).await?;
        if now.leader().is_none() { Ok(()) } else { Err(now.summary()) }
    })
    .await?;
    // Three lengths of a lease: without the pause, another would lead long since.
    tokio::time::sleep(Duration::from_secs(3 * fleet.ttl_s)).await;
    let now = fleet.store.scope(MAIN).await?;
    ensure!(now.leader().is_none(), "somebody took the lead in a pause: {}", now.summary());
    ctl.says(&["restart", MAIN, &primary, "--force"], &[&format!("Success: restart on member {primary}")]).await?;
    ensure!(leader(fleet).await? == primary, "the member that led last leads again");
    let to = replicas(fleet).await?.remove(0);
    fleet.postgres_up(STEP).await?;
    let nameless = ask(fleet, &primary, Method::POST, "/switchover", &json!({"leader": primary})).await?;
    ensure!(nameless.status == 400, "{nameless:?}");
    let done = format!("Successfully switched over to \"{to}\"");
    ctl.says(&["switchover", MAIN, "--force", "--candidate", &to], &[&done]).await?;
    ctl.says(&["resume", MAIN, "--wait"], &["Success: cluster management is resumed"]).await?;
    fleet.postgres_up(STEP).await?;
    Ok(())
}
