//! The signature of a push announcement: GitHub's, Gitea's and everybody's `X-Hub-Signature-256`.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Whether `header` is `sha256=` and the HMAC of `body` in hexadecimal. Compared in constant time.
#[must_use]
pub(super) fn is_signed(secret: &[u8], body: &[u8], header: &str) -> bool {
    let Some(signature) = header.strip_prefix("sha256=").and_then(hex) else { return false };
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret) else { return false };
    mac.update(body);
    mac.verify_slice(&signature).is_ok()
}

fn hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok())).collect();
    let digits = digits.filter(|d| d.len() == 64)?;
    Some(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

#[cfg(test)]
mod tests {
    use super::is_signed;

    #[test]
    fn the_example_of_githubs_documentation_is_signed() {
        let signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
        let check = |secret: &str, body: &str, header: &str| is_signed(secret.as_bytes(), body.as_bytes(), header);
        assert!(check("It's a Secret to Everybody", "Hello, World!", signature));
        assert!(!check("It's a Secret to Everybody", "Hello, World", signature));
        assert!(!check("it's a secret", "Hello, World!", signature));
        for bad in ["", "sha256=", "sha1=757107ea", &signature[..70], &signature.replace('7', "ß")] {
            assert!(!check("It's a Secret to Everybody", "Hello, World!", bad), "{bad}");
        }
    }
}
