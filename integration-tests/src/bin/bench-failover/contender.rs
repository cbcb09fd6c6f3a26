//! One of those that are compared: a Postgres cluster of three with its keepers and its own etcd, the faults that are done
//! to it, and what they cost its client.

use std::{
    fmt,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use fleet::{
    Fleet,
    bots::{Keeper, PostgresBot},
    fleet::MAIN,
    http::Http,
    patroni::Patroni,
    process::Program,
    scratch::kill_processes_below,
    usage::{TICKS_PER_SECOND, cpu_ticks, pss_kib, round},
    wait::{millis, until},
    writers::{Writers, longest_gap, lost, two_writable, two_writable_to_the_end},
};
use serde::Serialize;

use crate::report::{Idle, Round};

/// Members of every cluster: the least that keeps a replica when one is lost.
const MEMBERS: usize = 3;

/// No recovery takes this long unless something is wrong: three of the longest leases.
const DEADLINE: Duration = Duration::from_secs(90);

/// The client writes this long before a fault, so that the fault is what ends its writing.
const STEADY: Duration = Duration::from_millis(500);

/// Between two looks at whether a cluster has settled: the looks open connections, and are not to be load.
const SETTLED_LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// A replica that is less behind than this while the client writes has caught up.
const BEHIND_BYTES_MAX: u32 = 64 * 1024;

/// How long two primaries are watched from when the second one writes: who has not stopped by then does not stop.
const TWO_PRIMARIES_WATCHED: Duration = Duration::from_secs(10);

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Tool {
    /// postgres-bot at its lease of 5 s
    Bot,
    /// postgres-bot at Patroni's lease of 30 s
    BotSlow,
    /// Patroni at its fastest: ttl 20, loop_wait 1, retry_timeout 3
    PatroniFast,
    /// Patroni as it comes: ttl 30, loop_wait 10, retry_timeout 10
    Patroni,
}

/// What is done to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Fault {
    /// The primary's postmaster is killed
    ServerKilled,
    /// An operator asks for another primary
    Switchover,
    /// The primary's keeper and all processes of its Postgres are killed at once
    NodeLost,
    /// The primary's keeper alone is killed, and not started again
    KeeperKilled,
}

/// A cluster with its keepers.
pub(crate) struct Contender {
    pub(crate) tool: Tool,
    patronictl: Option<PathBuf>,
    fleet: Fleet,
}

/// What the keepers have used so far.
pub(crate) struct Used {
    at: Instant,
    ticks: Vec<u64>,
    etcd_requests: u64,
}

impl Tool {
    /// Its lease, in seconds.
    const fn ttl_s(self) -> u64 {
        match self {
            Self::Bot => 5,
            Self::PatroniFast => 20,
            Self::BotSlow | Self::Patroni => 30,
        }
    }

    pub(crate) const fn is_patroni(self) -> bool {
        matches!(self, Self::PatroniFast | Self::Patroni)
    }

    fn keeper(self, patroni: Option<&Patroni>) -> Result<Keeper> {
        let (loop_wait_s, retry_timeout_s) = match self {
            Self::Bot | Self::BotSlow => return Ok(Keeper::Bot),
            Self::PatroniFast => (1, 3),
            Self::Patroni => (10, 10),
        };
        let binary = patroni.context("Patroni is not installed")?.binary();
        Ok(Keeper::Patroni { binary, loop_wait_s, retry_timeout_s })
    }
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Bot => "postgres-bot, ttl 5",
            Self::BotSlow => "postgres-bot, ttl 30",
            Self::PatroniFast => "Patroni, ttl 20, loop 1",
            Self::Patroni => "Patroni, ttl 30, loop 10",
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ServerKilled => "postmaster killed",
            Self::Switchover => "switchover",
            Self::NodeLost => "node lost",
            Self::KeeperKilled => "bot killed",
        })
    }
}

impl Fault {
    /// Whether a lease has to run out first. Nearly all of that time is waiting, so the clusters can wait together.
    pub(crate) const fn waits_for_lease(self) -> bool {
        matches!(self, Self::NodeLost | Self::KeeperKilled)
    }
}

impl Contender {
    /// Starts the cluster, and does not wait for it.
    pub(crate) async fn start(tool: Tool, patroni: Option<&Patroni>, keep: bool) -> Result<Self> {
        let keeper = tool.keeper(patroni)?;
        let mut fleet = Fleet::with_etcd(1).await?;
        if keep {
            fleet.scratch.keep();
        }
        fleet.ttl_s = tool.ttl_s();
        let mut contender = Self { tool, patronictl: patroni.map(Patroni::patronictl), fleet };
        contender.fleet.add_postgres_kept_by(&keeper, MEMBERS)?;
        Ok(contender)
    }

    /// Waits until one member is primary, all others stream from it and have caught up, and their keepers say so in
    /// etcd; yields the primary's name. Asks the servers themselves, so that all tools are measured alike.
    pub(crate) async fn settled(&self) -> Result<String> {
        until(&format!("{}: a primary and {} replicas", self.tool, MEMBERS - 1), DEADLINE, || async {
            let looked = self.look().await;
            if looked.is_err() {
                tokio::time::sleep(SETTLED_LOOK_INTERVAL).await;
            }
            looked
        })
        .await
    }

    async fn look(&self) -> Result<String, String> {
        let now = self.fleet.store.look(MAIN).await?;
        let primary = now.primary().ok_or_else(|| now.summary())?;
        if now.streaming().len() + 1 < MEMBERS {
            return Err(now.summary());
        }
        let streaming = format!(
            "SELECT count(DISTINCT application_name) FROM pg_stat_replication WHERE state = 'streaming' AND application_name \
             LIKE 'pg-%' AND pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn) < {BEHIND_BYTES_MAX}"
        );
        for member in &self.fleet.postgres {
            let login = self.fleet.superuser().at(member.port);
            let (query, wanted) = if member.bot.name == primary {
                (streaming.as_str(), (MEMBERS - 1).to_string())
            } else {
                ("SELECT pg_is_in_recovery()", String::from("t"))
            };
            let said = login.ask(query).await.map_err(|error| format!("{}: {error:#}", member.bot.name))?;
            if said != wanted {
                return Err(format!("{} leads; {} answers {said}, not {wanted}", primary, member.bot.name));
            }
        }
        Ok(primary.to_owned())
    }

    /// Does something to the cluster while a client writes, waits until all is well again, and counts.
    pub(crate) async fn suffer(&mut self, fault: Fault, delay: Duration) -> Result<Round> {
        tokio::time::sleep(delay).await;
        let primary = self.settled().await?;
        if !fault.waits_for_lease() {
            // A server that recovers makes all its files durable first: what other clusters have left to the disk just
            // now would be in its figures. Where leases run out, that is nothing, and would hold up the neighbours.
            tokio::task::spawn_blocking(rustix::fs::sync).await.context("flush the disks")?;
        }
        let writers = Writers::start(&self.fleet.superuser(), DEADLINE).await?;
        tokio::time::sleep(STEADY).await;
        let (moment, note) = match fault {
            Fault::ServerKilled => self.kill_server(&primary, &writers).await?,
            Fault::Switchover => self.switch_over(&primary, &writers).await?,
            Fault::NodeLost => {
                let moment = writers.now();
                self.fleet.postgres_bot_mut(&primary)?.kill_node();
                (moment, self.taken_over(&primary, &writers).await?)
            }
            Fault::KeeperKilled => {
                let moment = writers.now();
                self.fleet.postgres_bot_mut(&primary)?.bot.kill();
                let note = self.taken_over(&primary, &writers).await?;
                tokio::time::sleep(TWO_PRIMARIES_WATCHED).await;
                (moment, note)
            }
        };
        let end = writers.now();
        self.start_missing()?;
        self.settled().await?;
        let writes = writers.finish().await?;
        // What happens when a killed keeper is started again is not part of what its death costs.
        let seen = &writes[..writes.partition_point(|write| write.at <= end)];
        Ok(Round {
            gap_ms: millis(longest_gap(if fault == Fault::KeeperKilled { seen } else { &writes }, moment)),
            acknowledged: writes.len(),
            lost: lost(&self.fleet.superuser(), &writes).await?,
            two_primaries_ms: millis(two_writable(seen)),
            two_primaries_went_on: fault == Fault::KeeperKilled && two_writable_to_the_end(seen, end),
            note,
        })
    }

    async fn kill_server(&self, primary: &str, writers: &Writers) -> Result<(Duration, String)> {
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
        Ok((moment, note))
    }

    /// Asks until the tool agrees: right after a recovery it may not be ready to.
    async fn switch_over(&self, primary: &str, writers: &Writers) -> Result<(Duration, String)> {
        let began = Instant::now();
        loop {
            let moment = writers.now();
            let said = self.ask_to_switch_over(primary).await?;
            if self.fleet.store.look(MAIN).await.is_ok_and(|now| now.leader() != Some(primary)) {
                return Ok((moment, self.taken_over(primary, writers).await?));
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

    /// Starts the keepers that do not run.
    pub(crate) fn start_missing(&mut self) -> Result<()> {
        for member in &mut self.fleet.postgres {
            if !member.bot.is_running() {
                member.bot.start()?;
            }
        }
        Ok(())
    }

    /// What the keepers have used so far.
    pub(crate) async fn used(&mut self) -> Result<Used> {
        let mut ticks = Vec::new();
        for member in &mut self.fleet.postgres {
            for pid in member.keeper_processes()? {
                ticks.push(cpu_ticks(pid)?);
            }
        }
        Ok(Used { at: Instant::now(), ticks, etcd_requests: self.etcd_requests().await? })
    }

    /// What a keeper has used since `before`, on average.
    pub(crate) async fn idle_since(&mut self, before: &Used) -> Result<Idle> {
        let now = self.used().await?;
        let minutes = (now.at - before.at).as_secs_f64() / 60.0;
        let mut pss = 0;
        for member in &mut self.fleet.postgres {
            for pid in member.keeper_processes()? {
                pss += pss_kib(pid)?;
            }
        }
        let each = |total: f64| round(total / MEMBERS as f64);
        let ticks = now.ticks.iter().sum::<u64>() - before.ticks.iter().sum::<u64>();
        Ok(Idle {
            tool: self.tool,
            pss_mib: each(pss as f64 / 1_024.0),
            cpu_seconds_per_minute: each(ticks as f64 / TICKS_PER_SECOND / minutes),
            etcd_requests_per_minute: each((now.etcd_requests - before.etcd_requests) as f64 / minutes),
        })
    }

    /// Every message that etcd has received from clients, also within a stream. Patroni's come through etcd's gateway,
    /// which hands them on in the same form.
    async fn etcd_requests(&self) -> Result<u64> {
        let mut total = 0;
        for endpoint in self.fleet.etcd.endpoints() {
            let metrics = Http::new().page(&format!("http://{endpoint}/metrics")).await?.text;
            let counted = metrics.lines().filter(|line| line.starts_with("grpc_server_msg_received_total"));
            total += counted.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum::<f64>() as u64;
        }
        Ok(total)
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        // Nothing of theirs is needed any more: twelve orderly shutdowns would take half a minute.
        self.fleet.postgres.iter_mut().for_each(PostgresBot::kill_node);
        kill_processes_below(self.fleet.scratch.path());
    }
}
