//! The way to etcd as it is configured: its members, TLS, and the user. Not the way itself.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer};

use super::{Secret, one_secret};
use crate::shell::tls::{ClientFiles, Pair};

/// What stands before a member that is reached by TLS.
const HTTPS: &str = "https://";
const HTTP: &str = "http://";

/// The way to etcd.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Etcd {
    /// All members: `a:2379,b:2379`, or a list. `http://` or `https://` may stand before each.
    #[serde(deserialize_with = "hosts")]
    pub hosts: Vec<String>,
    /// One member, if there is only one.
    pub host: Option<String>,
    /// The user, if etcd asks for one.
    pub username: Option<String>,
    /// The user's password.
    pub password: Option<Secret>,
    /// The file that holds the user's password.
    pub password_file: Option<PathBuf>,
    /// `http` or `https`, for members that do not say it themselves. `http` if it is not given.
    pub protocol: Option<String>,
    /// The authorities that may have signed etcd's certificate: a PEM file. Needed for https.
    pub cacert: Option<PathBuf>,
    /// The certificate that etcd is shown: a PEM file, with the chain.
    pub cert: Option<PathBuf>,
    /// The key of that certificate, if it is not in the same file.
    pub key: Option<PathBuf>,
}

impl Etcd {
    /// The members in `hosts`, separated by commas; no password.
    #[must_use]
    pub fn from_hosts(hosts: &str) -> Self {
        Self { hosts: split_hosts(hosts), ..Self::default() }
    }

    /// Whether all of this can be used, files too.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn check(&self) -> Result<(), String> {
        self.user()?;
        self.tls()?.map_or(Ok(()), |files| files.read().map(drop))
    }

    /// The members as `host:port`, with `https://` before those that are reached by TLS.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn endpoints(&self) -> Result<Vec<String>, String> {
        if let Some(other) = self.protocol.as_deref().filter(|p| !["http", "https"].contains(p)) {
            return Err(format!("etcd3.protocol: `{other}` is neither http nor https: correct it"));
        }
        let all: Vec<&String> = self.hosts.iter().chain(&self.host).collect();
        if all.is_empty() {
            return Err(String::from("etcd3.hosts is empty: list the etcd members, for example hosts: 127.0.0.1:2379"));
        }
        all.into_iter().map(|host| endpoint(host, self.protocol.as_deref())).collect()
    }

    /// The user and the password, if there is a user.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn user(&self) -> Result<Option<(String, Secret)>, String> {
        let Some(username) = &self.username else {
            let given = self.password.is_some() || self.password_file.is_some();
            let orphan =
                "etcd3.username is missing, and there is a password: add the user's name, or remove the password";
            return if given { Err(String::from(orphan)) } else { Ok(None) };
        };
        let password = one_secret("etcd3.password", self.password.as_ref(), self.password_file.as_ref())?;
        Ok(Some((username.clone(), password)))
    }

    /// The files for TLS, if etcd is reached by it. They are not looked at.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn tls(&self) -> Result<Option<ClientFiles>, String> {
        if !self.endpoints()?.iter().any(|member| member.starts_with(HTTPS)) {
            let fields = [("cacert", &self.cacert), ("cert", &self.cert), ("key", &self.key)];
            return match fields.into_iter().find(|(_, path)| path.is_some()) {
                Some((field, _)) => Err(format!(
                    "etcd3.{field} is given, and etcd is reached by http: set etcd3.protocol to https, or remove the field"
                )),
                None => Ok(None),
            };
        }
        let authorities = self.cacert.clone().ok_or_else(|| {
            String::from(
                "etcd3.cacert is missing: name the PEM file of who signed etcd's certificate; for one that all know, \
                 /etc/ssl/certs/ca-certificates.crt",
            )
        })?;
        let pair = match (&self.cert, &self.key) {
            (Some(certificate), key) => {
                Some(Pair { certificate: certificate.clone(), key: key.clone().unwrap_or_else(|| certificate.clone()) })
            }
            (None, Some(_)) => {
                return Err(String::from("etcd3.cert is missing, and there is etcd3.key: give both, or none"));
            }
            (None, None) => None,
        };
        Ok(Some(ClientFiles { fields: ["etcd3.cacert", "etcd3.cert", "etcd3.key"], authorities, pair }))
    }
}

fn hosts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected `host:port,host:port` or a list of `host:port`")]
    enum Hosts {
        Line(String),
        List(Vec<String>),
    }
    Ok(match Hosts::deserialize(deserializer)? {
        Hosts::Line(line) => split_hosts(&line),
        Hosts::List(list) => list,
    })
}

fn split_hosts(line: &str) -> Vec<String> {
    line.split(',').map(str::trim).filter(|h| !h.is_empty()).map(str::to_owned).collect()
}

/// One member as `host:port`, with `https://` before it if that is the way to it; etcd's own port if there is none.
fn endpoint(host: &str, protocol: Option<&str>) -> Result<String, String> {
    let bad = || format!("etcd3.hosts: `{host}` is not host:port: write it like 10.0.0.1:2379");
    let own = [HTTP, HTTPS].into_iter().find(|scheme| host.starts_with(scheme));
    let common = protocol.map(|p| if p == "https" { HTTPS } else { HTTP });
    if let (Some(own), Some(common)) = (own, common)
        && own != common
    {
        return Err(format!("etcd3.hosts: `{host}` is not what etcd3.protocol says: correct one of them"));
    }
    let bare = host.strip_prefix(own.unwrap_or_default()).unwrap_or(host).trim_end_matches('/');
    let with_port = if bare.rsplit_once(':').is_some_and(|(h, _)| !h.is_empty() && !bare.ends_with(']')) {
        bare.to_owned()
    } else {
        format!("{bare}:2379")
    };
    let uri: hyper::Uri = with_port.parse().map_err(|_invalid| bad())?;
    match (uri.host(), uri.port_u16()) {
        (Some(host), Some(_)) if !host.is_empty() => {}
        _ => return Err(bad()),
    }
    let is_tls = own.or(common) == Some(HTTPS);
    Ok(if is_tls { format!("{HTTPS}{with_port}") } else { with_port })
}
