//! The configuration of announcements: who may send them, and where.

use std::{net::SocketAddr, path::PathBuf};

use bots_core::shell::{
    Secret, Strangers,
    config::{one_secret, socket_address},
};
use serde::{Deserialize, Deserializer};

/// Secrets in force at a time. Two are a rotation; many are a mistake, and each costs every announcement a check.
const SECRETS_MAX: usize = 8;

/// How pushes are announced.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Push {
    /// What announcements are signed with.
    pub secret: Option<Secret>,
    /// The file that holds it, read afresh for every announcement.
    pub secret_file: Option<PathBuf>,
    /// Others that are in force beside it: the old one, until every sender has the new one.
    pub secrets: Vec<Secret>,
    /// The files that hold them.
    pub secret_files: Vec<PathBuf>,
    /// An address where announcements are taken and nothing else is answered, beside the API: the one for the open network.
    #[serde(deserialize_with = "address")]
    pub listen: Option<SocketAddr>,
}

impl Push {
    /// Whether announcements must be signed.
    #[must_use]
    pub const fn is_signed(&self) -> bool {
        let one = self.secret.is_some() || self.secret_file.is_some();
        one || !self.secrets.is_empty() || !self.secret_files.is_empty()
    }

    /// Checks what the types cannot. `api` is where the API listens.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn check(&self, api: SocketAddr) -> Result<(), String> {
        if self.is_signed() {
            self.secrets()?;
        }
        match self.listen {
            Some(listen) if !self.is_signed() => Err(format!(
                "push.listen: whoever reaches {listen} could announce, for nothing is signed: give push.secret_file"
            )),
            Some(listen) if listen == api => {
                Err(format!("push.listen: {listen} is where the whole API is (restapi.listen): choose another port"))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Where strangers may announce and see nothing else.
    #[must_use]
    pub fn strangers(&self) -> Option<Strangers> {
        self.listen.map(|listen| Strangers { field: "push.listen", listen })
    }

    /// Every secret that is in force.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn secrets(&self) -> Result<Vec<Secret>, String> {
        let mut found = self.secrets.clone();
        if self.secret.is_some() || self.secret_file.is_some() {
            found.push(one_secret("push.secret", self.secret.as_ref(), self.secret_file.as_ref())?);
        }
        for path in &self.secret_files {
            found.push(Secret::from_file(path).map_err(|e| format!("push.secret_files: {e}"))?);
        }
        if found.iter().any(|secret| secret.expose().is_empty()) {
            return Err(String::from("push.secret is empty, or one of push.secrets: give one, or remove the field"));
        }
        if found.len() > SECRETS_MAX {
            let many = found.len();
            return Err(format!(
                "push.secrets: {many} secrets are in force: {SECRETS_MAX} at most, remove the old ones"
            ));
        }
        Ok(found)
    }
}

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    socket_address(deserializer).map(Some)
}
