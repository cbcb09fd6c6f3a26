//! The keys of ssh hosts, read from a file in OpenSSH's format. Who is not in it is not talked to.

use std::path::Path;

use super::base64;

/// Lines of one host and one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownHosts(Vec<(String, Vec<u8>)>);

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
            if line.starts_with('|') || line.starts_with('@') {
                return Err(format!(
                    "line {at}: hashed hosts and markers are not read: write it with `ssh-keyscan HOST`"
                ));
            }
            let mut words = line.split_whitespace();
            let (Some(hosts), Some(_kind), Some(key)) = (words.next(), words.next(), words.next()) else {
                return Err(format!("line {at}: expected `host type key`: write it with `ssh-keyscan HOST`"));
            };
            let key = base64::decode(key).ok_or_else(|| format!("line {at}: the key is not base64"))?;
            known.extend(hosts.split(',').map(|host| (host.to_owned(), key.clone())));
        }
        if known.is_empty() {
            Err(String::from("it holds no host: write it with `ssh-keyscan HOST`"))
        } else {
            Ok(Self(known))
        }
    }

    /// Whether `host` has shown one of its keys. A port other than 22 is written `[host]:port`, and either way is taken.
    #[must_use]
    pub fn knows(&self, host: &str, key: &[u8]) -> bool {
        let named = |entry: &str| {
            let bare = entry.strip_prefix('[').and_then(|e| e.split_once(']')).map_or(entry, |(host, _port)| host);
            bare.eq_ignore_ascii_case(host)
        };
        self.0.iter().any(|(entry, known)| named(entry) && known == key)
    }
}

#[cfg(test)]
mod tests {
    use super::KnownHosts;

    #[test]
    fn a_host_is_known_by_its_own_key_alone() {
        let known =
            KnownHosts::parse("# keys\ngit.example,10.0.0.1 ssh-ed25519 Zm9vYmFy\n[alt.example]:2222 ssh-rsa Zm8=\n")
                .expect("good");
        assert!(known.knows("GIT.example", b"foobar") && known.knows("10.0.0.1", b"foobar"));
        assert!(known.knows("alt.example", b"fo"));
        assert!(!known.knows("git.example", b"fo") && !known.knows("other", b"foobar"));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for bad in ["", "|1|abc|def ssh-rsa Zm8=", "host only", "host ssh-rsa !!"] {
            assert!(KnownHosts::parse(bad).is_err(), "{bad}");
        }
    }
}
