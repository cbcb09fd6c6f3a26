//! `botctl list`: the rows of the fleet in three formats. Pure.

use bots_core::wire::Kind;

use crate::{
    args::Format,
    fleet::{Fleet, Row},
    text,
};

/// Prints the fleet, or one scope of it.
pub(crate) fn render(fleet: &Fleet, only: Option<&str>, now_unix_ms: u64, format: Format) -> String {
    let rows = fleet.rows(only, now_unix_ms);
    match format {
        Format::Json => text::json(&rows),
        Format::Yaml => text::yaml(&rows),
        Format::Table => table(&rows) + &notes(fleet, only, &rows),
    }
}

fn table(rows: &[Row]) -> String {
    if rows.is_empty() {
        return String::from("no bot is alive\n");
    }
    let headings = ["SCOPE", "NAME", "KIND", "ROLE", "STATE", "FOR", "TL", "LAG", "LOAD", "REVISION"];
    text::table(&headings, &[6, 7], rows.iter().map(cells).collect()) + "\n"
}

fn cells(row: &Row) -> Vec<String> {
    let role = match row.role.as_str() {
        role if row.leader && role != "leader" => format!("{role} (leader)"),
        role => role.to_owned(),
    };
    let load = row.load.map(|l| format!("{:.1} in flight, {}/s, p99 {:.1} ms", l.in_flight, l.rps, l.p99_ms));
    let revision = row.revision.as_deref().map(text::short).unwrap_or_default();
    let revision = match &row.preparing {
        Some(next) if revision.is_empty() => format!("(+{})", text::short(next)),
        Some(next) => format!("{revision} (+{})", text::short(next)),
        None => revision.to_owned(),
    };
    vec![
        row.scope.clone(),
        if row.pending_restart { format!("{} *", row.name) } else { row.name.clone() },
        row.kind.to_string(),
        role,
        row.state.clone(),
        row.for_ms.map(text::duration).unwrap_or_default(),
        row.timeline.map(|t| t.to_string()).unwrap_or_default(),
        row.lag_bytes.map(text::bytes).unwrap_or_default(),
        load.unwrap_or_default(),
        revision,
    ]
}

/// What needs an operator's eye, one line each, below the table.
fn notes(fleet: &Fleet, only: Option<&str>, rows: &[Row]) -> String {
    let mut notes = Vec::new();
    for (name, view) in fleet.scopes.iter().filter(|(name, _)| only.is_none_or(|o| o == name.as_str())) {
        let config = view.json::<serde_json::Value>("config").unwrap_or_default();
        if config.get("pause").is_some_and(bots_core::wire::tags::is_true) {
            notes.push(format!(
                "{name}: paused: nobody takes the lead, and no server is started, but on an operator's word"
            ));
        }
        match view.leader() {
            None if view.members.is_empty() => notes.push(format!("{name}: it has keys, but no bot is alive")),
            // Edge bots have nothing to elect: each drives a proxy of its own.
            None if view.members.values().all(|m| m.head.kind == Kind::Edge) => {}
            None => notes.push(format!("{name}: nobody leads")),
            Some(leader) if !view.members.contains_key(leader) => {
                notes.push(format!("{name}: {leader} holds the leader key, but its member key is gone"));
            }
            Some(_) => {}
        }
    }
    let troubled = rows.iter().filter_map(|r| r.trouble.as_ref().map(|t| format!("{}/{}: {t}", r.scope, r.name)));
    notes.extend(troubled);
    if rows.iter().any(|r| r.pending_restart) {
        notes.push(String::from("* a change of its configuration waits for a restart"));
    }
    let lines: String = notes.iter().map(|n| format!("{n}\n")).collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

#[cfg(test)]
mod tests {
    use super::render;
    use crate::{
        args::Format,
        fleet::{Fleet, samples},
    };

    /// Compares with a golden file; `REWRITE=1` writes it anew.
    fn check(only: Option<&str>, format: Format, golden: &str) {
        let fleet = Fleet::of("/service/", &samples::fleet());
        let got = render(&fleet, only, samples::NOW, format);
        let path = format!("{}/tests/golden/{golden}", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("REWRITE").is_some() {
            std::fs::write(&path, &got).unwrap();
        }
        assert_eq!(got, std::fs::read_to_string(&path).unwrap(), "{path}: REWRITE=1 accepts this:\n{got}");
    }

    #[test]
    fn the_table_shows_the_whole_fleet() {
        check(None, Format::Table, "list.txt");
    }

    #[test]
    fn one_scope_as_yaml_and_json() {
        check(Some("main"), Format::Yaml, "list.yaml");
        check(Some("web"), Format::Json, "list.json");
    }

    #[test]
    fn an_empty_fleet_is_said_to_be_empty() {
        let got = render(&Fleet::default(), None, 0, Format::Table);
        assert_eq!(got, "no bot is alive\n");
    }
}
