//! An etcd cluster: on loopback, or each member at a place of its own.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    free_port,
    ground::Site,
    http::Http,
    process::{Process, Program, system_binary},
    scratch::Scratch,
};

/// Members of etcd under one scratch folder.
#[derive(Debug)]
pub struct EtcdCluster {
    members: Vec<EtcdMember>,
    logs: PathBuf,
}

#[derive(Debug)]
struct EtcdMember {
    program: Program,
    /// Where clients reach it, as `host:port`.
    endpoint: String,
    process: Option<Process>,
}

impl EtcdCluster {
    /// Starts a member at each of these sites.
    ///
    /// # Errors
    /// If etcd is not installed or cannot be started.
    pub fn start(scratch: &Scratch, logs: &Path, sites: &[Site]) -> Result<Self> {
        let binary = system_binary("etcd", &[])?;
        let address = |site: &Site| -> Result<String> { Ok(format!("{}:{}", site.host, free_port()?)) };
        let addresses = sites.iter().map(|site| Ok((address(site)?, address(site)?))).collect::<Result<Vec<_>>>()?;
        let peers = addresses.iter().enumerate().map(|(i, (_, peer))| format!("{}=http://{peer}", member_name(i)));
        let peers = peers.collect::<Vec<_>>().join(",");
        let token = scratch.path().file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let mut cluster = Self { members: Vec::new(), logs: logs.to_owned() };
        for (i, ((endpoint, peer), site)) in addresses.into_iter().zip(sites).enumerate() {
            let name = member_name(i);
            let data = scratch.path().join(&name);
            let (client, peer) = (format!("http://{endpoint}"), format!("http://{peer}"));
            let program = Program::new(&name, &binary).at(site).args([
                format!("--name={name}"),
                format!("--data-dir={}", data.display()),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster={peers}"),
                format!("--initial-cluster-token={token}"),
                String::from("--logger=zap"),
                String::from("--log-level=warn"),
            ]);
            cluster.members.push(EtcdMember { program, endpoint, process: None });
        }
        (0..sites.len()).try_for_each(|i| cluster.start_member(i))?;
        Ok(cluster)
    }

    /// The clients' addresses, as `host:port`.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| member.endpoint.clone()).collect()
    }

    /// The clients' addresses in one line, as the bots' configurations and botctl take them.
    #[must_use]
    pub fn hosts(&self) -> String {
        self.endpoints().join(",")
    }

    /// The index of the member that leads the others.
    ///
    /// # Errors
    /// If none of them says that it does.
    pub async fn leader(&self) -> Result<usize> {
        let http = Http::new();
        for (index, member) in self.members.iter().enumerate().filter(|(_, member)| member.process.is_some()) {
            let url = format!("http://{}/v3/maintenance/status", member.endpoint);
            let answer = http
                .send(hyper::Method::POST, &url, None, "{}".into())
                .await
                .context("ask a member of etcd for its status")?;
            let status: Value = serde_json::from_str(&answer.text).context("the status of a member of etcd")?;
            if status["leader"].is_string() && status["leader"] == status["header"]["member_id"] {
                return Ok(index);
            }
        }
        bail!("no member of etcd leads")
    }

    /// Starts a member, again if it was killed.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_member(&mut self, index: usize) -> Result<()> {
        let member = self.members.get_mut(index).context("there is no such member of etcd")?;
        member.process = Some(member.program.start(&self.logs)?);
        Ok(())
    }

    /// Kills a member.
    pub fn kill_member(&mut self, index: usize) {
        if let Some(member) = self.members.get_mut(index) {
            member.process = None;
        }
    }

    /// Freezes every member: connections stay open, nothing answers.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Freezes one member: the others elect another leader if it was theirs, and whoever is connected to it waits.
    pub fn freeze_member(&self, index: usize) {
        if let Some(process) = self.members.get(index).and_then(|member| member.process.as_ref()) {
            process.signal(Signal::STOP);
        }
    }

    /// Lets every member go on.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// The processes of the members that run.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        self.members.iter().filter_map(|member| member.process.as_ref().map(Process::pid)).collect()
    }

    /// Kills all members: the last leader of a cluster that ends would look for a successor for seconds, and nothing of
    /// theirs is needed any more.
    pub fn stop(&mut self) {
        self.members.iter_mut().for_each(|member| member.process = None);
    }

    fn signal(&self, signal: Signal) {
        for process in self.members.iter().filter_map(|m| m.process.as_ref()) {
            process.signal(signal);
        }
    }
}

/// What a member is called.
#[must_use]
pub fn member_name(index: usize) -> String {
    format!("etcd-{}", index + 1)
}
