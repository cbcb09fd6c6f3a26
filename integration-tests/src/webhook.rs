//! What a forge sends when something was pushed, in GitHub's form, signed. Not the way that it goes.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use bots_core::shell::{Clock, instance_id};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::json;
use sha2::Sha256;

/// What a branch points at that is new, or gone, on its other side.
const NOTHING: &str = "0000000000000000000000000000000000000000";

/// A branch or tag that has moved, as git tells its hooks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Where it pointed.
    pub before: String,
    /// Where it points.
    pub after: String,
    /// Its full name.
    pub reference: String,
}

/// A request, but for its first line.
#[derive(Debug, Clone)]
pub struct Announcement {
    /// The number of this delivery, unlike any other's.
    pub delivery: String,
    /// `sha256=` and the HMAC of the body.
    pub signature: String,
    /// The body.
    pub body: String,
}

impl Moved {
    /// The branch `main` at a commit, as if it had been at none before.
    #[must_use]
    pub fn to(sha: &str) -> Self {
        Self { before: String::from(NOTHING), after: sha.to_owned(), reference: String::from("refs/heads/main") }
    }

    /// A line that `post-receive` is given.
    ///
    /// # Errors
    /// If it is none.
    pub fn parse(line: &str) -> Result<Self> {
        let mut words = line.split_whitespace().map(str::to_owned);
        let mut next = || words.next().with_context(|| format!("`{line}` is no `before after reference`"));
        Ok(Self { before: next()?, after: next()?, reference: next()? })
    }
}

/// What is to be said of it, signed with `secret`.
#[must_use]
pub fn announcement(moved: &Moved, secret: &str) -> Announcement {
    let Moved { before, after, reference } = moved;
    let delivery = instance_id();
    // The time is in a forge's body, too, and the number makes sure that no body is another's: a body that comes twice is a replay.
    let repository = json!({ "pushed_at": Clock::unix_ms() / 1_000, "delivery": delivery });
    let body = json!({ "ref": reference, "before": before, "after": after, "repository": repository }).to_string();
    let signature = format!("sha256={}", hmac(secret, &body));
    Announcement { delivery, signature, body }
}

impl Announcement {
    /// Its headers.
    #[must_use]
    pub fn headers(&self) -> [(&str, &str); 4] {
        [
            ("content-type", "application/json"),
            ("x-github-event", "push"),
            ("x-github-delivery", &self.delivery),
            ("x-hub-signature-256", &self.signature),
        ]
    }

    /// The whole request to a path of a host.
    #[must_use]
    pub fn request(&self, host: &str, path: &str) -> String {
        let mut request = format!("POST {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n");
        for (name, value) in self.headers() {
            let _infallible = write!(request, "{name}: {value}\r\n");
        }
        let _infallible = write!(request, "content-length: {}\r\n\r\n{}", self.body.len(), self.body);
        request
    }
}

/// HMAC-SHA256, in hexadecimal.
fn hmac(secret: &str, text: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("a key of any length will do");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::{Moved, announcement, hmac};

    #[test]
    fn the_example_of_githubs_documentation_is_signed() {
        let signature = hmac("It's a Secret to Everybody", "Hello, World!");
        assert_eq!(signature, "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17");
    }

    #[test]
    fn a_push_of_the_same_commit_is_another_delivery() {
        let moved = Moved::parse("before after refs/heads/main\n").expect("a line of git's");
        let (one, other) = (announcement(&moved, "secret"), announcement(&moved, "secret"));
        assert_ne!((&one.delivery, &one.signature), (&other.delivery, &other.signature));
        let request = one.request("host:1", "/push");
        assert!(request.starts_with("POST /push HTTP/1.1\r\nhost: host:1\r\n"), "{request}");
        assert!(request.ends_with(&format!("\r\n\r\n{}", one.body)), "{request}");
        assert!(Moved::parse("before after").is_err());
    }
}
