//! `_headers`: a path alone on a line, then indented lines of `Name: value`, or `! Name` to take a header away.

use hyper::{
    HeaderMap,
    header::{self, HeaderName, HeaderValue},
};

use super::pattern::Pattern;

/// The most paths, which are tried one after another at each answer, and the longest line.
const RULES_MAX: usize = 100;
const LINE_BYTES_MAX: usize = 2_000;

/// What says how a message is sent, or where it is from, is ours to say.
const RESERVED: [HeaderName; 15] = [
    header::CONNECTION,
    header::CONTENT_ENCODING,
    header::CONTENT_LENGTH,
    header::CONTENT_RANGE,
    header::DATE,
    header::ETAG,
    header::LAST_MODIFIED,
    header::LOCATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::VARY,
    HeaderName::from_static("x-bots-name"),
    HeaderName::from_static("x-bots-revision"),
];

/// All rules.
#[derive(Debug, Default)]
pub(super) struct HeaderRules {
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    path: Pattern,
    /// To set; without a value: to take away.
    fields: Vec<(HeaderName, Option<HeaderValue>)>,
}

impl HeaderRules {
    pub(super) const fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Reads the file; what is wrong is told with the number of its line.
    pub(super) fn read(text: &str) -> Result<Self, (usize, String)> {
        let mut rules: Vec<Rule> = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let wrong = |why: String| (number, why);
            let trimmed = line.trim();
            if trimmed.is_empty() || trimmed.starts_with('#') {
                continue;
            }
            if line.len() > LINE_BYTES_MAX {
                return Err(wrong(format!("longer than {LINE_BYTES_MAX} characters")));
            }
            if !line.starts_with([' ', '\t']) {
                rules.push(Rule { path: Pattern::read(trimmed).map_err(wrong)?, fields: Vec::new() });
            } else if let Some(rule) = rules.last_mut() {
                rule.fields.push(field(trimmed).map_err(wrong)?);
            } else {
                return Err(wrong(String::from("a header without a path: begin with a path such as /* at the margin")));
            }
            if rules.len() > RULES_MAX {
                return Err(wrong(format!("more than {RULES_MAX} paths: join some of them with a star")));
            }
        }
        Ok(Self { rules })
    }

    pub(super) fn amend(&self, path: &str, headers: &mut HeaderMap) {
        let mut set: Vec<&HeaderName> = Vec::new();
        for rule in self.rules.iter().filter(|rule| rule.path.matches(path).is_some()) {
            for (name, value) in &rule.fields {
                match value {
                    None => drop(headers.remove(name)),
                    // What we would say by ourselves gives way; what another rule said stays beside it.
                    Some(value) if set.contains(&name) => drop(headers.append(name, value.clone())),
                    Some(value) => {
                        headers.insert(name, value.clone());
                        set.push(name);
                    }
                }
            }
        }
    }
}

fn field(line: &str) -> Result<(HeaderName, Option<HeaderValue>), String> {
    let (name, value) = match line.strip_prefix('!') {
        Some(name) => (name, None),
        None => line
            .split_once(':')
            .map(|(name, value)| (name, Some(value.trim())))
            .ok_or_else(|| format!("`{line}` is no header: write `Name: value`, or `! Name` to take one away"))?,
    };
    let name: HeaderName = name.trim().parse().map_err(|_bad| format!("`{}` is no name of a header", name.trim()))?;
    if RESERVED.contains(&name) {
        return Err(format!("{name} is set by the server itself: leave it out"));
    }
    let value = value
        .map(|value| HeaderValue::from_str(value).map_err(|_bad| format!("{name}: the value has control characters")));
    Ok((name, value.transpose()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_add_replace_and_take_away() {
        let text = "# comment\n/*\n  X-Frame-Options: DENY\n  Link: </a>; rel=preload\n\n/assets/*\n\tCache-Control: public, max-age=31536000\n  ! X-Frame-Options\n  Link: </b>; rel=preload\n";
        let rules = HeaderRules::read(text).expect("good rules");
        let mut headers = HeaderMap::new();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        let mut deep = headers.clone();
        rules.amend("/index.html", &mut headers);
        assert_eq!(
            (&headers["x-frame-options"], &headers["cache-control"]),
            (&HeaderValue::from_static("DENY"), &HeaderValue::from_static("no-cache"))
        );
        rules.amend("/assets/a.css", &mut deep);
        assert_eq!(deep["cache-control"], "public, max-age=31536000");
        assert!(!deep.contains_key("x-frame-options"));
        assert_eq!(deep.get_all("link").iter().count(), 2);
    }

    #[test]
    fn bad_lines_are_named() {
        let check = |text: &str, line: usize, expected: &str| {
            let (number, why) = HeaderRules::read(text).expect_err(text);
            assert!(number == line && why.contains(expected), "{text}: {number} {why}");
        };
        check("  X: y", 1, "without a path");
        check("/a\n  nothing", 2, "`nothing`");
        check("/a\n  Content-Length: 5", 2, "content-length");
        check("/a\n  X y: 5", 2, "`X y`");
        check("https://x.example/a\n", 1, "begin it with a slash");
    }
}
