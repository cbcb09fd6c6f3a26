//! The keys of ssh hosts, read from a file in OpenSSH's format, patterns among them. Who is not in it is not talked to.

use std::path::Path;

use hmac::{Hmac, KeyInit, Mac};
use sha1::Sha1;

use super::{base64, source::SSH_PORT};

/// What OpenSSH writes before the salt and the hash of a name.
const HASHED: &str = "|1|";

/// The length of such a hash, in bytes.
const SHA1_LEN: usize = 20;

/// Hosts and their keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownHosts(Vec<Entry>);

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    hosts: Vec<Host>,
    /// Those that are meant by `hosts` and are not to be.
    but_not: Vec<Host>,
    key: Vec<u8>,
    /// Whether whoever shows this key is to be refused.
    revoked: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Host {
    /// A name, in which `*` stands for any characters and `?` for one.
    Pattern(String),
    /// By `ssh-keygen -H`, or where ssh has `HashKnownHosts`: who reads the file does not learn the names.
    Hashed { salt: Vec<u8>, hash: Vec<u8> },
}

impl KnownHosts {
    /// Reads a file.
    ///
    /// # Errors
    /// One line: what cannot be used and what works.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        Self::parse(&text).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// Reads the file's text.
    ///
    /// # Errors
    /// One line: what cannot be used and what works.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut known = Vec::new();
        for (at, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line.trim())) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            known.push(Entry::parse(line).map_err(|why| format!("line {at}: {why}"))?);
        }
        if known.iter().all(|entry| entry.revoked) {
            Err(String::from("it holds no host: write it with `ssh-keyscan HOST`"))
        } else {
            Ok(Self(known))
        }
    }

    /// Whether `host` has shown one of its keys, and none that is revoked. At another port than ssh's own a host is written
    /// `[host]:port`; an entry without a port is for every port.
    #[must_use]
    pub fn knows(&self, host: &str, port: u16, key: &[u8]) -> bool {
        let host = host.to_ascii_lowercase();
        let with_port = format!("[{host}]:{port}");
        let names = if port == SSH_PORT { vec![host, with_port] } else { vec![with_port, host] };
        let mut shown = self.0.iter().filter(|entry| entry.key == key && entry.means(&names)).peekable();
        shown.peek().is_some() && shown.all(|entry| !entry.revoked)
    }
}

impl Entry {
    fn parse(line: &str) -> Result<Self, String> {
        let mut words = line.split_whitespace().peekable();
        let revoked = words.next_if_eq(&"@revoked").is_some();
        if words.peek().is_some_and(|word| word.starts_with('@')) {
            return Err(String::from("only the marker @revoked is read: give the hosts' own keys, `ssh-keyscan HOST`"));
        }
        let (Some(hosts), Some(_kind), Some(key)) = (words.next(), words.next(), words.next()) else {
            return Err(String::from("expected `host type key`: write it with `ssh-keyscan HOST`"));
        };
        let key = base64::decode(key).ok_or_else(|| String::from("the key is not base64"))?;
        let mut entry = Self { hosts: Vec::new(), but_not: Vec::new(), key, revoked };
        for word in hosts.split(',') {
            match word.strip_prefix('!') {
                Some(word) => entry.but_not.push(Host::parse(word)?),
                None => entry.hosts.push(Host::parse(word)?),
            }
        }
        match entry.hosts.is_empty() {
            true => Err(format!("`{hosts}` says only which hosts are not meant: name those that are, for example `*`")),
            false => Ok(entry),
        }
    }

    /// Whether it is about a host of these names.
    fn means(&self, names: &[String]) -> bool {
        let any = |hosts: &[Host]| hosts.iter().any(|host| names.iter().any(|name| host.is(name)));
        any(&self.hosts) && !any(&self.but_not)
    }
}

impl Host {
    fn parse(word: &str) -> Result<Self, String> {
        let Some(hashed) = word.strip_prefix(HASHED) else {
            return match word.is_empty() {
                true => Err(String::from("a host has no name: there is a comma or a `!` too many")),
                false => Ok(Self::Pattern(word.to_ascii_lowercase())),
            };
        };
        let halves = hashed.split_once('|').map(|(salt, hash)| (base64::decode(salt), base64::decode(hash)));
        match halves {
            Some((Some(salt), Some(hash))) if hash.len() == SHA1_LEN => Ok(Self::Hashed { salt, hash }),
            Some(_) | None => Err(String::from("the hashed host is not `|1|salt|hash`")),
        }
    }

    fn is(&self, name: &str) -> bool {
        match self {
            Self::Pattern(pattern) => fits(pattern.as_bytes(), name.as_bytes()),
            Self::Hashed { salt, hash } => Hmac::<Sha1>::new_from_slice(salt)
                .is_ok_and(|hmac| hmac.chain_update(name.as_bytes()).verify_slice(hash).is_ok()),
        }
    }
}

/// Whether a name fits a pattern. Where a `*` has taken too little, the last one takes one character more: earlier ones need
/// not be tried again.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut of, mut star) = (0, 0, None);
    while let Some(c) = name.get(of) {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, of));
                at += 1;
            }
            Some(p) if p == c || *p == b'?' => (at, of) = (at + 1, of + 1),
            Some(_) | None => {
                let Some((star_at, taken)) = star else { return false };
                star = Some((star_at, taken + 1));
                (at, of) = (star_at + 1, taken + 1);
            }
        }
    }
    pattern.get(at..).unwrap_or_default().iter().all(|p| *p == b'*')
}

#[cfg(test)]
mod tests {
    use super::KnownHosts;

    #[test]
    fn a_host_is_known_by_its_own_key_alone() {
        let known =
            KnownHosts::parse("# keys\ngit.example,10.0.0.1 ssh-ed25519 Zm9vYmFy\n[alt.example]:2222 ssh-rsa Zm8=\n")
                .expect("good");
        assert!(known.knows("GIT.example", 22, b"foobar") && known.knows("10.0.0.1", 2222, b"foobar"));
        assert!(known.knows("alt.example", 2222, b"fo"));
        assert!(!known.knows("alt.example", 22, b"fo"), "another port is another server");
        assert!(!known.knows("git.example", 22, b"fo") && !known.knows("other", 22, b"foobar"));
    }

    /// Written by `ssh-keygen -H` of OpenSSH 9.2.
    #[test]
    fn a_hashed_host_is_known() {
        let known = KnownHosts::parse(
            "|1|xuuep99oHkYkBvoi7hcEGMSjPiU=|OhfI3XvuRAMQfSw3sdxo0hZJ85w= ssh-ed25519 Zm9vYmFy\n\
             |1|J1qK+agvt7ZG9hHx8QWCRBpw/dE=|5KkGDNktD4E7uoGaH3kjvkh0vl4= ssh-ed25519 Zm9vYmFy\n",
        )
        .expect("good");
        assert!(known.knows("Git.example", 22, b"foobar") && known.knows("alt.example", 2222, b"foobar"));
        assert!(!known.knows("git.example", 22, b"fo") && !known.knows("other.example", 22, b"foobar"));
        assert!(!known.knows("alt.example", 22, b"foobar"));
    }

    #[test]
    fn a_revoked_key_is_refused_wherever_else_it_stands() {
        let lines =
            ["git.example ssh-rsa Zm8=", "@revoked git.example ssh-rsa Zm8=", "git.example ssh-ed25519 Zm9vYmFy"];
        let known = KnownHosts::parse(&lines.join("\n")).expect("good");
        assert!(!known.knows("git.example", 22, b"fo") && known.knows("git.example", 22, b"foobar"));
    }

    #[test]
    fn patterns_mean_what_they_mean_to_ssh() {
        let check = |hosts: &str, host: &str, port: u16, expected: bool| {
            let known = KnownHosts::parse(&format!("{hosts} ssh-rsa Zm8=")).expect(hosts);
            assert_eq!(known.knows(host, port, b"fo"), expected, "{hosts} and {host}:{port}");
        };
        check("*", "git.example", 22, true);
        check("*.Example", "git.example", 22, true);
        check("*.example", "example", 22, false);
        check("git?.example", "git1.example", 22, true);
        check("git?.example", "git.example", 22, false);
        check("*a*b", "xaxbxb", 22, true);
        check("*a*b", "xaxbx", 22, false);
        check("[*.example]:2222", "git.example", 2222, true);
        check("[*.example]:2222", "git.example", 22, false);
        check("*.example,!old.example", "git.example", 22, true);
        check("*.example,!old.example", "old.example", 22, false);
        check("!old.example,*.example", "old.example", 2222, false);
    }

    #[test]
    fn a_key_that_is_revoked_for_every_host_is_refused() {
        let known = |hosts: &str| {
            KnownHosts::parse(&format!("git.example ssh-rsa Zm8=\n@revoked {hosts} ssh-rsa Zm8=\n")).expect(hosts)
        };
        for hosts in ["*", "*.example", "git.*,other", "git.exampl?", "*,!other.example"] {
            assert!(!known(hosts).knows("git.example", 22, b"fo"), "{hosts}");
        }
        assert!(known("*,!git.example").knows("git.example", 22, b"fo"), "it is left out");
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let bad = [
            "",
            "|1|abc|def ssh-rsa Zm8=",
            "|1|Zm8= ssh-rsa Zm8=",
            "@cert-authority *.example ssh-rsa Zm8=",
            "@revoked host ssh-rsa Zm8=",
            "host only",
            "host ssh-rsa !!",
            "!host ssh-rsa Zm8=",
            "host,! ssh-rsa Zm8=",
            "host, ssh-rsa Zm8=",
            "@revokedhost ssh-rsa Zm8=",
            "@revoked @cert-authority host ssh-rsa Zm8=",
        ];
        for bad in bad {
            assert!(KnownHosts::parse(bad).is_err(), "{bad}");
        }
    }
}
