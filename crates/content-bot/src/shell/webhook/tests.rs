//! Requests as the forges' documentation shows them.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use bots_core::shell::Secret;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::{Announcement, Reference, Sender, Verdict, judge, trust};

const TIP: &str = "6113728f27ae82c7b1a177c8d03f9e96e0adf246";
const NOW_S: u64 = 1_700_000_000;

fn headers(given: &[(&str, &str)]) -> HeaderMap {
    let one = |(name, value): &(&str, &str)| {
        (HeaderName::try_from(*name).expect("a name"), HeaderValue::from_str(value).expect("a value"))
    };
    given.iter().map(one).collect()
}

fn mac(secret: &str, text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("any length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

fn hex(secret: &str, text: &str) -> String {
    mac(secret, text).iter().map(|b| format!("{b:02x}")).collect()
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits: String = bytes.iter().map(|b| format!("{b:08b}")).collect();
    let groups = bits.as_bytes().chunks(6).map(|six| {
        let text = format!("{:0<6}", std::str::from_utf8(six).expect("ASCII"));
        char::from(DIGITS[usize::from_str_radix(&text, 2).expect("bits")])
    });
    let coded: String = groups.collect();
    format!("{coded}{}", "=".repeat((4 - coded.len() % 4) % 4))
}

fn judged(given: &[(&str, &str)], body: &str) -> Verdict {
    let secrets = [Secret::new("old"), Secret::new("new")];
    judge(&headers(given), body.as_bytes(), &secrets, None, &Reference::parse("main"), NOW_S)
}

/// The commit that an accepted push names, if any.
fn tip(verdict: Verdict) -> Option<String> {
    match verdict {
        Verdict::Push(Announcement { delivery, tip }) => {
            assert!(delivery.is_some(), "every signed delivery can be known again");
            tip
        }
        other @ (Verdict::Ping | Verdict::Other(_) | Verdict::Refused(_)) => panic!("not a push: {other:?}"),
    }
}

#[test]
fn github_pushes_pings_and_rotates_its_secret() {
    let body = format!(r#"{{"ref":"refs/heads/main","before":"{}","after":"{TIP}"}}"#, "0".repeat(40));
    for secret in ["old", "new"] {
        let signature = format!("sha256={}", hex(secret, &body));
        let push = judged(&[("X-GitHub-Event", "push"), ("X-Hub-Signature-256", &signature)], &body);
        assert_eq!(tip(push).as_deref(), Some(TIP));
        let ping = [("X-GitHub-Event", "ping"), ("X-Hub-Signature-256", &*signature)];
        assert_eq!(judged(&ping, &body), Verdict::Ping);
        let star = [("X-GitHub-Event", "star"), ("X-Hub-Signature-256", &*signature)];
        assert!(matches!(judged(&star, &body), Verdict::Other(_)));
    }
    let wrong = format!("sha256={}", hex("older", &body));
    let refused = judged(&[("X-GitHub-Event", "ping"), ("X-Hub-Signature-256", &wrong)], &body);
    assert!(matches!(refused, Verdict::Refused(why) if why.contains("X-Hub-Signature-256")), "{refused:?}");
    // GitHub's own default is a form, which is signed as it is.
    let form = "payload=%7B%22ref%22%3A%22refs%2Fheads%2Fmain%22%7D";
    let signature = format!("sha256={}", hex("new", form));
    assert_eq!(tip(judged(&[("X-GitHub-Event", "push"), ("X-Hub-Signature-256", &signature)], form)), None);
}

#[test]
fn gitlab_shows_its_token() {
    let body = format!(r#"{{"object_kind":"push","ref":"refs/heads/main","after":"{TIP}"}}"#);
    let given = |token, event| {
        judged(&[("X-Gitlab-Event", event), ("X-Gitlab-Token", token), ("X-Gitlab-Event-UUID", "1")], &body)
    };
    assert_eq!(tip(given("new", "Push Hook")).as_deref(), Some(TIP));
    assert!(matches!(given("new", "Issue Hook"), Verdict::Other(_)));
    assert!(matches!(given("newer", "Push Hook"), Verdict::Refused(_)));
}

#[test]
fn gitea_and_forgejo_sign_without_a_prefix() {
    let body = format!(r#"{{"ref":"refs/heads/main","after":"{TIP}"}}"#);
    let signature = hex("new", &body);
    let gitea = [("X-Gitea-Event", "push"), ("X-Gitea-Signature", &*signature), ("X-Hub-Signature-256", "sha256=00")];
    assert_eq!(tip(judged(&gitea, &body)).as_deref(), Some(TIP));
    let forgejo = [("X-Forgejo-Event", "push"), ("X-Forgejo-Signature", &*signature)];
    assert_eq!(tip(judged(&forgejo, &body)).as_deref(), Some(TIP));
    assert!(matches!(judged(&[("X-Gitea-Signature", &signature[1..])], &body), Verdict::Refused(_)));
}

#[test]
fn bitbucket_cloud_and_data_center_are_read() {
    let cloud = format!(
        r#"{{"push":{{"changes":[{{"new":{{"type":"branch","name":"main","target":{{"hash":"{TIP}"}}}},"old":null}}]}}}}"#
    );
    let server =
        format!(r#"{{"changes":[{{"ref":{{"id":"refs/heads/main"}},"refId":"refs/heads/main","toHash":"{TIP}"}}]}}"#);
    for (event, body) in [("repo:push", cloud), ("repo:refs_changed", server)] {
        let signature = format!("sha256={}", hex("old", &body));
        let given = [("X-Event-Key", event), ("X-Hub-Signature", &*signature)];
        assert_eq!(tip(judged(&given, &body)).as_deref(), Some(TIP), "{event}");
    }
    let signature = format!("sha256={}", hex("old", "{}"));
    assert_eq!(judged(&[("X-Event-Key", "diagnostics:ping"), ("X-Hub-Signature", &signature)], "{}"), Verdict::Ping);
}

#[test]
fn a_standard_webhook_has_a_signed_time() {
    let body = r#"{"ref":"refs/heads/main"}"#;
    let given = |id: &str, sent: u64, signature: &str| {
        let sent = sent.to_string();
        judged(&[("webhook-id", id), ("webhook-timestamp", &sent), ("webhook-signature", signature)], body)
    };
    let signed = |sent: u64| format!("v1a,xx v1,{}", base64(&mac("new", &format!("m1.{sent}.{body}"))));
    assert_eq!(tip(given("m1", NOW_S - 299, &signed(NOW_S - 299))), None);
    assert!(matches!(given("m2", NOW_S, &signed(NOW_S)), Verdict::Refused(_)), "the number is signed");
    assert!(matches!(given("m1", NOW_S + 1, &signed(NOW_S)), Verdict::Refused(_)), "the time is signed");
    for off in [NOW_S - 301, NOW_S + 301] {
        let refused = given("m1", off, &signed(off));
        assert!(matches!(refused, Verdict::Refused(why) if why.contains("five minutes")), "{refused:?}");
    }
}

#[test]
fn what_cannot_be_ours_costs_no_look() {
    let signed = |body: &str, reference: &str| {
        let signature = format!("sha256={}", hex("new", body));
        let given = headers(&[("X-GitHub-Event", "push"), ("X-Hub-Signature-256", &signature)]);
        judge(&given, body.as_bytes(), &[Secret::new("new")], None, &Reference::parse(reference), NOW_S)
    };
    let body = r#"{"ref":"refs/heads/topic"}"#;
    assert!(matches!(signed(body, "main"), Verdict::Other(_)));
    for reference in ["topic", "refs/heads/topic", "HEAD"] {
        assert!(matches!(signed(body, reference), Verdict::Push(_)), "{reference}");
    }
    // What is not understood is looked into.
    for body in ["", "[]", "null", r#"{"ref":7}"#, r#"{"ref":"main"}"#] {
        assert!(matches!(signed(body, "main"), Verdict::Push(_)), "{body}");
    }
    // A branch that was deleted points at no commit.
    let deleted = format!(r#"{{"ref":"refs/heads/main","after":"{}"}}"#, "0".repeat(40));
    assert_eq!(tip(signed(&deleted, "main")), None);
}

#[test]
fn the_path_can_say_who_may_send() {
    let body = "{}";
    let signature = format!("sha256={}", hex("new", body));
    let given = headers(&[("X-Hub-Signature-256", &signature)]);
    let by = |only| judge(&given, body.as_bytes(), &[Secret::new("new")], only, &Reference::parse("main"), NOW_S);
    assert!(matches!(by(Sender::named("github")), Verdict::Push(_)));
    assert!(matches!(by(Sender::named("gitlab")), Verdict::Refused(_)));
    assert!(matches!(judged(&[], body), Verdict::Refused(why) if why.contains("missing")));
    assert_eq!(trust(&headers(&[]), b"", &Reference::parse("main")), Verdict::Push(Announcement::default()));
}

mod any {
    //! Whatever is sent, it is judged: nothing panics, and nothing unsigned is taken.

    use axum::http::{HeaderMap, HeaderValue};
    use bots_core::shell::Secret;
    use proptest::prelude::*;

    use super::{Reference, Verdict, hex, judge};

    const HEADERS: [&str; 10] = [
        "x-github-event",
        "x-hub-signature-256",
        "x-hub-signature",
        "x-gitlab-token",
        "x-gitlab-event",
        "x-gitea-signature",
        "x-event-key",
        "webhook-id",
        "webhook-timestamp",
        "webhook-signature",
    ];

    fn map(given: Vec<(usize, Vec<u8>)>) -> HeaderMap {
        let one =
            |(at, value): (usize, Vec<u8>)| Some((HEADERS[at].parse().ok()?, HeaderValue::from_bytes(&value).ok()?));
        given.into_iter().filter_map(one).collect()
    }

    proptest! {
        #[test]
        fn strangers_are_refused(
            given in prop::collection::vec((0..HEADERS.len(), prop::collection::vec(any::<u8>(), 0..80)), 0..8),
            body in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let secrets = [Secret::new("a secret that nobody guesses")];
            let verdict = judge(&map(given), &body, &secrets, None, &Reference::parse("main"), 0);
            prop_assert!(matches!(verdict, Verdict::Refused(_)), "{verdict:?}");
        }

        #[test]
        fn any_signed_body_is_read(
            body in r#"(\{"(ref|after|push|changes)":("[^"]{0,60}"|[0-9]{1,5}|\[\]|\{"changes":\[\{"new":null\}\]\}|null)\})|.{0,200}"#,
            event in "[a-zA-Z:]{0,12}",
        ) {
            let signature = format!("sha256={}", hex("s", &body));
            let given = [("x-hub-signature-256", signature), ("x-github-event", event)];
            let headers = super::headers(&given.each_ref().map(|(n, v)| (*n, v.as_str())));
            let verdict = judge(&headers, body.as_bytes(), &[Secret::new("s")], None, &Reference::parse("main"), 0);
            prop_assert!(!matches!(verdict, Verdict::Refused(_)), "{verdict:?}");
        }
    }
}
