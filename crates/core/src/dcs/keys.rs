//! The key layout: one scope's place in the store, and the names that may stand in it. The layout is Patroni's.

use serde::{Deserialize, Serialize};

/// The namespace that every tool expects if it is told nothing else.
pub const DEFAULT_NAMESPACE: &str = "service";

/// The longest name of a scope, a member or a namespace. Names become file names, host names and application names in
/// Postgres (which cuts at 63 bytes), so they stay below all three limits.
pub const NAME_LEN_MAX: usize = 63;

/// A name that cannot be used, with the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing there.
    #[error("{field} is empty: give it a name, for example {field}: alpha")]
    Empty {
        /// The configuration field.
        field: &'static str,
    },
    /// Too many bytes.
    #[error("{field} is {len} bytes long: use at most {NAME_LEN_MAX}")]
    TooLong {
        /// The configuration field.
        field: &'static str,
        /// The length found.
        len: usize,
    },
    /// A character that would break keys, file names or URLs.
    #[error(
        "{field} `{name}` has the character `{found}`: use letters, digits, `-`, `_` and `.`, and begin with a letter or digit"
    )]
    Illegal {
        /// The configuration field.
        field: &'static str,
        /// The whole name.
        name: String,
        /// The first bad character.
        found: char,
    },
}

/// Checks a name that will stand in a key.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn check_name(field: &'static str, name: &str) -> Result<(), NameError> {
    let Some(first) = name.chars().next() else { return Err(NameError::Empty { field }) };
    if name.len() > NAME_LEN_MAX {
        return Err(NameError::TooLong { field, len: name.len() });
    }
    let illegal = |found| NameError::Illegal { field, name: name.to_owned(), found };
    if !first.is_ascii_alphanumeric() {
        return Err(illegal(first));
    }
    match name.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))) {
        Some(found) => Err(illegal(found)),
        None => Ok(()),
    }
}

/// One scope's place in the store: a Postgres cluster, a content site, a web fleet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Scope {
    namespace: String,
    name: String,
}

macro_rules! fixed_keys {
    ($($(#[$doc:meta])* $fn:ident => $key:literal),* $(,)?) => {
        $($(#[$doc])* #[must_use] pub fn $fn(&self) -> String { self.key($key) })*
    };
}

impl Scope {
    /// The scope `name` in `namespace`. A namespace may have several parts, as in `/company/service/`.
    ///
    /// # Errors
    /// If a name has characters that a key cannot hold.
    pub fn new(namespace: &str, name: &str) -> Result<Self, NameError> {
        let namespace = namespace.trim_matches('/');
        for part in namespace.split('/') {
            check_name("namespace", part)?;
        }
        check_name("scope", name)?;
        Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
    }

    /// The scope's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The namespace, without slashes at its ends.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The prefix of all keys of the scope, with a slash at its end.
    #[must_use]
    pub fn prefix(&self) -> String {
        format!("/{}/{}/", self.namespace, self.name)
    }

    /// A key of the scope.
    #[must_use]
    pub fn key(&self, rest: &str) -> String {
        format!("/{}/{}/{rest}", self.namespace, self.name)
    }

    /// The rest of `key` behind the scope's prefix.
    #[must_use]
    pub fn strip<'k>(&self, key: &'k str) -> Option<&'k str> {
        key.strip_prefix(self.prefix().as_str())
    }

    fixed_keys! {
        /// The leader lock: the holder's bare name, bound to its lease.
        leader => "leader",
        /// The dynamic configuration, JSON.
        config => "config",
        /// Postgres: empty while bootstrapping, then the system identifier.
        initialize => "initialize",
        /// Postgres: the leader's last position, JSON.
        status => "status",
        /// Postgres: the synchronous members, JSON.
        sync => "sync",
        /// Postgres: a switchover or failover that an operator asked for, JSON; `{}` when done.
        failover => "failover",
        /// Postgres: the timelines, JSON.
        history => "history",
        /// Postgres: which numbers of timelines are taken, JSON.
        timelines => "timelines",
        /// Postgres: the members that may vouch for the primary without the store, JSON.
        failsafe => "failsafe",
        /// Content: the commit that the web bots prepare.
        revision_candidate => "revision/candidate",
        /// Content: the commit that every web bot serves.
        revision_live => "revision/live",
        /// Content: the newest announcement of a push, and the window of replays, JSON.
        push => "push",
        /// Content: the last publications, JSON.
        revision_history => "revision/history",
        /// Content: the commit that an operator wants published, JSON.
        revision_pin => "revision/pin",
        /// Content: the candidate that an operator lets go live as it is, JSON.
        revision_promote => "revision/promote",
        /// Content: the web bot that serves the candidate before the others, JSON.
        revision_canary => "revision/canary",
        /// Content: how far caches were purged, JSON.
        revision_purged => "revision/purged",
        /// Where all members stand.
        members_prefix => "members/",
        /// Where the edges stand that route to a Postgres cluster.
        edges_prefix => "edges/",
        /// Web: when load messages were posted and withdrawn of late, JSON.
        load_history => "load/history",
        /// Where all load messages stand.
        load_prefix => "load/",
        /// Where all quarantined commits stand.
        quarantine_prefix => "revision/quarantine/",
    }

    /// A member's key: what the bot is and how it does, bound to its lease.
    #[must_use]
    pub fn member(&self, name: &str) -> String {
        self.key(&format!("members/{name}"))
    }

    /// The key of an edge bot below the Postgres scope that it routes to, bound to its lease.
    #[must_use]
    pub fn edge(&self, edge: &Self, name: &str) -> String {
        self.key(&format!("edges/{}/{name}", edge.name))
    }

    /// Postgres: what a member has promised about the present leader, JSON.
    #[must_use]
    pub fn promise(&self, name: &str) -> String {
        self.key(&format!("promises/{name}"))
    }

    /// A load message: a place in the serving set that wants a bot.
    #[must_use]
    pub fn load(&self, slot: u32) -> String {
        self.key(&format!("load/{slot:04}"))
    }

    /// The claim of a load message, bound to the claimant's lease for as long as it serves.
    #[must_use]
    pub fn load_claim(&self, slot: u32) -> String {
        self.key(&format!("load/{slot:04}/claim"))
    }

    /// The mark of a commit that must not be published.
    #[must_use]
    pub fn quarantine(&self, sha: &str) -> String {
        self.key(&format!("revision/quarantine/{sha}"))
    }
}

#[cfg(test)]
mod tests {
    use super::{NameError, Scope, check_name};

    #[test]
    fn keys_are_where_patroni_puts_them() {
        let scope = Scope::new("/service/", "alpha").expect("valid");
        assert_eq!(scope.leader(), "/service/alpha/leader");
        assert_eq!(scope.member("pg-1"), "/service/alpha/members/pg-1");
        assert_eq!(scope.load_claim(3), "/service/alpha/load/0003/claim");
        assert_eq!(scope.strip("/service/alpha/members/pg-1"), Some("members/pg-1"));
        assert_eq!(scope.strip("/service/alphabet/leader"), None);
    }

    #[test]
    fn bad_names_are_refused_with_the_reason() {
        assert!(check_name("name", "pg-1.example_x").is_ok());
        assert_eq!(check_name("name", ""), Err(NameError::Empty { field: "name" }));
        for bad in ["a/b", "a b", "-a", "..", "ä", "a\n"] {
            assert!(matches!(check_name("name", bad), Err(NameError::Illegal { .. })), "{bad:?}");
        }
        assert_eq!(check_name("name", &"a".repeat(64)), Err(NameError::TooLong { field: "name", len: 64 }));
    }
}
