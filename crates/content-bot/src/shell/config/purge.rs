//! The configuration of purges: what caches in front are told, and where it is seen whether they have understood.

use std::{collections::BTreeMap, path::PathBuf};

use bots_core::shell::Secret;
use serde::Deserialize;

use crate::shell::callers::{Call, Purging};

/// How caches in front are purged.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Purge {
    /// What they are told, one after the other.
    pub requests: Vec<PurgeRequest>,
    /// How long after the first time they are told again.
    #[serde(default = "again_after_s")]
    pub again_after_s: u64,
    /// Pages through the cache that must be of the live commit afterwards.
    #[serde(default)]
    pub probe: Vec<String>,
    /// The certificates that https servers of these pages must be known by, in PEM; without it those of the machine.
    pub probe_ca_file: Option<PathBuf>,
}

/// One request to a cache. In `url`, `headers` and `body`, `{sha}` stands for the live commit.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PurgeRequest {
    /// The method: PURGE, BAN, POST, …
    pub method: String,
    /// Where.
    pub url: String,
    /// Headers.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Headers whose values are secrets: the files that hold them, read for every request.
    #[serde(default)]
    pub header_files: BTreeMap<String, PathBuf>,
    /// The certificates that an https server must be known by, in PEM; without it those of the machine.
    pub ca_file: Option<PathBuf>,
    /// The body.
    #[serde(default)]
    pub body: String,
}

impl Purge {
    /// What caches are told.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn purging(&self) -> Result<Purging, String> {
        let calls = self.requests.iter().map(|request| request.call("purge.requests")).collect::<Result<_, _>>()?;
        if let Some(bad) = self.probe.iter().find(|page| !is_web(page)) {
            return Err(format!("purge.probe: `{bad}` cannot be read: give the http:// or https:// address of a page"));
        }
        if let Some(path) = &self.probe_ca_file {
            if !self.probe.iter().any(|page| page.starts_with("https://")) {
                return Err(String::from("purge.probe_ca_file: no page of purge.probe is https://: remove it"));
            }
            std::fs::metadata(path).map_err(|e| format!("purge.probe_ca_file: {}: {e}", path.display()))?;
        }
        let ca_file = |page: &str| self.probe_ca_file.clone().filter(|_| page.starts_with("https://"));
        let probes = self.probe.iter().map(|page| Call::page(page, ca_file(page))).collect();
        Ok(Purging { calls, probes })
    }
}

impl PurgeRequest {
    pub(super) fn call(&self, field: &str) -> Result<Call, String> {
        let method = hyper::Method::from_bytes(self.method.as_bytes());
        let method = method.map_err(|_| format!("{field}.method: `{}` is no method of HTTP", self.method))?;
        if !is_web(&self.url) {
            return Err(format!("{field}.url: `{}` is no http:// or https:// address", self.url));
        }
        for (name, path) in &self.header_files {
            Secret::from_file(path).map_err(|e| format!("{field}.header_files.{name}: {e}"))?;
        }
        if let Some(path) = &self.ca_file {
            if !self.url.starts_with("https://") {
                return Err(format!("{field}.ca_file: `{}` is no https:// address", self.url));
            }
            std::fs::metadata(path).map_err(|e| format!("{field}.ca_file: {}: {e}", path.display()))?;
        }
        let pairs = |map: &BTreeMap<String, String>| map.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
        Ok(Call {
            method,
            url: self.url.clone(),
            headers: pairs(&self.headers),
            header_files: self.header_files.iter().map(|(n, p)| (n.clone(), p.clone())).collect(),
            ca_file: self.ca_file.clone(),
            body: self.body.clone(),
        })
    }
}

fn is_web(url: &str) -> bool {
    url.starts_with("http://") || url.starts_with("https://")
}

/// What a cache fetched while it was being purged is there by then.
const fn again_after_s() -> u64 {
    5
}
