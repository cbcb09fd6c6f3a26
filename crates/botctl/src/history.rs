//! `botctl history`: the timelines of a Postgres scope, or the revisions of a content scope. Pure.

use bots_core::wire::{ContentRevision, Quarantined, TimelineHistory};
use serde::Serialize;

use crate::{args::Format, failure::Failure, fleet::ScopeView, text};

/// One finished timeline.
#[derive(Debug, Serialize)]
struct Turn {
    timeline: u32,
    ended_at: String,
    reason: String,
    time: String,
    new_leader: String,
}

/// One known revision.
#[derive(Debug, Serialize)]
struct Publication {
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    sha: String,
    #[serde(rename = "ref")]
    reference: String,
    note: String,
}

/// Prints what the scope's keys tell of its past.
pub(crate) fn render(scope: &str, view: &ScopeView, format: Format) -> Result<String, Failure> {
    if let Some(history) = view.json::<TimelineHistory>("history") {
        return Ok(print(&turns(&history), format, turns_table));
    }
    let publications = publications(view);
    if publications.is_empty() {
        return Err(Failure::failed(format!(
            "{scope} has no history: no timeline has ended and no revision is published"
        )));
    }
    Ok(print(&publications, format, publications_table))
}

fn print<T: Serialize>(rows: &[T], format: Format, table: impl Fn(&[T]) -> String) -> String {
    match format {
        Format::Table => table(rows),
        Format::Json => text::json(&rows),
        Format::Yaml => text::yaml(&rows),
    }
}

fn turns(history: &TimelineHistory) -> Vec<Turn> {
    let turn = |line: &bots_core::wire::HistoryLine| Turn {
        timeline: line.0.0,
        ended_at: line.1.to_string(),
        reason: line.2.clone(),
        time: line.3.clone(),
        new_leader: line.4.clone(),
    };
    history.0.iter().map(turn).collect()
}

fn turns_table(turns: &[Turn]) -> String {
    if turns.is_empty() {
        return String::from("the first timeline is still running\n");
    }
    let row = |t: &Turn| {
        vec![t.timeline.to_string(), t.ended_at.clone(), t.time.clone(), t.new_leader.clone(), t.reason.clone()]
    };
    text::table(&["TL", "ENDED AT", "TIME", "NEW LEADER", "REASON"], &[0], turns.iter().map(row).collect()) + "\n"
}

fn publications(view: &ScopeView) -> Vec<Publication> {
    let live = view.json::<ContentRevision>("revision/live");
    let candidate = view.json::<ContentRevision>("revision/candidate");
    let candidate = candidate.filter(|c| live.as_ref().is_none_or(|l| l.generation != c.generation));
    let of = |state, revision: ContentRevision| Publication {
        state,
        generation: Some(revision.generation),
        sha: revision.sha,
        reference: revision.reference,
        note: revision.subject,
    };
    let mut all: Vec<Publication> = live.map(|r| of("live", r)).into_iter().collect();
    all.extend(candidate.map(|r| of("candidate", r)));
    for (key, kv) in &view.keys {
        let Some(sha) = key.strip_prefix("revision/quarantine/") else { continue };
        let reason = serde_json::from_str::<Quarantined>(&kv.value).map(|q| q.reason).unwrap_or_default();
        let (sha, reference) = (sha.to_owned(), String::new());
        all.push(Publication { state: "quarantined", generation: None, sha, reference, note: reason });
    }
    all
}

fn publications_table(publications: &[Publication]) -> String {
    let row = |p: &Publication| {
        let generation = p.generation.map(|g| g.to_string()).unwrap_or_default();
        vec![p.state.to_owned(), generation, text::short(&p.sha).to_owned(), p.reference.clone(), p.note.clone()]
    };
    text::table(&["STATE", "GENERATION", "COMMIT", "REF", "NOTE"], &[1], publications.iter().map(row).collect()) + "\n"
}

#[cfg(test)]
mod tests {
    use super::render;
    use crate::{
        args::Format,
        fleet::{Fleet, samples},
    };

    fn check(scope: &str, golden: &str) {
        let fleet = Fleet::of("service", &samples::fleet());
        assert_eq!(render(scope, &fleet.scopes[scope], Format::Table).unwrap_or_else(|f| f.message), golden);
    }

    #[test]
    fn timelines_or_revisions_or_neither() {
        check(
            "main",
            "TL  ENDED AT   TIME                       NEW LEADER  REASON\n \
             1  0/40006B0  2026-07-24T12:00:00+00:00  pg-1        no recovery target specified\n",
        );
        check(
            "site",
            "STATE      GENERATION  COMMIT   REF   NOTE\nlive                3  aaaaaaa  main  New header\n\
             candidate           4  1111111  main\n",
        );
        check("gone", "gone has no history: no timeline has ended and no revision is published");
    }
}
