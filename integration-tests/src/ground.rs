//! What nodes stand on: all on loopback and on one disk, or each with an address and a disk of its own. Which of it a machine
//! does not give is known, and said.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{disk::Disk, network::Network};

/// Where one node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// Its address.
    pub host: String,
    /// Who may log in to its server, as Postgres's rules write it.
    pub neighbours: String,
    /// The network namespace that its processes are in.
    pub namespace: Option<PathBuf>,
    /// The control group that its processes are in.
    pub group: Option<PathBuf>,
}

/// The networks and disks of a run.
#[derive(Debug, Default)]
pub struct Ground {
    network: Option<Network>,
    /// By the node's name.
    disks: BTreeMap<String, Disk>,
    has_disks: bool,
    missing: Vec<String>,
}

impl Default for Site {
    fn default() -> Self {
        let (host, neighbours) = (String::from("127.0.0.1"), String::from("127.0.0.1/32"));
        Self { host, neighbours, namespace: None, group: None }
    }
}

impl Site {
    /// Whether others can reach it.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        *self.host == *"127.0.0.1"
    }
}

impl Ground {
    /// Every node with an address and a disk of its own, as far as this machine and this user can.
    #[must_use]
    pub fn of_its_own() -> Self {
        let mut missing = Vec::new();
        let network = Network::new().inspect_err(|why| missing.push(format!("no network of its own: {why:#}"))).ok();
        Self { network, disks: BTreeMap::new(), has_disks: true, missing }
    }

    /// What this machine does not give, one line each.
    #[must_use]
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// Makes the place of a node; its files will be below `folder`, and an image of them beside it, if it has any.
    ///
    /// # Errors
    /// If its address cannot be made.
    pub fn add(&mut self, name: &str, folder: Option<&Path>) -> Result<Site> {
        let mut site = Site::default();
        if let Some(network) = &mut self.network {
            let (host, namespace) = network.add(name).with_context(|| format!("make a network for {name}"))?;
            site = Site { host, neighbours: network.subnet(), namespace: Some(namespace), ..site };
        }
        if let Some(folder) = folder.filter(|_| self.has_disks) {
            match Disk::mount(&folder.with_extension("disk"), folder) {
                Ok(disk) => {
                    site.group = disk.group().map(Path::to_path_buf);
                    if site.group.is_none() {
                        self.miss(String::from("no slow disks: there is no block-I/O controller of version 1"));
                    }
                    self.disks.insert(name.to_owned(), disk);
                }
                Err(why) => {
                    self.has_disks = false;
                    self.miss(format!("no disks of their own: {why:#}"));
                }
            }
        }
        Ok(site)
    }

    /// The network, if nodes have one.
    #[must_use]
    pub const fn network(&self) -> Option<&Network> {
        self.network.as_ref()
    }

    /// A node's disk, if it has one.
    #[must_use]
    pub fn disk(&self, name: &str) -> Option<&Disk> {
        self.disks.get(name)
    }

    /// Mends all networks and disks: processes that wait for a stalled disk cannot even be killed.
    pub fn heal(&self) {
        self.network.iter().for_each(Network::heal);
        self.disks.values().for_each(Disk::heal);
    }

    fn miss(&mut self, what: String) {
        if !self.missing.contains(&what) {
            self.missing.push(what);
        }
    }
}
