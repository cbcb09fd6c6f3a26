//! What announcements are authenticated by: HMAC-SHA256 of what was sent, or a token. Compared in constant time, with every
//! secret that is in force, so that a new one can be put beside the old one before the sender changes.

use bots_core::shell::Secret;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use super::base64;

/// The prefix of secrets in the form of Standard Webhooks: what follows is base64.
const STANDARD_PREFIX: &str = "whsec_";

/// Whether `signature` is the HMAC of `parts`, one after the other, with one of the secrets.
pub(super) fn is_hmac(secrets: &[Secret], parts: &[&[u8]], signature: &[u8]) -> bool {
    // Every secret is tried, so that the time does not tell which one it is.
    secrets.iter().fold(false, |found, secret| found | is_hmac_with(key(secret).as_slice(), parts, signature))
}

fn is_hmac_with(secret: &[u8], parts: &[&[u8]], signature: &[u8]) -> bool {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret) else { return false };
    for part in parts {
        mac.update(part);
    }
    mac.verify_slice(signature).is_ok()
}

/// Whether `given` is one of the secrets.
pub(super) fn is_token(secrets: &[Secret], given: &str) -> bool {
    // Equality of secrets takes the same time wherever they differ.
    let given = Secret::new(given);
    secrets.iter().fold(false, |found, secret| found | (*secret == given))
}

/// A name for a delivery that tells it from any other; no secret can be read from it.
pub(super) fn delivery_id(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_be_bytes());
        hash.update(part);
    }
    // Eight bytes: no two deliveries of a scope meet by chance, and the window stays small in etcd.
    hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect()
}

/// The signature in `sha256=<64 digits>` or, without the prefix, the digits alone.
pub(super) fn hex_signature(header: &str) -> Option<Vec<u8>> {
    let text = header.strip_prefix("sha256=").unwrap_or(header);
    let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok())).collect();
    let digits = digits.filter(|d| d.len() == 64)?;
    Some(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

fn key(secret: &Secret) -> Vec<u8> {
    let text = secret.expose();
    let coded = text.strip_prefix(STANDARD_PREFIX).and_then(base64::decode);
    coded.unwrap_or_else(|| text.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use bots_core::shell::Secret;

    use super::{hex_signature, is_hmac, is_token};

    #[test]
    fn the_example_of_githubs_documentation_is_signed() {
        let signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
        let check = |secret: &str, body: &str, header: &str| {
            let secrets = [Secret::new("an older one"), Secret::new(secret)];
            hex_signature(header).is_some_and(|s| is_hmac(&secrets, &[body.as_bytes()], &s))
        };
        assert!(check("It's a Secret to Everybody", "Hello, World!", signature));
        assert!(!check("It's a Secret to Everybody", "Hello, World", signature));
        assert!(!check("it's a secret", "Hello, World!", signature));
        for bad in ["", "sha256=", "sha1=757107ea", &signature[..70], &signature.replace('7', "ß")] {
            assert!(!check("It's a Secret to Everybody", "Hello, World!", bad), "{bad}");
        }
    }

    /// <https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>
    #[test]
    fn the_example_of_standard_webhooks_is_signed() {
        let secrets = [Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")];
        let signature = super::base64::decode("g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=").expect("base64");
        let body = br#"{"test": 2432232314}"#;
        assert!(is_hmac(&secrets, &[b"msg_p5jXN8AQM9LWM0D4loKWxJek", b".", b"1614265330", b".", body], &signature));
    }

    #[test]
    fn any_secret_in_force_is_a_token() {
        let secrets = [Secret::new("old"), Secret::new("new")];
        assert!(is_token(&secrets, "old") && is_token(&secrets, "new"));
        assert!(!is_token(&secrets, "") && !is_token(&secrets, "ne") && !is_token(&[], ""));
    }
}
