//! The page: a template from the content, filled with the entries. Everything that people wrote is escaped.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

use crate::entries::Entry;

/// The template, the first of these that is there. The second is also the page of the site without the app.
const TEMPLATES: [&str; 2] = ["templates/index.html", "index.html"];

/// The largest template; a page beyond this is a mistake.
const TEMPLATE_BYTES_MAX: u64 = 1024 * 1024;

/// The page of one revision.
pub(crate) struct Page {
    template: String,
}

impl Page {
    /// Reads the template and fills in what never changes while this process lives.
    pub(crate) fn load(content: &Path, revision: String, cdn_url: String) -> Result<Self> {
        let Some(path) = TEMPLATES.iter().map(|name| content.join(name)).find(|path| path.is_file()) else {
            bail!("{} has neither {} nor {}", content.display(), TEMPLATES[0], TEMPLATES[1]);
        };
        let size = fs::metadata(&path).with_context(|| format!("look at {}", path.display()))?.len();
        if size > TEMPLATE_BYTES_MAX {
            bail!("{} is larger than {TEMPLATE_BYTES_MAX} bytes", path.display());
        }
        let template = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let template = fill(&template, "revision", &escaped(&revision));
        Ok(Self { template: fill(&template, "cdn_url", &escaped(&cdn_url)) })
    }

    /// The page with these entries.
    pub(crate) fn render(&self, entries: &[Entry]) -> String {
        let mut list = String::from("<ul class=\"entries\">\n");
        for entry in entries {
            let (name, message, at) = (escaped(&entry.name), escaped(&entry.message), escaped(&entry.written_at));
            list += &format!("<li><p>{message}</p><footer>{name}, <time>{at}</time></footer></li>\n");
        }
        list += "</ul>";
        fill(&self.template, "entries", &list)
    }
}

/// Puts `text` where the template says `{{name}}`, also inside a comment of its own, which hides the mark from visitors
/// of the plain site.
fn fill(template: &str, name: &str, text: &str) -> String {
    let mark = format!("{{{{{name}}}}}");
    // Never twice over the same place: what people wrote may look like a mark.
    let mut filled = String::with_capacity(template.len() + text.len());
    let mut rest = template;
    while let Some(at) = rest.find(&mark) {
        let (before, after) = (&rest[..at], &rest[at + mark.len()..]);
        match (before.trim_end().strip_suffix("<!--"), after.trim_start().strip_prefix("-->")) {
            (Some(before), Some(after)) => {
                filled.push_str(before);
                rest = after;
            }
            _ => {
                filled.push_str(before);
                rest = after;
            }
        }
        filled.push_str(text);
    }
    filled + rest
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::{Entry, Page, fill};

    #[test]
    fn marks_are_filled_bare_and_in_comments() {
        assert_eq!(fill("<b><!-- {{x}} --></b>{{x}}{{y}}", "x", "1"), "<b>1</b>1{{y}}");
        assert_eq!(fill("<!-- see {{x}} -->", "x", "1"), "<!-- see 1 -->");
    }

    #[test]
    fn what_people_wrote_stays_text() {
        let page = Page { template: String::from("{{entries}}") };
        let entry = Entry {
            name: String::from("<b>\"Eve\"</b>"),
            message: String::from("{{entries}} & <script>alert('x')</script>"),
            written_at: String::from("now"),
        };
        let html = page.render(&[entry]);
        assert!(html.contains("{{entries}} &amp; &lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"), "{html}");
        assert!(html.contains("&lt;b&gt;&quot;Eve&quot;&lt;/b&gt;"), "{html}");
    }
}
