//! A network of the run's own: every node in a network namespace, all joined by a bridge in one more, so that the way from any
//! of them to any other can be cut or made lossy. The harness itself reaches all of them all the time. It needs root, `ip`,
//! `nft`, and a kernel with network namespaces and nftables for bridges. All that the machine itself sees of it is one
//! interface with one address; its own rules and routes stay as they are.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::process::{run_now, system_binary};

/// Where `ip` keeps its namespaces.
const NAMESPACES: &str = "/run/netns";

/// So many of a hundred packets are lost on a lossy way: enough that every connection suffers, and few enough that TCP gets
/// through within seconds.
const LOSS_PERCENT: u8 = 30;

/// Subnets are tried from here on: 10.201.0.0/24, and so on.
const FIRST_SUBNET: u32 = 201;

/// The namespace of the bridge and of the rules that cut.
const SWITCH: &str = "switch";
const BRIDGE: &str = "bridge0";
const TABLE: &str = "ways";

/// The namespaces, the bridge, and the rules that cut. All are gone when dropped.
#[derive(Debug)]
pub struct Network {
    /// The first three numbers of every address.
    prefix: String,
    /// Tells what is ours from other runs': our process id.
    id: u32,
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Node {
    name: String,
    address: String,
}

/// From one node to another, by their names. The way back is another way.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Way {
    /// Who sends.
    pub from: String,
    /// Who does not get it.
    pub to: String,
}

impl Network {
    /// A bridge without nodes. What a killed run has left is removed.
    ///
    /// # Errors
    /// If this is not root's run, or the kernel or a program is missing something.
    pub fn new() -> Result<Self> {
        ensure!(rustix::process::getuid().is_root(), "only root can make network namespaces");
        system_binary("ip", &[]).context("package iproute2")?;
        system_binary("nft", &[]).context("package nftables")?;
        remove_left_over();
        let id = std::process::id();
        let taken = run_now("ip", &["-o", "-4", "addr"])?;
        let prefixes = (0..50).map(|n| format!("10.{}.{}", FIRST_SUBNET + (id + n) % 50, id / 50 % 250));
        let prefix = { prefixes }.find(|prefix| !taken.contains(&format!(" {prefix}."))).context("a free subnet")?;
        let network = Self { prefix, id, nodes: Vec::new() };
        let (switch, host, port) = (network.namespace(SWITCH), format!("b{id}h"), format!("b{id}s"));
        run_now("ip", &["netns", "add", &switch])?;
        run_now("ip", &["-n", &switch, "link", "add", BRIDGE, "type", "bridge"])?;
        run_now("ip", &["-n", &switch, "link", "set", BRIDGE, "up"])?;
        run_now("ip", &["link", "add", &host, "type", "veth", "peer", "name", &port, "netns", &switch])?;
        run_now("ip", &["-n", &switch, "link", "set", &port, "master", BRIDGE, "up"])?;
        run_now("ip", &["addr", "add", &format!("{}.1/24", network.prefix), "dev", &host])?;
        run_now("ip", &["link", "set", &host, "up"])?;
        let rules = format!(
            "table bridge {TABLE} {{
               set cut {{ type ipv4_addr . ipv4_addr; }}
               set lossy {{ type ipv4_addr . ipv4_addr; }}
               chain forward {{
                 type filter hook forward priority 0; policy accept;
                 ip saddr . ip daddr @cut drop
                 ip saddr . ip daddr @lossy numgen random mod 100 < {LOSS_PERCENT} drop
               }}
             }}"
        );
        network.nft(&[&rules]).context("rules for a bridge")?;
        Ok(network)
    }

    /// All addresses, as Postgres's rules write them.
    #[must_use]
    pub fn subnet(&self) -> String {
        format!("{}.0/24", self.prefix)
    }

    /// Makes a node's namespace; yields its address and where the namespace is.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn add(&mut self, name: &str) -> Result<(String, PathBuf)> {
        let number = self.nodes.len() + 2;
        ensure!(number < 250, "a subnet has room for no more nodes");
        let (namespace, address) = (self.namespace(name), format!("{}.{number}", self.prefix));
        let (outside, inside) = (format!("b{}n{number}", self.id), format!("b{}p{number}", self.id));
        run_now("ip", &["netns", "add", &namespace])?;
        self.nodes.push(Node { name: name.to_owned(), address: address.clone() });
        let switch = self.namespace(SWITCH);
        let pair =
            ["-n", &switch, "link", "add", &outside, "type", "veth", "peer", "name", &inside, "netns", &namespace];
        run_now("ip", &pair)?;
        run_now("ip", &["-n", &switch, "link", "set", &outside, "master", BRIDGE, "up"])?;
        for command in [
            vec!["link", "set", "lo", "up"],
            vec!["addr", "add", &format!("{address}/24"), "dev", &inside],
            vec!["link", "set", &inside, "up"],
        ] {
            run_now("ip", &[vec!["-n", &namespace], command].concat())?;
        }
        Ok((address, Path::new(NAMESPACES).join(namespace)))
    }

    /// Cuts ways: what is sent there vanishes.
    ///
    /// # Errors
    /// If a node is unknown or the kernel refuses.
    pub fn cut(&self, ways: &[Way]) -> Result<()> {
        self.change("add", "cut", ways)
    }

    /// Opens ways that were cut.
    ///
    /// # Errors
    /// If a node is unknown or the kernel refuses.
    pub fn open(&self, ways: &[Way]) -> Result<()> {
        self.change("delete", "cut", ways)
    }

    /// Makes ways lose packets.
    ///
    /// # Errors
    /// If a node is unknown or the kernel refuses.
    pub fn lose(&self, ways: &[Way]) -> Result<()> {
        self.change("add", "lossy", ways)
    }

    /// Makes ways lose no more packets.
    ///
    /// # Errors
    /// If a node is unknown or the kernel refuses.
    pub fn keep(&self, ways: &[Way]) -> Result<()> {
        self.change("delete", "lossy", ways)
    }

    /// Opens all ways, and makes none lossy.
    pub fn heal(&self) {
        for set in ["cut", "lossy"] {
            let _gone_already = self.nft(&["flush", "set", "bridge", TABLE, set]);
        }
    }

    fn change(&self, verb: &str, set: &str, ways: &[Way]) -> Result<()> {
        let address = |name: &String| {
            let node = self.nodes.iter().find(|node| node.name == *name);
            node.map(|node| node.address.as_str()).with_context(|| format!("no node is called {name}"))
        };
        let elements = ways.iter().map(|way| Ok(format!("{} . {}", address(&way.from)?, address(&way.to)?)));
        let elements = elements.collect::<Result<Vec<_>>>()?.join(", ");
        self.nft(&[verb, "element", "bridge", TABLE, set, &format!("{{ {elements} }}")])
    }

    fn nft(&self, args: &[&str]) -> Result<()> {
        let switch = self.namespace(SWITCH);
        run_now("ip", &[&["netns", "exec", &switch, "nft"], args].concat()).map(drop)
    }

    fn namespace(&self, name: &str) -> String {
        format!("bots-{}-{name}", self.id)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        remove(self.id);
    }
}

/// Both ways between every two of them.
#[must_use]
pub fn between(some: &[String], others: &[String]) -> Vec<Way> {
    let pairs = some.iter().flat_map(|a| others.iter().map(move |b| (a, b))).filter(|(a, b)| a != b);
    let way = |from: &String, to: &String| Way { from: from.clone(), to: to.clone() };
    pairs.flat_map(|(a, b)| [way(a, b), way(b, a)]).collect()
}

/// Removes what runs have left that live no more.
fn remove_left_over() {
    let namespaces = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    let ids = namespaces
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("bots-")?.split('-').next()?.parse::<u32>().ok());
    let mut dead: Vec<u32> = ids.filter(|id| !Path::new(&format!("/proc/{id}")).exists()).collect();
    dead.sort_unstable();
    dead.dedup();
    dead.into_iter().for_each(remove);
}

/// Removes a run's network. Whatever of it is gone is gone.
fn remove(id: u32) {
    let namespaces = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    for namespace in namespaces.filter_map(|entry| entry.file_name().into_string().ok()) {
        if namespace.starts_with(&format!("bots-{id}-")) {
            // Interfaces, bridge and rules go with it.
            let _gone_already = run_now("ip", &["netns", "delete", &namespace]);
        }
    }
    let _gone_already = run_now("ip", &["link", "delete", &format!("b{id}h")]);
}

#[cfg(test)]
mod tests {
    use super::between;

    #[test]
    fn nobody_is_cut_off_from_himself() {
        let names = |names: &[&str]| -> Vec<String> { names.iter().map(|name| (*name).to_owned()).collect() };
        let ways = between(&names(&["a"]), &names(&["a", "b"]));
        let ways: Vec<String> = ways.iter().map(|way| format!("{}{}", way.from, way.to)).collect();
        assert_eq!(ways, ["ab", "ba"]);
    }
}
