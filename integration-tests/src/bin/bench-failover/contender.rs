//! One of those that are compared: a Postgres cluster of three with its keepers and its own etcd, and what it costs idle. What
//! is done to it is in the module of the faults.

use std::{
    fmt,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use fleet::{
    Fleet,
    bots::{Keeper, PostgresBot},
    fleet::MAIN,
    http::Http,
    patroni::Patroni,
    scratch::kill_processes_below,
    usage::{TICKS_PER_SECOND, cpu_ticks, pss_kib, round},
    wait::until,
};
use serde::{Deserialize, Serialize};

use crate::{report::Idle, rows::Settings};

/// Members of every cluster: the least that keeps a replica when one is lost.
pub(crate) const MEMBERS: usize = 3;

/// No recovery takes this long unless something is wrong: three of the longest leases.
pub(crate) const DEADLINE: Duration = Duration::from_secs(90);

/// Between two looks at whether a cluster has settled: the looks open connections, and are not to be load.
const SETTLED_LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// A replica that is less behind than this while the client writes has caught up.
const BEHIND_BYTES_MAX: u32 = 64 * 1024;

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Tool {
    /// postgres-bot at its lease of 5 s
    Bot,
    /// postgres-bot at the shortest lease that etcd grants, 2 s
    BotFast,
    /// postgres-bot at Patroni's lease of 30 s
    BotSlow,
    /// Patroni as it comes: ttl 30, loop_wait 10, retry_timeout 10
    Patroni,
    /// Patroni at its fastest: ttl 20, loop_wait 1, retry_timeout 3
    PatroniFast,
}

/// A cluster with its keepers.
pub(crate) struct Contender {
    pub(crate) tool: Tool,
    pub(crate) patronictl: Option<PathBuf>,
    pub(crate) fleet: Fleet,
    /// What its configuration has been made to say last.
    pub(crate) settings: Settings,
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
            Self::BotFast => 2,
            Self::PatroniFast => 20,
            Self::BotSlow | Self::Patroni => 30,
        }
    }

    pub(crate) const fn is_patroni(self) -> bool {
        matches!(self, Self::PatroniFast | Self::Patroni)
    }

    fn keeper(self, patroni: Option<&Patroni>) -> Result<Keeper> {
        let (loop_wait_s, retry_timeout_s) = match self {
            Self::Bot | Self::BotFast | Self::BotSlow => return Ok(Keeper::Bot),
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
            Self::Bot => "ours, ttl 5",
            Self::BotFast => "ours, ttl 2",
            Self::BotSlow => "ours, ttl 30",
            Self::Patroni => "Patroni 30/10/10",
            Self::PatroniFast => "Patroni 20/1/3",
        })
    }
}

impl Contender {
    /// Starts the cluster, and does not wait for it.
    pub(crate) async fn start(tool: Tool, patroni: Option<&Patroni>, keep: bool) -> Result<Self> {
        let keeper = tool.keeper(patroni)?;
        let mut fleet = Fleet::with_etcd(1).await?;
        if keep {
            fleet.scratch.keep();
            fleet.step_logs = true;
        }
        fleet.ttl_s = tool.ttl_s();
        let mut contender =
            Self { tool, patronictl: patroni.map(Patroni::patronictl), fleet, settings: Settings::default() };
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
            etcd_requests_per_minute: round((now.etcd_requests - before.etcd_requests) as f64 / minutes),
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
