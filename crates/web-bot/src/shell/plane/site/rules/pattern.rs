//! Paths with placeholders: `/blog/:year/*`.

use super::super::decode;

/// A pattern for paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pattern {
    parts: Vec<Part>,
    /// It ends with `*`, which stands for the rest, be it nothing.
    splat: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Literal(String),
    Named(String),
}

/// What the placeholders stood for, as it was sent.
pub(super) type Captures<'p> = Vec<(String, &'p str)>;

impl Pattern {
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let rest = text.strip_prefix('/').ok_or_else(|| format!("`{text}` is no path: begin it with a slash"))?;
        let mut parts: Vec<&str> = rest.split('/').collect();
        if parts.last() == Some(&"") {
            parts.pop();
        }
        let splat = parts.last() == Some(&"*");
        if splat {
            parts.pop();
        }
        let mut read: Vec<Part> = Vec::new();
        for part in parts {
            let made = match part.strip_prefix(':') {
                _ if part.contains('*') => {
                    return Err(format!("`{text}`: a star may only stand alone at the end, as in /blog/*"));
                }
                _ if part.contains(['?', '#']) => {
                    return Err(format!("`{text}`: rules look at the path alone: leave out what follows the `{part}`"));
                }
                Some(name) if is_name(name) => Part::Named(name.to_owned()),
                Some(_) => return Err(format!("`{text}`: name the placeholder `{part}` with letters, digits and `_`")),
                None => {
                    Part::Literal(decode(part).ok_or_else(|| format!("`{part}` is not well encoded"))?.into_owned())
                }
            };
            if matches!(&made, Part::Named(name) if read.contains(&Part::Named(name.clone())) || name == "splat") {
                return Err(format!("`{text}`: the placeholder `{part}` is taken: choose another name"));
            }
            read.push(made);
        }
        Ok(Self { parts: read, splat })
    }

    /// The path itself, if it stands for one alone.
    pub(super) fn literal(&self) -> Option<String> {
        let literal = |part: &Part| match part {
            Part::Literal(text) => Some(text.clone()),
            Part::Named(_) => None,
        };
        let parts: Option<Vec<String>> = self.parts.iter().map(literal).collect();
        parts.filter(|_| !self.splat).map(|parts| key(parts.iter().map(String::as_str)))
    }

    /// The names that a target may use.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let named = self.parts.iter().filter_map(|part| match part {
            Part::Named(name) => Some(name.as_str()),
            Part::Literal(_) => None,
        });
        named.chain(self.splat.then_some("splat"))
    }

    /// What the placeholders stand for in `path`; nothing if it is another path.
    pub(super) fn matches<'p>(&self, path: &'p str) -> Option<Captures<'p>> {
        let mut rest = path.strip_prefix('/')?;
        let mut captures = Captures::new();
        for part in &self.parts {
            if rest.is_empty() {
                return None;
            }
            let (sent, after) = rest.split_once('/').unwrap_or((rest, ""));
            match part {
                Part::Literal(text) if decode(sent)? == *text => {}
                Part::Literal(_) => return None,
                Part::Named(_) if sent.is_empty() => return None,
                Part::Named(name) => captures.push((name.clone(), sent)),
            }
            rest = after;
        }
        if self.splat {
            captures.push((String::from("splat"), rest));
        }
        (self.splat || rest.is_empty()).then_some(captures)
    }
}

/// A path without the slashes at its ends, as rules are looked up by.
pub(super) fn key<'a>(parts: impl Iterator<Item = &'a str>) -> String {
    parts.collect::<Vec<_>>().join("/")
}

pub(super) fn is_name(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_';
    name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(legal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_stand_for_parts() {
        let check = |pattern: &str, path: &str, expected: Option<&[(&str, &str)]>| {
            let pattern = Pattern::read(pattern).expect("a pattern");
            let found = pattern.matches(path);
            let found: Option<Vec<(&str, &str)>> =
                found.as_ref().map(|f| f.iter().map(|(n, v)| (n.as_str(), *v)).collect());
            assert_eq!(found.as_deref(), expected, "{path}");
        };
        check("/a/b", "/a/b", Some(&[]));
        check("/a/b", "/a/b/", Some(&[]));
        check("/a/b/", "/a/b", Some(&[]));
        check("/a/b", "/a", None);
        check("/a/b", "/a/b/c", None);
        check("/caf%C3%A9", "/caf%c3%a9", Some(&[]));
        check("/café", "/caf%C3%A9", Some(&[]));
        check("/", "/", Some(&[]));
        check("/*", "/", Some(&[("splat", "")]));
        check("/*", "/a//b", Some(&[("splat", "a//b")]));
        check("/a/*", "/a", Some(&[("splat", "")]));
        check("/a/*", "/ab", None);
        check("/:year/:title", "/2026/a%20b", Some(&[("year", "2026"), ("title", "a%20b")]));
        check("/:year/:title", "/2026/", None);
        check("/:year/:title", "//x", None);
    }

    #[test]
    fn what_is_no_pattern_is_said() {
        for bad in ["a", "/a*", "/*/a", "/:1", "/:a/:a", "/:splat", "/a?b=c", "/%zz"] {
            assert!(Pattern::read(bad).is_err(), "{bad}");
        }
    }
}
