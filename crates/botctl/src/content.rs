//! `botctl content`: what is published and what was, and what an operator may ask of it. Pure; [`crate::publish`] carries it out.

use bots_core::{
    dcs::{Compare, Scope, Transaction, Write},
    wire::{Canary, ContentFacts, ContentRevision, Pin, Promotion, PublicationHistory, Published, Quarantined},
};
use serde::Serialize;

use crate::{
    args::{Content, Format},
    failure::Failure,
    fleet::ScopeView,
    text,
};

/// One commit, as `content list` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Row {
    state: &'static str,
    sha: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    for_ms: Option<u64>,
    note: String,
}

/// What is asked, and what to wait for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// One line for the operator: what it means.
    pub(crate) meaning: String,
    /// Whether it is asked before it is done.
    pub(crate) asks: bool,
    pub(crate) transaction: Transaction,
    /// The commit that is live in the end, if one shall be.
    pub(crate) live: Option<String>,
}

/// The commits of a scope: what is live and on its way, what was, and what must not be.
pub(crate) fn render(scope: &str, view: &ScopeView, now_unix_ms: u64, format: Format) -> Result<String, Failure> {
    let rows = rows(view, now_unix_ms);
    if rows.is_empty() {
        return Err(Failure::failed(format!("{scope} has published nothing yet: is it a content scope?")));
    }
    let cells = |row: &Row| {
        let generation = row.generation.map(|g| g.to_string()).unwrap_or_default();
        let age = row.for_ms.map(text::duration).unwrap_or_default();
        vec![row.state.to_owned(), generation, text::short(&row.sha).to_owned(), age, row.note.clone()]
    };
    Ok(match format {
        Format::Json => text::json(&rows),
        Format::Yaml => text::yaml(&rows),
        Format::Table => {
            let headings = ["STATE", "GENERATION", "COMMIT", "SINCE", "NOTE"];
            text::table(&headings, &[1], rows.iter().map(cells).collect()) + "\n"
        }
    })
}

fn rows(view: &ScopeView, now_unix_ms: u64) -> Vec<Row> {
    let age = |since: u64| Some(now_unix_ms.saturating_sub(since)).filter(|_| since > 0);
    let of = |state, revision: ContentRevision, for_ms| Row {
        state,
        sha: revision.sha,
        generation: Some(revision.generation),
        for_ms,
        note: revision.subject,
    };
    let past = history(view);
    let live = view.json::<ContentRevision>("revision/live");
    let went_live = past.iter().rev().find(|p| live.as_ref().is_some_and(|l| l.generation == p.generation));
    let live_since = went_live.map(|p| p.since_unix_ms).unwrap_or_default();
    let mut rows = Vec::new();
    if let Some(pin) = view.json::<Pin>("revision/pin") {
        let note = String::from("nothing else is published until `botctl content unpin`");
        rows.push(Row { state: "pinned", sha: pin.sha, generation: None, for_ms: age(pin.since_unix_ms), note });
    }
    rows.extend(view.json::<ContentRevision>("revision/candidate").map(|c| {
        let detected = age(c.detected_unix_ms);
        of("candidate", c, detected)
    }));
    rows.extend(view.json::<Canary>("revision/canary").map(|c| Row {
        state: "canary",
        sha: c.sha,
        generation: None,
        for_ms: age(c.since_unix_ms),
        note: format!("{} tries it", c.member),
    }));
    rows.extend(live.clone().map(|l| of("live", l, age(live_since))));
    let earlier = past.iter().rev().filter(|p| live.as_ref().is_none_or(|l| l.generation != p.generation));
    rows.extend(earlier.map(|p| Row {
        state: "past",
        sha: p.sha.clone(),
        generation: Some(p.generation),
        for_ms: age(p.since_unix_ms),
        note: p.subject.clone(),
    }));
    rows.extend(quarantined(view).map(|(sha, mark)| Row {
        state: "quarantined",
        sha: sha.to_owned(),
        generation: None,
        for_ms: age(mark.since_unix_ms),
        note: mark.reason,
    }));
    rows
}

fn history(view: &ScopeView) -> Vec<Published> {
    view.json::<PublicationHistory>("revision/history").unwrap_or_default().0
}

fn quarantined(view: &ScopeView) -> impl Iterator<Item = (&str, Quarantined)> {
    view.keys.iter().filter_map(|(key, kv)| {
        let sha = key.strip_prefix("revision/quarantine/")?;
        let unread = Quarantined { reason: String::from("its mark cannot be read"), since_unix_ms: 0 };
        Some((sha, serde_json::from_str(&kv.value).unwrap_or(unread)))
    })
}

/// Why a commit is live, or is not.
pub(crate) fn why(scope: &str, view: &ScopeView, commit: &str) -> Result<String, Failure> {
    let sha = resolve(scope, view, commit)?;
    let short = text::short(&sha);
    let reason = if let Some((_, mark)) = quarantined(view).find(|(marked, _)| *marked == sha) {
        format!("is quarantined: {} (`botctl content unquarantine {scope} {short}` has it tried again)", mark.reason)
    } else if let Some(live) = view.json::<ContentRevision>("revision/live").filter(|live| live.sha == sha) {
        format!("is live, as generation {}", live.generation)
    } else if let Some(canary) = view.json::<Canary>("revision/canary").filter(|canary| canary.sha == sha) {
        format!("is on trial: {} serves it before the others", canary.member)
    } else if view.json::<ContentRevision>("revision/candidate").is_some_and(|c| c.sha == sha) {
        let held =
            leaders_trouble(view).map_or_else(String::new, |trouble| format!("; its content bot says: {trouble}"));
        format!("is the candidate: it goes live when every serving web bot has prepared it{held}")
    } else if let Some(past) = history(view).iter().rev().find(|past| past.sha == sha) {
        format!("was live, as generation {}: another commit has been published since", past.generation)
    } else {
        format!("is not known to {scope}: it was never found at the origin, or is long forgotten")
    };
    Ok(format!("commit {sha} {reason}\n"))
}

/// What the scope's leader says to be in its way.
fn leaders_trouble(view: &ScopeView) -> Option<String> {
    let leader = view.members.values().find(|member| member.head.role == "leader")?;
    leader.facts::<ContentFacts>()?.trouble
}

impl Plan {
    /// Checks what is asked against what the store shows.
    pub(crate) fn new(scope: &Scope, view: &ScopeView, asked: &Content, now_unix_ms: u64) -> Result<Self, Failure> {
        let name = scope.name();
        match asked {
            Content::Promote { .. } => promote(scope, view),
            Content::Pin { commit, .. } => {
                let sha = resolve(name, view, commit)?;
                pin(scope, view, &sha, now_unix_ms, Vec::new())
            }
            Content::Rollback { to, .. } => {
                let sha = match to {
                    Some(commit) => resolve(name, view, commit)?,
                    None => last_good(name, view)?,
                };
                // Relative to what was seen: if something else went live meanwhile, it is not what was meant.
                let unchanged =
                    view.keys.get("revision/live").map(|kv| Compare::ModifiedAt(scope.revision_live(), kv.modified));
                pin(scope, view, &sha, now_unix_ms, unchanged.into_iter().collect())
            }
            Content::Unpin { .. } => {
                let Some(kv) = view.keys.get("revision/pin") else {
                    return Err(Failure::failed(format!("{name} has no pin: what the branch points at is published")));
                };
                let unchanged = Compare::ModifiedAt(scope.revision_pin(), kv.modified);
                Ok(Self {
                    meaning: format!("{name} publishes what its branch or tag points at again"),
                    asks: false,
                    transaction: Transaction::new(vec![unchanged], vec![Write::delete(scope.revision_pin())]),
                    live: None,
                })
            }
            Content::Unquarantine { commit, .. } => unquarantine(scope, view, commit),
            Content::List { .. } | Content::Why { .. } => Err(Failure::usage("this changes nothing")),
        }
    }
}

fn promote(scope: &Scope, view: &ScopeView) -> Result<Plan, Failure> {
    let name = scope.name();
    let candidate = view.json::<ContentRevision>("revision/candidate").zip(view.keys.get("revision/candidate"));
    let Some((candidate, kv)) = candidate else {
        return Err(Failure::failed(format!(
            "{name} has no candidate: `botctl content list {name}` shows what there is"
        )));
    };
    let unchanged = Compare::ModifiedAt(scope.revision_candidate(), kv.modified);
    let promotion = Promotion { sha: candidate.sha.clone() };
    let put = Write::put(scope.revision_promote(), serde_json::to_string(&promotion).unwrap_or_default());
    Ok(Plan {
        meaning: format!(
            "{} goes live in {name} untried, as soon as one web bot could serve it",
            text::short(&candidate.sha)
        ),
        asks: true,
        transaction: Transaction::new(vec![unchanged], vec![put]),
        live: Some(candidate.sha),
    })
}

fn pin(scope: &Scope, view: &ScopeView, sha: &str, now_unix_ms: u64, compare: Vec<Compare>) -> Result<Plan, Failure> {
    let (name, short) = (scope.name(), text::short(sha));
    if let Some((_, mark)) = quarantined(view).find(|(marked, _)| *marked == sha) {
        let fix = format!("`botctl content unquarantine {name} {short}` first, if it is good");
        return Err(Failure::failed(format!("{short} is quarantined: {}: {fix}", mark.reason)));
    }
    let value = Pin { sha: sha.to_owned(), since_unix_ms: now_unix_ms };
    let put = Write::put(scope.revision_pin(), serde_json::to_string(&value).unwrap_or_default());
    Ok(Plan {
        meaning: format!("{short} is published in {name}, and nothing else until `botctl content unpin {name}`"),
        asks: true,
        transaction: Transaction::new(compare, vec![put]),
        live: Some(sha.to_owned()),
    })
}

/// What was live before what is live now, and is not quarantined.
fn last_good(name: &str, view: &ScopeView) -> Result<String, Failure> {
    let live = view.json::<ContentRevision>("revision/live").map(|live| live.sha).unwrap_or_default();
    let is_good = |past: &&Published| past.sha != live && quarantined(view).all(|(sha, _)| sha != past.sha);
    let past = history(view);
    let before = past.iter().rev().find(is_good).map(|past| past.sha.clone());
    before.ok_or_else(|| Failure::failed(format!("{name} has published nothing before that could be gone back to")))
}

fn unquarantine(scope: &Scope, view: &ScopeView, commit: &str) -> Result<Plan, Failure> {
    let name = scope.name();
    let found: Vec<&str> = quarantined(view).map(|(sha, _)| sha).filter(|sha| sha.starts_with(commit)).collect();
    match found[..] {
        [sha] => Ok(Plan {
            meaning: format!("{} is tried again in {name}", text::short(sha)),
            asks: false,
            transaction: Transaction::new(Vec::new(), vec![Write::delete(scope.quarantine(sha))]),
            live: None,
        }),
        [] => Err(Failure::not_found(format!("no commit of {name} that begins with {commit} is quarantined"))),
        ref several => Err(Failure::usage(format!("{commit} may be {}: give more digits", several.join(" or ")))),
    }
}

/// The commit that the first digits mean; one that the scope does not know must be given in full.
fn resolve(name: &str, view: &ScopeView, commit: &str) -> Result<String, Failure> {
    let commit = commit.to_ascii_lowercase();
    let hex = commit.bytes().all(|b| b.is_ascii_hexdigit());
    if !hex || commit.len() < 4 || commit.len() > 40 {
        return Err(Failure::usage(format!("`{commit}` is no commit: give 4 to 40 hex digits")));
    }
    if commit.len() == 40 {
        return Ok(commit);
    }
    let mut known: Vec<String> =
        rows(view, 0).into_iter().map(|row| row.sha).filter(|sha| sha.starts_with(&commit)).collect();
    known.sort();
    known.dedup();
    match &known[..] {
        [sha] => Ok(sha.clone()),
        [] => Err(Failure::not_found(format!("{name} knows no commit that begins with {commit}: give all 40 digits"))),
        several => Err(Failure::usage(format!("{commit} may be {}: give more digits", several.join(" or ")))),
    }
}

#[cfg(test)]
mod tests {
    use bots_core::{
        dcs::{Compare, Scope, Write},
        wire::Member,
    };

    use super::{Plan, render, why};
    use crate::{
        args::{Content, Format},
        fleet::{Fleet, ScopeView, samples},
    };

    const PAST: &str = "0123456701234567012345670123456701234567";
    const BAD: &str = "bad0bad0bad0bad0bad0bad0bad0bad0bad0bad0";

    fn view() -> ScopeView {
        let mut entries = samples::fleet();
        let history = format!(
            r#"[{{"sha":"{BAD}","generation":1,"subject":"Oops","since_unix_ms":1800000000000}},{{"sha":"{PAST}","generation":2,"subject":"Old header","since_unix_ms":1800000040000}},{{"sha":"aaaaaaaabbbbbbbbccccccccddddddddeeeeeeee","generation":3,"subject":"New header","since_unix_ms":1800000090000}}]"#
        );
        entries.push(samples::entry("site/revision/history", &history));
        let mark = r#"{"reason":"verify.command says no (exit code 1): broken link","since_unix_ms":1800000095000}"#;
        entries.push(samples::entry(&format!("site/revision/quarantine/{BAD}"), mark));
        Fleet::of("service", &entries).scopes["site"].clone()
    }

    fn plan(asked: &Content) -> Result<Plan, String> {
        let scope = Scope::new("service", "site").unwrap();
        Plan::new(&scope, &view(), asked, samples::NOW).map_err(|failure| failure.message)
    }

    fn site() -> String {
        String::from("site")
    }

    #[test]
    fn commits_are_listed_with_what_became_of_them() {
        let got = render("site", &view(), samples::NOW, Format::Table).unwrap_or_else(|f| f.message);
        let want = "STATE        GENERATION  COMMIT   SINCE       NOTE\n\
                    candidate             4  1111111\n\
                    live                  3  aaaaaaa  10 s        New header\n\
                    past                  2  0123456  1 min 0 s   Old header\n\
                    past                  1  bad0bad  1 min 40 s  Oops\n\
                    quarantined              bad0bad  5 s         verify.command says no (exit code 1): broken link\n";
        assert_eq!(got, want);
        assert!(render("gone", &ScopeView::default(), 0, Format::Table).is_err());
    }

    #[test]
    fn a_rollback_pins_what_was_live_before_and_is_good() {
        let rollback = plan(&Content::Rollback { scope: site(), to: None, force: true, timeout: 1 }).unwrap();
        assert_eq!(rollback.live.as_deref(), Some(PAST));
        let scope = Scope::new("service", "site").unwrap();
        assert!(
            matches!(&rollback.transaction.compare[..], [Compare::ModifiedAt(key, _)] if *key == scope.revision_live())
        );
        let value = format!(r#"{{"sha":"{PAST}","since_unix_ms":{}}}"#, samples::NOW);
        assert_eq!(rollback.transaction.then, [Write::put(scope.revision_pin(), value)]);
        let refused = plan(&Content::Pin { scope: site(), commit: String::from("bad0"), force: true, timeout: 1 });
        assert!(refused.as_ref().is_err_and(|why| why.contains("broken link")), "{refused:?}");
        let unknown = plan(&Content::Pin { scope: site(), commit: String::from("fffff"), force: true, timeout: 1 });
        assert!(unknown.as_ref().is_err_and(|why| why.contains("all 40 digits")), "{unknown:?}");
        assert!(plan(&Content::Unpin { scope: site() }).is_err_and(|why| why.contains("no pin")));
    }

    #[test]
    fn a_candidate_is_promoted_and_a_mark_is_taken_away() {
        let promote = plan(&Content::Promote { scope: site(), force: true, timeout: 1 }).unwrap();
        assert_eq!(promote.live.as_deref(), Some("1111111122222222333333334444444455555555"));
        let scope = Scope::new("service", "site").unwrap();
        let lifted = plan(&Content::Unquarantine { scope: site(), commit: String::from("bad0") }).unwrap();
        assert_eq!(lifted.transaction.then, [Write::delete(scope.quarantine(BAD))]);
        assert!(plan(&Content::Unquarantine { scope: site(), commit: String::from("0123") }).is_err());
    }

    #[test]
    fn a_candidate_that_is_held_has_the_reason_of_its_content_bot() {
        let mut view = view();
        let leader =
            r#"{"kind":"content","state":"preparing","role":"leader","trouble":"none of web-1 has prepared it"}"#;
        view.members.extend(Member::from_json(leader).map(|leader| (String::from("content-1"), leader)));
        let got = why("site", &view, "1111").unwrap_or_else(|f| f.message);
        assert!(got.ends_with("its content bot says: none of web-1 has prepared it\n"), "{got}");
    }

    #[test]
    fn every_commit_has_a_reason() {
        let check = |commit: &str, what: &str| {
            let got = why("site", &view(), commit).unwrap_or_else(|f| f.message);
            assert!(got.contains(what), "{commit}: {got}");
        };
        check("aaaaaaa", "is live, as generation 3");
        check("1111", "is the candidate: it goes live when every serving web bot has prepared it\n");
        check("0123", "was live, as generation 2");
        check("bad0", "is quarantined: verify.command says no");
        check(&"e".repeat(40), "is not known to site");
        check("xyz!", "is no commit");
    }
}
