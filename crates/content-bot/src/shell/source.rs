//! The repository's address: what libgit2 is given, and what may be shown. Credentials in it never leave this type.

use std::fmt;

/// Where ssh listens if an address does not say.
pub(super) const SSH_PORT: u16 = 22;

/// How a repository is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A path on this machine.
    Local,
    /// `http`, `https`.
    Http,
    /// `ssh://` or `user@host:path`.
    Ssh,
    /// `git://`.
    Git,
}

/// A repository's address.
#[derive(Clone, PartialEq, Eq)]
pub struct Source {
    url: String,
    shown: String,
    secret: Option<String>,
    transport: Transport,
}

impl Source {
    /// Reads an address.
    ///
    /// # Errors
    /// What is wrong with it and what works.
    pub fn parse(url: &str) -> Result<Self, String> {
        let known = "use https://host/path, ssh://user@host/path, git://host/path, file:///path or /path";
        if url.is_empty() || url.chars().any(|c| c.is_control() || c == ' ') {
            return Err(format!("it is empty or has spaces: {known}"));
        }
        let local =
            |url: &str| Self { url: url.to_owned(), shown: url.to_owned(), secret: None, transport: Transport::Local };
        if url.starts_with('/') {
            return Ok(local(url));
        }
        let Some((scheme, rest)) = url.split_once("://") else {
            let scp = url.split_once(':').is_some_and(|(host, path)| host.contains('@') && !path.is_empty());
            let same = Self { transport: Transport::Ssh, ..local(url) };
            return if scp { Ok(same) } else { Err(format!("it is not an address of a repository: {known}")) };
        };
        let transport = match scheme {
            "file" if rest.starts_with('/') => return Ok(local(url)),
            "http" | "https" => Transport::Http,
            "ssh" => Transport::Ssh,
            "git" => Transport::Git,
            _ => return Err(format!("`{scheme}://` is not supported: {known}")),
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, host) = authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
        if host.is_empty() {
            return Err(format!("it names no host: {known}"));
        }
        // The user of ssh belongs to the address; a password, or a token before http's `@`, does not.
        let (name, password) = match user.map(|u| u.split_once(':').map_or((u, None), |(n, p)| (n, Some(p)))) {
            None => (None, None),
            Some((name, password)) if transport == Transport::Ssh => (Some(name), password),
            Some((name, password)) => (None, password.or(Some(name))),
        };
        let user = name.map(|n| format!("{n}@")).unwrap_or_default();
        Ok(Self {
            url: url.to_owned(),
            shown: format!("{scheme}://{user}{host}/{path}"),
            secret: password.filter(|p| !p.is_empty()).map(str::to_owned),
            transport,
        })
    }

    /// The address with its credentials, for libgit2 alone.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The address without credentials.
    #[must_use]
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// How it is reached.
    #[must_use]
    pub const fn transport(&self) -> Transport {
        self.transport
    }

    /// The protocol and the host with its port: who is shown credentials.
    #[must_use]
    pub(super) fn place(&self) -> (&str, &str) {
        match self.url.split_once("://") {
            Some((scheme, rest)) => {
                let authority = rest.split('/').next().unwrap_or_default();
                (scheme, authority.rsplit('@').next().unwrap_or_default())
            }
            None => ("ssh", self.url.split(':').next().and_then(|host| host.rsplit('@').next()).unwrap_or_default()),
        }
    }

    /// The host's name or address.
    #[must_use]
    pub(super) fn host(&self) -> &str {
        self.host_and_port().0
    }

    /// The port of ssh: the address's, or the usual one.
    #[must_use]
    pub(super) fn port(&self) -> u16 {
        self.host_and_port().1
    }

    fn host_and_port(&self) -> (&str, u16) {
        let place = self.place().1;
        match place.rsplit_once(':') {
            Some((host, port)) if self.url.contains("://") => (host, port.parse().unwrap_or(SSH_PORT)),
            Some(_) | None => (place, SSH_PORT),
        }
    }

    /// `text` on one line, without the address's credentials.
    #[must_use]
    pub fn censor(&self, text: &str) -> String {
        let text = text.replace(&self.url, &self.shown);
        let text = match &self.secret {
            Some(secret) => text.replace(secret.as_str(), "***"),
            None => text,
        };
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Source").field(&self.shown).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::{Source, Transport};

    #[test]
    fn credentials_are_never_shown() {
        let check = |url: &str, shown: &str, transport| {
            let source = Source::parse(url).expect(url);
            assert_eq!((source.shown(), source.transport()), (shown, transport), "{url}");
            assert!(!format!("{source:?} {}", source.censor(&format!("failed: {url}"))).contains("s3cret"));
        };
        check("https://bot:s3cret@git.example/a/b.git", "https://git.example/a/b.git", Transport::Http);
        check("https://s3cret@git.example/a.git", "https://git.example/a.git", Transport::Http);
        check("http://git.example:3000/a.git", "http://git.example:3000/a.git", Transport::Http);
        check("ssh://git:s3cret@git.example:22/a.git", "ssh://git@git.example:22/a.git", Transport::Ssh);
        check("git@git.example:a/b.git", "git@git.example:a/b.git", Transport::Ssh);
        check("git://git.example/a.git", "git://git.example/a.git", Transport::Git);
        check("file:///srv/git/a.git", "file:///srv/git/a.git", Transport::Local);
        check("/srv/git/a.git", "/srv/git/a.git", Transport::Local);
    }

    #[test]
    fn what_is_no_repository_is_refused_with_what_works() {
        for bad in ["", "site.git", "ftp://host/a", "https:///a", "file://relative", "https://a b/c"] {
            let error = Source::parse(bad).expect_err(bad);
            assert!(error.contains("use https://"), "{error}");
        }
    }
}
