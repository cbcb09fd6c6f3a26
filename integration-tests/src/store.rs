//! The store seen from outside: what the bots of a scope say of themselves.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use bots_core::{
    dcs::{Outcome, Revision, Scope, Transaction, Write},
    leadership::generation,
    shell::{Etcd, config},
    wire::{ContentRevision, EdgeFacts, FailoverRequest, Member, PostgresFacts, WebFacts},
};

/// The namespace of every fleet here.
pub const NAMESPACE: &str = "service";

/// A client of the fleet's etcd.
#[derive(Clone)]
pub struct Store {
    etcd: Etcd,
}

/// A web bot that serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serving {
    /// Its name.
    pub name: String,
    /// Where clients reach it.
    pub url: String,
    /// The commit that it serves.
    pub sha: String,
}

/// All keys of a scope at one moment.
#[derive(Debug, Clone, Default)]
pub struct ScopeNow {
    keys: BTreeMap<String, String>,
    /// The generation of the leader.
    generation: Option<Revision>,
    members: BTreeMap<String, Member>,
}

impl Serving {
    /// The address of its first page.
    #[must_use]
    pub fn page(&self) -> String {
        format!("{}/", self.url.trim_end_matches('/'))
    }
}

impl Store {
    /// A client of the etcd at `hosts`.
    ///
    /// # Errors
    /// If the addresses cannot be read.
    pub fn new(hosts: &str) -> Result<Self> {
        Self::of(&config::Etcd::from_hosts(hosts))
    }

    /// A client of an etcd that asks for more than its address.
    ///
    /// # Errors
    /// If the addresses or the files cannot be read.
    pub fn of(access: &config::Etcd) -> Result<Self> {
        let etcd = Etcd::new(access).context("read the addresses of etcd")?;
        Ok(Self { etcd })
    }

    /// The keys of a scope.
    ///
    /// # Errors
    /// If etcd does not answer.
    pub async fn scope(&self, name: &str) -> Result<ScopeNow> {
        let scope = scope(name)?;
        let (_, entries) = self.etcd.list(&scope.prefix()).await.context("list a scope")?;
        let mut now = ScopeNow::default();
        for entry in entries {
            let Some(rest) = scope.strip(&entry.key) else { continue };
            if let (Some(member), Some(state)) = (rest.strip_prefix("members/"), Member::from_json(&entry.value)) {
                now.members.insert(member.to_owned(), state);
            }
            if rest == "leader" {
                now.generation = Some(generation(&entry));
            }
            now.keys.insert(rest.to_owned(), entry.value);
        }
        Ok(now)
    }

    /// The keys of a scope, for a look of [`crate::wait::until`].
    ///
    /// # Errors
    /// One line, if etcd does not answer.
    pub async fn look(&self, name: &str) -> Result<ScopeNow, String> {
        self.scope(name).await.map_err(|error| format!("{error:#}"))
    }

    /// Writes a key of a scope, whatever it holds.
    ///
    /// # Errors
    /// If etcd does not take it.
    pub async fn put(&self, scope_name: &str, rest: &str, value: &str) -> Result<()> {
        self.write(vec![Write::put(scope(scope_name)?.key(rest), value)]).await?;
        Ok(())
    }

    /// Writes keys, all at once, whatever they hold.
    ///
    /// # Errors
    /// If etcd does not take it.
    pub async fn write(&self, writes: Vec<Write>) -> Result<Revision> {
        match self.etcd.transact(&Transaction::new(Vec::new(), writes)).await {
            Outcome::Done(revision) => Ok(revision),
            Outcome::Refused { .. } => bail!("a write without conditions was refused"),
            Outcome::Unknown(why) => bail!("write to etcd: {why}"),
        }
    }
}

impl ScopeNow {
    /// A key's value, by what follows the scope's prefix.
    #[must_use]
    pub fn value(&self, rest: &str) -> Option<&str> {
        self.keys.get(rest).map(String::as_str)
    }

    /// The keys below `rest`, without it.
    pub fn below<'s>(&'s self, rest: &'s str) -> impl Iterator<Item = (&'s str, &'s str)> {
        self.keys.iter().filter_map(move |(k, v)| k.strip_prefix(rest).map(|k| (k, v.as_str())))
    }

    /// Who leads.
    #[must_use]
    pub fn leader(&self) -> Option<&str> {
        self.value("leader")
    }

    /// The generation of who leads.
    #[must_use]
    pub const fn generation(&self) -> Option<Revision> {
        self.generation
    }

    /// Who lives.
    #[must_use]
    pub const fn members(&self) -> &BTreeMap<String, Member> {
        &self.members
    }

    /// A Postgres member's facts.
    #[must_use]
    pub fn postgres(&self, name: &str) -> Option<PostgresFacts> {
        self.members.get(name)?.facts()
    }

    /// A web member's facts.
    #[must_use]
    pub fn web(&self, name: &str) -> Option<WebFacts> {
        self.members.get(name)?.facts()
    }

    /// An edge member's facts.
    #[must_use]
    pub fn edge(&self, name: &str) -> Option<EdgeFacts> {
        self.members.get(name)?.facts()
    }

    /// The Postgres member that leads and says that it is primary.
    #[must_use]
    pub fn primary(&self) -> Option<&str> {
        let leader = self.leader()?;
        let head = &self.members.get(leader)?.head;
        (head.role == "primary" && head.state == "running").then_some(leader)
    }

    /// The Postgres members that stream.
    #[must_use]
    pub fn streaming(&self) -> Vec<&str> {
        let streams =
            |name: &str| self.postgres(name).and_then(|f| f.replication_state).as_deref() == Some("streaming");
        self.members.keys().map(String::as_str).filter(|name| Some(*name) != self.leader() && streams(name)).collect()
    }

    /// Whether the cluster's commits wait for somebody, as its `sync` key says.
    #[must_use]
    pub fn synchronous(&self) -> bool {
        let sync = self.value("sync").and_then(|sync| serde_json::from_str::<serde_json::Value>(sync).ok());
        sync.is_some_and(|sync| sync["sync_standby"].as_str().is_some_and(|names| !names.is_empty()))
    }

    /// Whether an operator's request stands.
    #[must_use]
    pub fn switchover_pending(&self) -> bool {
        let request = self.value("failover").and_then(|v| serde_json::from_str::<FailoverRequest>(v).ok());
        request.is_some_and(|r| !r.is_empty())
    }

    /// The web members that serve.
    #[must_use]
    pub fn serving(&self) -> Vec<Serving> {
        let facts = |(name, member): (&String, &Member)| {
            let facts = member.facts::<WebFacts>().filter(|_| member.head.state == "serving")?;
            Some(Serving { name: name.clone(), url: facts.url, sha: facts.serving? })
        };
        self.members.iter().filter_map(facts).collect()
    }

    /// The published revision.
    #[must_use]
    pub fn live(&self) -> Option<ContentRevision> {
        serde_json::from_str(self.value("revision/live")?).ok()
    }

    /// One line: who is what. For messages.
    #[must_use]
    pub fn summary(&self) -> String {
        let one = |(name, m): (&String, &Member)| {
            let replication = m.facts::<PostgresFacts>().and_then(|f| f.replication_state).unwrap_or_default();
            format!("{name} {} {} {replication}", m.head.role, m.head.state).trim_end().to_owned()
        };
        let members = self.members.iter().map(one).collect::<Vec<_>>().join(", ");
        format!("leader {}; {members}", self.leader().unwrap_or("none"))
    }
}

/// A scope of the fleet.
///
/// # Errors
/// If the name cannot be a scope's.
pub fn scope(name: &str) -> Result<Scope> {
    Scope::new(NAMESPACE, name).with_context(|| format!("use the scope {name}"))
}
