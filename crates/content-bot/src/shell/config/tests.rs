//! Which configurations are taken, and which field a refusal names.

use bots_core::shell::config::load;

use super::{Config, Submodules};

fn read(extra: &str) -> Result<Config, String> {
    let document = format!("{{scope: site, name: c1, etcd3: {{host: '127.0.0.1:1'}}, data_dir: /tmp/x, {extra}}}");
    let env = [(String::from("BOT_CONFIGURATION"), document)];
    let config: Config = load(None, &env).map_err(|e| e.to_string())?;
    config.check().map(|()| config)
}

#[test]
fn a_short_configuration_is_enough() {
    let config = read("git: {url: 'https://u:s3cret@git.example/a.git'}").expect("good");
    let settings = config.settings("i", "").expect("good");
    assert_eq!(settings.origin, "https://git.example/a.git");
    assert_eq!(settings.pack_url, "http://127.0.0.1:8008");
    let among_others = config.settings("i", "/sites/site").expect("good");
    assert_eq!(among_others.pack_url, "http://127.0.0.1:8008/sites/site");
    assert_eq!(among_others.api_url, "http://127.0.0.1:8008/sites/site/status");
    assert!(!format!("{config:?}{settings:?}").contains("s3cret"), "no password in any output");
}

#[test]
fn submodules_are_left_out_unless_they_are_asked_for() {
    let check = |extra: &str, expected: Submodules| {
        let config = read(&format!("git: {{url: /a{extra}}}")).expect(extra);
        assert_eq!(config.git.submodules, expected, "{extra}");
    };
    check("", Submodules::Off);
    check(", submodules: off", Submodules::Off);
    check(", submodules: shallow", Submodules::Shallow);
    check(", submodules: recursive", Submodules::Recursive);
    assert!(read("git: {url: /a, submodules: some}").expect_err("no such choice").contains("submodules"));
}

#[test]
fn every_mistake_names_its_field() {
    let check = |extra: &str, field: &str| {
        let error = read(extra).expect_err(extra);
        assert!(error.contains(field) && !error.contains('\n'), "{extra}: {error}");
    };
    check("web_scopes: [web]", "git");
    check("git: {url: 'ftp://x/y'}", "git.url");
    check("git: {url: /a, ref: 'a b'}", "git.ref");
    check("git: {url: /a, branch: x}", "branch");
    check("git: {url: /a, ref: 'semver:one'}", "git.ref");
    check("git: {url: /a, depth: 1}", "git.depth");
    check("git: {url: 'git://h/a', proxy: 'http://p'}", "git.proxy");
    check("git: {url: 'http://h/a', proxy: 'http://p'}", "git.proxy");
    check("git: {url: /a, poll_interval_s: 0}", "git.poll_interval_s");
    check("git: {url: /a, poll_interval_s: soon}", "git.poll_interval_s");
    check("git: {url: /a, poll_interval_s: 10, stale_after_s: 89}", "git.stale_after_s");
    check("git: {url: /a, password: x, password_file: /y}", "git.password");
    check("git: {url: /a, password_file: /does/not/exist}", "git.password_file");
    check("git: {url: 'git@host:a'}", "git.ssh_key_file");
    check("git: {url: /a}, ttl_s: 1", "ttl_s");
    check("git: {url: /a}, web_scopes: ['a/b']", "web_scopes");
    check("git: {url: /a}, export: {link: current}", "root");
    check("git: {url: /a}, export: {root: site}", "export.root");
    check("git: {url: /a}, export: {root: /srv/a, link: /srv/a}", "export.link");
    check("git: {url: /a}, export: {root: /srv/a, link: 'a/../b'}", "export.link");
    check("git: {url: /a}, export: {root: /srv/a, touch_file: t}", "export.touch_file");
    check("git: {url: /a}, export: {root: /srv/a, exec_hook: {command: []}}", "export.exec_hook.command");
    check("git: {url: /a}, export: {root: /srv/a, exec_hook: {command: [/none]}}", "export.exec_hook.command");
    check("git: {url: /a}, export: {root: /srv/a, webhook: {method: POST, url: x}}", "export.webhook.url");
    check("git: {url: /a}, export: {root: /srv/a, one_time_timeout_s: 0}", "export.one_time_timeout_s");
    check("git: {url: /a}, canary: {observe_s: 0}", "canary.observe_s");
    check("git: {url: /a}, canary: {paths: []}", "canary.paths");
    check("git: {url: /a}, purge: {requests: []}", "purge.requests");
    let purge = "requests: [{method: PURGE, url: 'http://x/'}]";
    check(&format!("git: {{url: /a}}, purge: {{{purge}, probe: ['ftp://x/']}}"), "purge.probe: ");
    check(
        &format!("git: {{url: /a}}, purge: {{{purge}, probe: ['http://x/'], probe_ca_file: /none}}"),
        "purge.probe_ca_file: no page",
    );
    check(
        &format!("git: {{url: /a}}, purge: {{{purge}, probe: ['https://x/'], probe_ca_file: /none}}"),
        "purge.probe_ca_file: /none",
    );
    check("git: {url: /a}, purge: {requests: [{method: PURGE, url: x}]}", "purge.requests.url");
    check("git: {url: /a}, purge: {requests: [{method: 'A B', url: 'http://x/'}]}", "purge.requests.method");
    check(
        "git: {url: /a}, purge: {requests: [{method: POST, url: 'http://x/', header_files: {key: /none}}]}",
        "purge.requests.header_files.key",
    );
    check(
        "git: {url: /a}, purge: {requests: [{method: POST, url: 'https://x/', ca_file: /none}]}",
        "purge.requests.ca_file",
    );
    check(
        "git: {url: /a}, purge: {requests: [{method: POST, url: 'http://x/', ca_file: /}]}",
        "purge.requests.ca_file",
    );
    check("git: {url: /a}, verify: {command: [/does/not/exist]}", "verify.command");
    check("git: {url: /a}, verify: {command: [no-such-program]}", "verify.command");
    for program in ["./run", "../run", "bin/sh"] {
        check(&format!("git: {{url: /a}}, verify: {{command: [{program}]}}"), "verify.command: ");
        check(&format!("git: {{url: /a}}, verify: {{command: [{program}]}}"), "in the commit itself");
        let hook = format!("export: {{root: /srv/a, exec_hook: {{command: [{program}]}}}}");
        check(&format!("git: {{url: /a}}, {hook}"), "export.exec_hook.command: ");
        check(&format!("git: {{url: /a}}, {hook}"), "in the commit itself");
    }
    check("git: {url: /a}, verify: {command: ['true'], command_timeout_s: 301}", "verify.command_timeout_s");
    check("git: {url: /a}, verify: {ssh_allowed_signers_file: /none}", "verify.ssh_allowed_signers_file");
    check("git: {url: /a}, verify: {gpg_keys_file: /none}", "verify.gpg_keys_file");
    check("git: {url: /a}, verify: {signed: true}", "verify");
    check("git: {url: /a}, web_scopes: [site]", "web_scopes");
    check("git: {url: /a}, push: {secret: ''}", "push.secret");
    check("git: {url: /a}, push: {secrets: [x, '']}", "push.secret");
    check("git: {url: /a}, push: {secrets: [a, b, c, d, e, f, g, h, i]}", "push.secrets");
    check("git: {url: /a}, push: {secret_files: [/does/not/exist]}", "push.secret_files");
    check("git: {url: /a}, push: {secret: x, secret_file: /y}", "push.secret");
    check("git: {url: /a}, push: {listen: '0.0.0.0:8009'}", "push.listen");
    check("git: {url: /a}, push: {secret: x, listen: '8009'}", "push.listen");
    check("git: {url: /a}, push: {secret: x, listen: 'localhost:8008'}", "push.listen");
    check("git: {url: /a, lfs_pointers: fetch}", "git.lfs_pointers");
}
