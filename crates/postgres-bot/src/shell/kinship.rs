//! How members know each other when one asks another something in failsafe mode: by the password of their APIs, which is the same for
//! all, as in Patroni; and where these have none, by a signature with the password of replication, which all members have.

use axum::http::{HeaderMap, header};
use bots_core::shell::{Exit, Secret, http};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::{config::Config, node::Node};

/// The scheme of the `Authorization` header with a signature.
const SCHEME: &str = "Bots-Member";

/// What a member shows when it asks another, and asks to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kinship {
    /// The password of the API, as its header: whoever may change something by the API may ask.
    Password(Secret),
    /// A signature with this password, which the API itself does not ask for.
    Signature {
        /// Of replication.
        password: Secret,
        /// Of which cluster: two may have the same password.
        scope: String,
        /// No other machine reaches the API: nobody has to show anything.
        alone: bool,
    },
    /// Nothing: only who is asked on its own machine answers.
    Nothing,
}

impl Kinship {
    /// As it is configured.
    ///
    /// # Errors
    /// If a password cannot be read.
    pub(super) fn of(config: &Config, node: &Node) -> Result<Self, Exit> {
        let api = &config.common.restapi;
        if let Some(credentials) = &api.authentication {
            let secret = credentials.secret("restapi.authentication").map_err(Exit::usage)?;
            return Ok(Self::Password(Secret::new(http::basic_authorization(&credentials.username, &secret))));
        }
        Ok(match &node.replication.password {
            Some(password) => Self::Signature {
                password: password.clone(),
                scope: config.common.scope().prefix(),
                alone: api.listen.ip().is_loopback(),
            },
            None => Self::Nothing,
        })
    }

    /// Whether it is judged here who asks, and not where the API asks for its password.
    pub(super) const fn judges(&self) -> bool {
        matches!(self, Self::Signature { .. })
    }

    /// The `Authorization` header of a question.
    pub(super) fn header(&self, path: &str, body: &[u8]) -> Option<String> {
        match self {
            Self::Password(header) => Some(header.expose().to_owned()),
            Self::Signature { password, scope, .. } => Some(signature(password, scope, path, body)),
            Self::Nothing => None,
        }
    }

    /// Whether whoever asks this is a member.
    pub(super) fn admits(&self, headers: &HeaderMap, path: &str, body: &[u8]) -> bool {
        let Self::Signature { password, scope, alone } = self else { return true };
        if headers.contains_key(header::ORIGIN) {
            // A web page, which is nobody's member.
            return false;
        }
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        // Equality of secrets takes the same time wherever they differ.
        *alone || Secret::new(given) == Secret::new(signature(password, scope, path, body))
    }
}

/// Of what is asked, where, and in which cluster: who overhears a question can ask the same again, and nothing else.
fn signature(password: &Secret, scope: &str, path: &str, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(password.expose().as_bytes()).expect("HMAC takes keys of any length");
    for part in [scope.as_bytes(), path.as_bytes(), body] {
        mac.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        mac.update(part);
    }
    let digits: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{SCHEME} {digits}")
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderMap, HeaderValue, header};
    use bots_core::shell::Secret;

    use super::Kinship;

    fn kin(password: &str, scope: &str, alone: bool) -> Kinship {
        Kinship::Signature { password: Secret::new(password), scope: scope.to_owned(), alone }
    }

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        let value = |text: &str| HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""));
        pairs.iter().map(|(name, text)| (name.clone(), value(text))).collect()
    }

    #[test]
    fn a_member_is_known_by_the_password_of_replication() {
        let asker = kin("secret", "/service/main/", false);
        let shown = asker.header("/failsafe", b"{}").unwrap_or_default();
        let shows = headers(&[(header::AUTHORIZATION, shown.as_str())]);
        assert!(kin("secret", "/service/main/", false).admits(&shows, "/failsafe", b"{}"));
        assert!(!shown.contains("secret"));
        for (other, path, body) in [
            (kin("another", "/service/main/", false), "/failsafe", &b"{}"[..]),
            (kin("secret", "/service/other/", false), "/failsafe", b"{}"),
            (asker.clone(), "/failsafe/candidate", b"{}"),
            (asker.clone(), "/failsafe", b"{ }"),
        ] {
            assert!(!other.admits(&shows, path, body), "{other:?} {path}");
        }
    }

    #[test]
    fn nobody_has_to_show_anything_where_no_other_machine_comes() {
        let alone = kin("secret", "/service/main/", true);
        assert!(alone.admits(&HeaderMap::new(), "/failsafe", b"{}"));
        assert!(!alone.admits(&headers(&[(header::ORIGIN, "http://example.org")]), "/failsafe", b"{}"));
        assert!(!kin("secret", "/service/main/", false).admits(&HeaderMap::new(), "/failsafe", b"{}"));
    }
}
