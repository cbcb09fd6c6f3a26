//! What several sites of one process must not have in common. Not what each of them must have: that is checked before.

use std::path::Path;

use super::Config;

/// Checks sites of one process against each other.
///
/// # Errors
/// One line that names the field and the fix.
pub fn check_together(sites: &[Config]) -> Result<(), String> {
    for (index, site) in sites.iter().enumerate() {
        for (twin, other) in sites.iter().enumerate().take(index) {
            apart(site, other).map_err(|(field, what)| format!("sites.{index}.{field}: {what} of sites.{twin}"))?;
        }
        let scopes = sites.iter().enumerate().map(|(of, other)| (of, &other.common.scope));
        if let Some((of, scope)) = scopes.into_iter().find(|(_, scope)| site.web_scopes.contains(scope)) {
            return Err(format!(
                "sites.{index}.web_scopes: {scope} is the scope of sites.{of}: name the web bots' scope"
            ));
        }
    }
    Ok(())
}

/// What one site has that another has too: the field, and how the sentence begins.
fn apart(site: &Config, other: &Config) -> Result<(), (&'static str, String)> {
    if is_within(&site.data_dir, &other.data_dir) {
        return Err(("data_dir", format!("{} is not apart from that", site.data_dir.display())));
    }
    // A web bot serves one site, and would never acknowledge the other's commits.
    if let Some(scope) = site.web_scopes.iter().find(|scope| other.web_scopes.contains(scope)) {
        return Err(("web_scopes", format!("{scope} serves one site, and is already one")));
    }
    let (Some(export), Some(others)) = (&site.export, &other.export) else { return Ok(()) };
    if is_within(&export.root, &others.root) {
        return Err(("export.root", format!("{} is not apart from that", export.root.display())));
    }
    if export.root.join(&export.link) == others.root.join(&others.link) {
        return Err(("export.link", format!("{} is the link", export.link.display())));
    }
    Ok(())
}

/// Whether one of two folders is the other, or in it.
fn is_within(one: &Path, other: &Path) -> bool {
    one.starts_with(other) || other.starts_with(one)
}

#[cfg(test)]
mod tests {
    use bots_core::shell::{Bot, config::load_all};

    use super::{Config, check_together};
    use crate::shell::ContentBot;

    fn read(sites: &str) -> Result<Vec<Config>, String> {
        let document = format!("{{name: c1, etcd3: {{host: '127.0.0.1:1'}}, data_dir: /tmp/x, sites: [{sites}]}}");
        let env = [(String::from("BOT_CONFIGURATION"), document)];
        let configs: Vec<Config> = load_all(None, &env, ContentBot::SITES.as_ref()).map_err(|e| e.to_string())?;
        check_together(&configs).map(|()| configs)
    }

    const DOCS: &str = "{scope: docs, git: {url: /docs}, web_scopes: [docs-web]}";

    #[test]
    fn sites_of_one_process_have_folders_of_their_own() {
        let sites = read(&format!("{DOCS}, {{scope: shop, git: {{url: /shop}}}}")).expect("good");
        let folders: Vec<String> = sites.iter().map(|site| site.data_dir.display().to_string()).collect();
        assert_eq!(folders, ["/tmp/x/docs", "/tmp/x/shop"]);
        assert!(sites.iter().all(|site| site.common.name == "c1"));
    }

    #[test]
    fn what_sites_must_not_share_names_the_site_and_the_field() {
        let check = |second: &str, field: &str| {
            let error = read(&format!("{DOCS}, {second}")).expect_err(second);
            assert!(error.contains(field) && !error.contains('\n'), "{second}: {error}");
        };
        check("{scope: shop, git: {url: /a}, web_scopes: [docs-web]}", "sites.1.web_scopes");
        check("{scope: shop, git: {url: /a}, web_scopes: [docs]}", "sites.1.web_scopes");
        check("{scope: shop, git: {url: /a}, data_dir: /tmp/x/docs}", "sites.1.data_dir");
        check("{scope: shop, git: {url: /a}, data_dir: /tmp/x/docs/below}", "sites.1.data_dir");
        check("{scope: shop}", "sites.1: missing field `git`");
        check("{scope: shop, git: {url: /a, depth: deep}}", "sites.1.git.depth");
        check("{git: {url: /a}}", "sites.1: missing field `scope`");
        check("{scope: shop, name: c2, git: {url: /a}}", "sites.1.name");
        check("{scope: shop, restapi: {}, git: {url: /a}}", "sites.1.restapi");
        check("[]", "sites.1");
        let export = "export: {root: /srv/a}";
        let both = format!(
            "{{scope: a, git: {{url: /a}}, {export}}}, {{scope: b, web_scopes: [b-web], git: {{url: /b}}, {export}}}"
        );
        let error = read(&both).expect_err("one folder for both");
        assert!(error.contains("sites.1.export.root"), "{error}");
    }
}
