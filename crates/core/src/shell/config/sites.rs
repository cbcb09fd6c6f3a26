//! Many bots in one document: a list of sites, each of which has what stands at the top, and over it what it says itself.

use serde_json::{Map, Value};

use super::load::{ConfigError, merge};

/// The field that holds the list.
const SITES: &str = "sites";
/// Set in each entry's document, so that a list of one is a list too: a site that loses its neighbours keeps its addresses.
const AMONG_SITES: &str = "among_sites";

/// Sites of one process. Each orders a lease from one thread, whose queue holds two orders for each of so many.
pub const SITES_MAX: usize = 32;

/// What a kind of bot that may have several sites in one process says about its fields.
#[derive(Debug, Clone, Copy)]
pub struct SiteRules {
    /// Fields that belong to the process: a site may not have them.
    pub shared: &'static [&'static str],
    /// Folders that are given at the top: each site has one of its own below it, called by its scope.
    pub folders: &'static [&'static str],
}

impl SiteRules {
    /// Whether a field, or what a message begins with, belongs to the process.
    #[must_use]
    pub fn shares(&self, field: &str) -> bool {
        let first = field.split(['.', ':', ' ']).next().unwrap_or_default();
        self.shared.contains(&first)
    }
}

/// One bot's document, and how errors name it.
pub(super) struct Part {
    /// Empty, or `sites.0.`.
    pub(super) prefix: String,
    pub(super) document: Value,
}

impl Part {
    /// A field of this document, as its place in the whole.
    pub(super) fn field(&self, field: &str, rules: Option<&SiteRules>) -> String {
        match field {
            _ if rules.is_some_and(|rules| rules.shares(field)) => field.to_owned(),
            "." if !self.prefix.is_empty() => self.prefix.trim_end_matches('.').to_owned(),
            _ => format!("{}{field}", self.prefix),
        }
    }
}

/// The documents of all bots in `whole`: one, unless there may be sites and are.
pub(super) fn parts(whole: &Value, rules: Option<&SiteRules>) -> Result<Vec<Part>, ConfigError> {
    let mut top = whole.as_object().cloned().unwrap_or_default();
    top.remove(AMONG_SITES);
    let (Some(rules), Some(sites)) = (rules, whole.get(SITES)) else {
        let document = if whole.is_object() { Value::Object(top) } else { whole.clone() };
        return Ok(vec![Part { prefix: String::new(), document }]);
    };
    let list = sites.as_array().filter(|list| !list.is_empty());
    let list = list.ok_or_else(|| bad(SITES, "it is no list of sites", "give one, or remove the field"))?;
    if list.len() > SITES_MAX {
        let many = format!("{} sites are too many for one process", list.len());
        return Err(bad(SITES, &many, &format!("give each {SITES_MAX} of them a bot of their own")));
    }
    top.remove(SITES);
    if top.contains_key("scope") {
        let fix = "give every one of `sites` a scope of its own, and remove it at the top";
        return Err(bad("scope", "it stands beside `sites`", fix));
    }
    list.iter().enumerate().map(|(index, site)| part(&top, index, site, rules)).collect()
}

fn part(top: &Map<String, Value>, index: usize, site: &Value, rules: &SiteRules) -> Result<Part, ConfigError> {
    let place = format!("{SITES}.{index}");
    let fields = site.as_object().ok_or_else(|| {
        bad(&place, "it is no site", "write a mapping of fields such as `scope: docs` and `git: {url: ...}`")
    })?;
    if let Some(shared) = rules.shared.iter().find(|field| fields.contains_key(**field)) {
        return Err(bad(&format!("{place}.{shared}"), "it belongs to the whole process", "move it to the top"));
    }
    let mut document = Value::Object(top.clone());
    merge(&mut document, site.clone());
    document[AMONG_SITES] = Value::Bool(true);
    let scope = fields.get("scope").and_then(Value::as_str).unwrap_or_default();
    for folder in rules.folders.iter().filter(|folder| !fields.contains_key(**folder)) {
        if let Some(Value::String(path)) = document.get_mut(*folder) {
            *path = format!("{}/{scope}", path.trim_end_matches('/'));
        }
    }
    Ok(Part { prefix: format!("{place}."), document })
}

fn bad(field: &str, message: &str, fix: &str) -> ConfigError {
    ConfigError::Field { field: field.to_owned(), message: message.to_owned(), fix: fix.to_owned() }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{SITES_MAX, SiteRules, parts};

    const RULES: SiteRules = SiteRules { shared: &["name", "etcd3"], folders: &["data_dir"] };

    fn documents(whole: &Value) -> Result<Vec<Value>, String> {
        let found = parts(whole, Some(&RULES)).map_err(|e| e.to_string())?;
        Ok(found.into_iter().map(|part| part.document).collect())
    }

    #[test]
    fn every_site_has_what_stands_at_the_top_and_over_it_its_own() {
        let whole = json!({
            "name": "c", "data_dir": "/d/", "ttl_s": 3, "git": {"depth": 1, "ref": "main"},
            "sites": [{"scope": "a", "git": {"url": "/a"}}, {"scope": "b", "data_dir": "/b", "ttl_s": 9}],
        });
        let expected = [
            json!({"name": "c", "scope": "a", "data_dir": "/d/a", "ttl_s": 3, "git": {"depth": 1, "ref": "main", "url": "/a"}, "among_sites": true}),
            json!({"name": "c", "scope": "b", "data_dir": "/b", "ttl_s": 9, "git": {"depth": 1, "ref": "main"}, "among_sites": true}),
        ];
        assert_eq!(documents(&whole).expect("good"), expected);
        let one = json!({"scope": "a", "name": "c"});
        assert_eq!(documents(&one).expect("good"), [one]);
        let last = json!({"name": "c", "sites": [{"scope": "a"}]});
        let expected = json!({"name": "c", "scope": "a", "among_sites": true});
        assert_eq!(documents(&last).expect("good"), [expected], "a list of one is a list");
        // Who has no sites does not know the word either.
        assert_eq!(parts(&whole, None).map_err(|e| e.to_string()).expect("good")[0].document, whole);
    }

    #[test]
    fn what_is_no_list_of_sites_names_its_place() {
        let check = |whole: Value, field: &str| {
            let error = documents(&whole).expect_err(field);
            assert!(error.starts_with(&format!("configuration field {field}: ")), "{error}");
        };
        check(json!({"sites": []}), "sites");
        check(json!({"sites": {"scope": "a"}}), "sites");
        check(json!({"sites": [{"scope": "a"}, "b"]}), "sites.1");
        check(json!({"sites": [{"scope": "a", "name": "c"}]}), "sites.0.name");
        check(json!({"scope": "s", "sites": [{"scope": "a"}]}), "scope");
        check(json!({"sites": vec![json!({"scope": "a"}); SITES_MAX + 1]}), "sites");
    }
}
