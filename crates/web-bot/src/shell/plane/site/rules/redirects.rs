//! `_redirects`: one rule a line, `from to [status]`. The first that fits counts. A rule leaves a file that exists alone,
//! unless its status ends with `!`.

use std::collections::BTreeMap;

use hyper::{StatusCode, header::HeaderValue};

use super::{
    Outcome,
    pattern::{Captures, Pattern, is_name, key},
};
use crate::shell::plane::site::decode;

/// The most rules: those with placeholders are tried one after another at each request.
const RULES_MAX: usize = 2_000;
const PLACEHOLDER_RULES_MAX: usize = 100;

/// A redirect rule's default: what search engines and browsers remember.
const STATUS_DEFAULT: StatusCode = StatusCode::MOVED_PERMANENTLY;

/// All rules.
#[derive(Debug, Default)]
pub(super) struct Redirects {
    rules: Vec<Rule>,
    /// The rules for one path each, by that path.
    literal: BTreeMap<String, usize>,
    /// The others, in their order.
    others: Vec<usize>,
}

#[derive(Debug)]
struct Rule {
    from: Pattern,
    to: String,
    status: StatusCode,
    force: bool,
}

impl Redirects {
    pub(super) const fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Reads the file; what is wrong is told with the number of its line.
    pub(super) fn read(text: &str) -> Result<Self, (usize, String)> {
        let mut redirects = Self::default();
        for (number, line) in (1..).zip(text.lines()) {
            if let Some(rule) = Rule::read(line).map_err(|why| (number, why))? {
                redirects.add(rule).map_err(|why| (number, why))?;
            }
        }
        Ok(redirects)
    }

    fn add(&mut self, rule: Rule) -> Result<(), String> {
        let index = self.rules.len();
        match rule.from.literal() {
            // Of two rules for one path the first counts; one that is forced counts beside one that is not.
            Some(path) if !self.literal.contains_key(&path) => drop(self.literal.insert(path, index)),
            Some(_) | None => self.others.push(index),
        }
        self.rules.push(rule);
        if self.rules.len() > RULES_MAX || self.others.len() > PLACEHOLDER_RULES_MAX {
            return Err(format!(
                "more than {RULES_MAX} rules, or more than {PLACEHOLDER_RULES_MAX} with placeholders: join some of them"
            ));
        }
        Ok(())
    }

    pub(super) fn find(&self, path: &str, query: Option<&str>, exists: bool) -> Option<Outcome> {
        if self.rules.is_empty() {
            return None;
        }
        let plain = decode(path)?;
        let plain = key(plain.trim_matches('/').split('/'));
        let literal = self.literal.get(&plain).copied();
        let mut candidates: Vec<usize> = self.others.iter().copied().chain(literal).collect();
        candidates.sort_unstable();
        candidates.into_iter().find_map(|index| {
            let rule = self.rules.get(index).filter(|rule| rule.force || !exists)?;
            rule.from.matches(path).and_then(|captures| rule.outcome(&captures, query))
        })
    }
}

impl Rule {
    fn read(line: &str) -> Result<Option<Self>, String> {
        let words: Vec<&str> = line.split_whitespace().take_while(|word| !word.starts_with('#')).collect();
        let (from, to, status) = match words.as_slice() {
            [] => return Ok(None),
            [from, to] => (from, to, None),
            [from, to, status] => (from, to, Some(status)),
            [_] => return Err(String::from("one word: write `/from /to 301`")),
            _ => {
                return Err(String::from("more than three words: conditions are not supported, write `/from /to 301`"));
            }
        };
        let from = Pattern::read(from)?;
        let is_path = to.starts_with('/');
        if !is_path && !to.starts_with("https://") && !to.starts_with("http://") {
            return Err(format!(
                "`{to}` is neither a path nor a URL: begin it with a slash or https:// (query parameters are not supported)"
            ));
        }
        if HeaderValue::from_str(to).is_err() || !to.is_ascii() {
            return Err(format!("`{to}` has characters that a URL must write as %XX"));
        }
        if let Some(unknown) = placeholders(to).find(|name| from.names().all(|known| known != *name)) {
            return Err(format!("`:{unknown}` in `{to}` is not in what it is made from"));
        }
        let (status, force) = status.map_or(Ok((STATUS_DEFAULT, false)), |text| status_of(text))?;
        if matches!(status, StatusCode::OK | StatusCode::NOT_FOUND) && !is_path {
            return Err(format!("status {} needs a path of this site, not `{to}`", status.as_u16()));
        }
        Ok(Some(Self { from, to: (*to).to_owned(), status, force }))
    }

    /// Nothing if what was sent cannot be put into a header.
    fn outcome(&self, captures: &Captures<'_>, query: Option<&str>) -> Option<Outcome> {
        let mut target = fill(&self.to, captures);
        if target.starts_with('/') {
            // Two slashes, or what browsers take for a slash, would name another host.
            target = format!("/{}", target.trim_start_matches(['/', '\\']));
        }
        if matches!(self.status, StatusCode::OK | StatusCode::NOT_FOUND) {
            let path = target.split(['?', '#']).next().unwrap_or_default().to_owned();
            return Some(Outcome::Rewrite { status: self.status, path });
        }
        if let Some(query) = query.filter(|_| !target.contains('?')) {
            let (before, fragment) = target.split_once('#').map_or((target.as_str(), None), |(b, f)| (b, Some(f)));
            target = format!("{before}?{query}{}", fragment.map_or_else(String::new, |f| format!("#{f}")));
        }
        let location = HeaderValue::from_str(&target).ok()?;
        Some(Outcome::Elsewhere { status: self.status, location })
    }
}

fn status_of(text: &str) -> Result<(StatusCode, bool), String> {
    let (number, force) = text.strip_suffix('!').map_or((text, false), |number| (number, true));
    let status = number.parse().ok().filter(|n: &u16| [200, 301, 302, 303, 307, 308, 404].contains(n));
    status.and_then(|n| StatusCode::from_u16(n).ok()).map(|status| (status, force)).ok_or_else(|| {
        format!("status `{text}`: use 301, 302, 303, 307 or 308, or 200 or 404 to answer with another file")
    })
}

/// The names that a target uses: what follows a colon and begins with a letter.
fn placeholders(target: &str) -> impl Iterator<Item = &str> {
    target.split(':').skip(1).map(leading_name).filter(|name| is_name(name))
}

fn leading_name(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    text.split_at(end).0
}

fn fill(target: &str, captures: &Captures<'_>) -> String {
    let mut pieces = target.split(':');
    let mut filled = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let name = leading_name(piece);
        match captures.iter().find(|(known, _)| known == name) {
            Some((_, value)) => {
                filled.push_str(value);
                filled.push_str(piece.split_at(name.len()).1);
            }
            None => {
                filled.push(':');
                filled.push_str(piece);
            }
        }
    }
    filled
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: &str = "\
# old addresses
/home            /
/blog/:year/*    /archive/:splat?y=:year  302   # moved
/docs/*          https://docs.example:8443/v2/:splat  308
/app/*           /app/index.html  200
/forced          /other  301!
/gone/*          /410.html  404
/open/*          /:splat
";

    fn find(path: &str, query: Option<&str>, exists: bool) -> Option<(u16, String)> {
        let rules = Redirects::read(RULES).expect("good rules");
        rules.find(path, query, exists).map(|outcome| match outcome {
            Outcome::Elsewhere { status, location } => (status.as_u16(), location.to_str().expect("ascii").to_owned()),
            Outcome::Rewrite { status, path } => (status.as_u16(), path),
        })
    }

    #[test]
    fn rules_lead_elsewhere() {
        let check = |path: &str, query: Option<&str>, status: u16, target: &str| {
            assert_eq!(find(path, query, false), Some((status, target.to_owned())), "{path}");
        };
        check("/home", None, 301, "/");
        check("/home/", Some("a=b"), 301, "/?a=b");
        check("/blog/2026/a/b", Some("lost=1"), 302, "/archive/a/b?y=2026");
        check("/docs", None, 308, "https://docs.example:8443/v2/");
        check("/docs/x%20y", Some("q"), 308, "https://docs.example:8443/v2/x%20y?q");
        check("/app/deep/link", None, 200, "/app/index.html");
        check("/gone/1", None, 404, "/410.html");
        assert_eq!(find("/nothing", None, false), None);
    }

    #[test]
    fn files_go_first_unless_a_rule_is_forced() {
        assert_eq!(find("/home", None, true), None);
        assert_eq!(find("/forced", None, true), Some((301, String::from("/other"))));
    }

    #[test]
    fn no_rule_leads_to_a_host_that_it_does_not_name() {
        assert_eq!(find("/open///evil.example", None, false), Some((301, String::from("/evil.example"))));
        // What browsers take for a slash is no path of ours.
        assert_eq!(find("/open/\\evil.example", None, false), None);
    }

    #[test]
    fn bad_lines_are_named() {
        let check = |line: &str, expected: &str| {
            let (number, why) = Redirects::read(&format!("\n{line}")).expect_err(line);
            assert!(number == 2 && why.contains(expected) && !why.contains('\n'), "{line}: {why}");
        };
        check("/a", "one word");
        check("/a b", "`b`");
        check("a /b", "`a`");
        check("/a /b 309", "`309`");
        check("/a /:b", "`:b`");
        check("/a https://x.example/ 200", "status 200");
        check("/a /b 301 Country=at", "conditions");
        check("/a id=:id /b", "`id=:id`");
        check("/a /\u{e9}", "%XX");
    }

    proptest! {
        #[test]
        fn any_file_is_rules_or_an_error(text in "([/:*a-z#! 0-9?=.]{0,30}\n){0,8}", path in "/[ -~]{0,30}") {
            if let Ok(rules) = Redirects::read(&text)
                && let Some(Outcome::Elsewhere { location, .. }) = rules.find(&path, None, false)
            {
                let location = location.to_str().expect("ascii").to_owned();
                prop_assert!(!location.starts_with("//") && !location.starts_with("/\\"), "{location}");
            }
        }
    }
}
