//! What is done to a cluster while a client writes, and what the client sees of it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fleet::{
    fleet::MAIN,
    http::Http,
    process::{Program, signal_pid},
    wait::{millis, until},
    writers::{Writers, longest_gap, lost, two_writable, two_writable_to_the_end},
};
use hyper::Method;
use rustix::process::Signal;

use crate::{
    contender::{Contender, DEADLINE, MEMBERS},
    report::Round,
    rows::{ETCD_DOWN, Fault, KEEPER_FROZEN, NODE_FROZEN, SUPERVISOR_PAUSE, Settings},
};

/// The client writes this long before a fault, so that the fault is what ends its writing.
const STEADY: Duration = Duration::from_millis(500);

/// How long two primaries are watched from when the second one writes, or from when a frozen one goes on: who has not stopped
/// by then does not stop.
const TWO_PRIMARIES_WATCHED: Duration = Duration::from_secs(10);

/// A change of the configuration is in force within this, or never: three of the longest loops.
const SETTINGS_DEADLINE: Duration = Duration::from_secs(30);

/// What a fault has done.
struct Done {
    /// When it began, on the client's clock.
    moment: Duration,
    note: String,
}

impl Contender {
    /// Does something to the cluster while a client writes, waits until all is well again, and counts.
    pub(crate) async fn suffer(&mut self, fault: Fault, delay: Duration) -> Result<Round> {
        tokio::time::sleep(delay).await;
        self.settled().await?;
        self.set(fault.settings()).await?;
        let primary = self.settled().await?;
        if !fault.waits() {
            // A server that recovers makes all its files durable first: what other clusters have left to the disk just
            // now would be in its figures. Where leases run out, that is nothing, and would hold up the neighbours.
            tokio::task::spawn_blocking(rustix::fs::sync).await.context("flush the disks")?;
        }
        let writers = Writers::start(&self.fleet.superuser(), DEADLINE).await?;
        tokio::time::sleep(STEADY).await;
        let Done { moment, note } = self.strike(fault, &primary, &writers).await?;
        let end = writers.now();
        self.start_missing()?;
        self.settled().await?;
        let writes = writers.finish().await?;
        // What happens when a killed keeper is started again is not part of what its death costs.
        let seen = &writes[..writes.partition_point(|write| write.at <= end)];
        let went_on = matches!(fault, Fault::KeeperKilled | Fault::KeeperFrozen | Fault::NodeFrozen);
        Ok(Round {
            gap_ms: millis(longest_gap(if fault == Fault::KeeperKilled { seen } else { &writes }, moment)),
            acknowledged: writes.len(),
            lost: lost(&self.fleet.superuser(), &writes).await?,
            two_primaries_ms: millis(two_writable(seen)),
            two_primaries_went_on: went_on && two_writable_to_the_end(seen, end),
            note,
        })
    }

    async fn strike(&mut self, fault: Fault, primary: &str, writers: &Writers) -> Result<Done> {
        let moment = writers.now();
        match fault {
            Fault::ServerKilled | Fault::ServerLost => self.kill_server(primary, writers).await,
            Fault::Switchover => self.switch_over(primary, writers).await,
            Fault::NodeLost | Fault::NodeLostQuorum => {
                self.fleet.postgres_bot_mut(primary)?.kill_node();
                Ok(Done { moment, note: self.taken_over(primary, writers).await? })
            }
            Fault::NodeSilentQuorum => {
                let _frozen = self.fleet.postgres_bot_mut(primary)?.freeze_node()?;
                let note = self.taken_over(primary, writers).await;
                self.fleet.postgres_bot_mut(primary)?.kill_node();
                Ok(Done { moment, note: note? })
            }
            Fault::KeeperRestarted => {
                self.fleet.postgres_bot_mut(primary)?.bot.kill();
                tokio::time::sleep(SUPERVISOR_PAUSE).await;
                self.fleet.postgres_bot_mut(primary)?.bot.start()?;
                // Past the end of every lease that the killed one had.
                tokio::time::sleep(Duration::from_secs(self.fleet.ttl_s + 1)).await;
                let now = self.fleet.store.scope(MAIN).await?;
                Ok(Done { moment, note: format!("{} leads, and {primary} did", now.leader().unwrap_or("nobody")) })
            }
            Fault::KeeperKilled => {
                self.fleet.postgres_bot_mut(primary)?.bot.kill();
                let note = self.taken_over(primary, writers).await?;
                tokio::time::sleep(TWO_PRIMARIES_WATCHED).await;
                Ok(Done { moment, note })
            }
            Fault::KeeperFrozen => {
                let began = Instant::now();
                self.fleet.postgres_bot_mut(primary)?.bot.freeze()?;
                let note = self.taken_over(primary, writers).await;
                tokio::time::sleep(KEEPER_FROZEN.saturating_sub(began.elapsed())).await;
                self.fleet.postgres_bot_mut(primary)?.bot.thaw()?;
                tokio::time::sleep(TWO_PRIMARIES_WATCHED).await;
                Ok(Done { moment, note: note? })
            }
            Fault::NodeFrozen => self.freeze_node(primary, writers).await,
            Fault::EtcdDown | Fault::EtcdDownFailsafe | Fault::EtcdDownFailsafeTwo => {
                self.take_etcd_away(fault, primary, writers).await
            }
        }
    }

    async fn freeze_node(&mut self, primary: &str, writers: &Writers) -> Result<Done> {
        let (began, moment) = (Instant::now(), writers.now());
        let frozen = self.fleet.postgres_bot_mut(primary)?.freeze_node()?;
        let note = self.taken_over(primary, writers).await;
        tokio::time::sleep(NODE_FROZEN.saturating_sub(began.elapsed())).await;
        // The server first, which is the worst that can be.
        frozen.iter().rev().for_each(|pid| signal_pid(*pid, Signal::CONT));
        tokio::time::sleep(TWO_PRIMARIES_WATCHED).await;
        Ok(Done { moment, note: note? })
    }

    async fn take_etcd_away(&mut self, fault: Fault, primary: &str, writers: &Writers) -> Result<Done> {
        let moment = writers.now();
        if fault == Fault::EtcdDownFailsafeTwo {
            let mut replicas = self.fleet.postgres.iter_mut().filter(|member| member.bot.name != primary);
            replicas.next().context("there is a replica")?.kill_node();
        }
        self.fleet.etcd.kill_member(0);
        tokio::time::sleep(ETCD_DOWN).await;
        self.fleet.etcd.start_member(0)?;
        let back = writers.now();
        writers.acknowledged_by(None, back, DEADLINE).await?;
        let note = format!("writable again {} ms after etcd, or all the time", millis(writers.now() - back));
        // Who gives up only when it hears of etcd again has given up, too.
        tokio::time::sleep(TWO_PRIMARIES_WATCHED).await;
        Ok(Done { moment, note })
    }

    /// Makes the cluster's configuration say what a row needs, and waits until it is in force.
    async fn set(&mut self, settings: Settings) -> Result<()> {
        if self.settings == settings {
            return Ok(());
        }
        let primary = self.settled().await?;
        let member = self.fleet.postgres_bot(&primary)?;
        let url = format!("{}/config", member.bot.api_url);
        let patch = settings.patch().to_string();
        let answer = Http::new().send(Method::PATCH, &url, Some("application/json"), patch.into()).await?;
        ensure!(answer.status == 200, "{url} answers {}: {}", answer.status, answer.text.trim());
        self.settings = settings;
        let login = self.fleet.superuser().at(member.port);
        let synchronous = "SELECT (current_setting('synchronous_standby_names') <> '')::text || ' ' || \
                           (SELECT count(*) > 0 FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum'))::text";
        until(&format!("{}: {settings:?} in force", self.tool), SETTINGS_DEADLINE, || async {
            let now = self.fleet.store.look(MAIN).await?;
            let said = login.ask(synchronous).await.map_err(|error| format!("{error:#}"))?;
            let named = now.synchronous();
            let failsafe = now.value("failsafe").map_or(0, |members| members.matches("/patroni").count());
            let synchronous = settings.synchronous.map_or(said == "false false", |_| said == "true true" && named);
            if synchronous && (!settings.failsafe || failsafe == MEMBERS) {
                return Ok(());
            }
            Err(format!("synchronous: {said}, {:?}; failsafe: {:?}", now.value("sync"), now.value("failsafe")))
        })
        .await
    }

    async fn kill_server(&self, primary: &str, writers: &Writers) -> Result<Done> {
        let member = self.fleet.postgres_bot(primary)?;
        let moment = writers.now();
        let old = member.crash_postmaster()?;
        let note = until("a server takes the place of the killed one", DEADLINE, || async {
            if member.postmaster().is_some_and(|pid| pid != old) {
                return Ok(format!("{primary} came back in place"));
            }
            let now = self.fleet.store.look(MAIN).await?;
            match now.leader() {
                Some(leader) if leader != primary => Ok(format!("{leader} leads in place of {primary}")),
                Some(_) | None => Err(now.summary()),
            }
        })
        .await?;
        writers.acknowledged_by(None, writers.now(), DEADLINE).await?;
        Ok(Done { moment, note })
    }

    /// Asks until the tool agrees: right after a recovery it may not be ready to.
    async fn switch_over(&self, primary: &str, writers: &Writers) -> Result<Done> {
        let began = Instant::now();
        loop {
            let moment = writers.now();
            let said = self.ask_to_switch_over(primary).await?;
            if self.fleet.store.look(MAIN).await.is_ok_and(|now| now.leader() != Some(primary)) {
                return Ok(Done { moment, note: self.taken_over(primary, writers).await? });
            }
            if began.elapsed() > DEADLINE {
                bail!("no switchover within {DEADLINE:?}; said last: {said}");
            }
        }
    }

    async fn ask_to_switch_over(&self, primary: &str) -> Result<String> {
        let (config, logs) = (&self.fleet.postgres_bot(primary)?.bot.config, self.fleet.logs());
        let done = match &self.patronictl {
            Some(patronictl) if self.tool.is_patroni() => {
                let config = config.to_string_lossy();
                let args = ["-c", &config, "switchover", MAIN, "--leader", primary, "--force"];
                Program::new("patronictl", patronictl).args(args).run(logs, DEADLINE).await?
            }
            Some(_) | None => self.fleet.botctl(["switchover", MAIN, "--force"]).await?,
        };
        Ok(done.stdout + &done.stderr)
    }

    /// Waits until another leads and has acknowledged a write.
    async fn taken_over(&self, old: &str, writers: &Writers) -> Result<String> {
        let leader = until(&format!("{}: another leader than {old}", self.tool), DEADLINE, || async {
            let now = self.fleet.store.look(MAIN).await?;
            now.leader().filter(|leader| *leader != old).map(str::to_owned).ok_or_else(|| now.summary())
        })
        .await?;
        let port = self.fleet.postgres_bot(&leader)?.port;
        writers.acknowledged_by(Some(port), Duration::ZERO, DEADLINE).await?;
        Ok(format!("{leader} leads in place of {old}"))
    }
}
