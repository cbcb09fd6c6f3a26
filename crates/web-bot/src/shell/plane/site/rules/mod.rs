//! What a site says of itself in two files at its root: `_redirects` and `_headers`, in the form that Netlify and
//! Cloudflare Pages read. What cannot be read is an error that names the line: a commit with such a file never goes live.

mod headers;
mod pattern;
mod redirects;

use hyper::{HeaderMap, StatusCode, header::HeaderValue};

use self::{headers::HeaderRules, redirects::Redirects};

/// The names of the two files.
pub(super) const FILES: [&str; 2] = ["_redirects", "_headers"];

/// Larger than any such file that is written by hand.
const FILE_BYTES_MAX: usize = 512 * 1024;

/// What the two files ask for.
#[derive(Debug, Default)]
pub(super) struct Rules {
    redirects: Redirects,
    headers: HeaderRules,
}

/// What a redirect rule makes of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Ask there instead.
    Elsewhere { status: StatusCode, location: HeaderValue },
    /// Answer with the file of another path.
    Rewrite { status: StatusCode, path: String },
}

impl Rules {
    /// Reads one of the two files.
    pub(super) fn read(&mut self, name: &str, data: &[u8]) -> Result<(), String> {
        if data.len() > FILE_BYTES_MAX {
            return Err(format!("{name} is larger than {FILE_BYTES_MAX} bytes: use fewer rules, with placeholders"));
        }
        let text =
            std::str::from_utf8(data).map_err(|e| format!("{name} is not UTF-8 from byte {}", e.valid_up_to()))?;
        if name == FILES[0] {
            self.redirects = Redirects::read(text).map_err(|(line, why)| format!("{name}, line {line}: {why}"))?;
        } else {
            self.headers = HeaderRules::read(text).map_err(|(line, why)| format!("{name}, line {line}: {why}"))?;
        }
        Ok(())
    }

    /// Whether they ask for nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.redirects.is_empty() && self.headers.is_empty()
    }

    /// What becomes of a request for `path` (as it was sent); rules that leave existing files alone do so.
    pub(super) fn redirect(&self, path: &str, query: Option<&str>, exists: bool) -> Option<Outcome> {
        self.redirects.find(path, query, exists)
    }

    /// Adds, replaces and takes away what the site asks for at `path`.
    pub(super) fn amend(&self, path: &str, headers: &mut HeaderMap) {
        self.headers.amend(path, headers);
    }
}
