//! How far the publication of a commit has come, as etcd shows it.

use bots_core::wire::ContentRevision;
use serde::Serialize;

use crate::{
    fleet::{SITE, WEB},
    store::{ScopeNow, Store},
};

/// A stage of a publication.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Nobody knows of the commit, or the origin is being looked at.
    Pushed,
    /// The elected content bot fetches and verifies it.
    Fetching,
    /// It is the candidate, and no web bot has said that it is prepared.
    Candidate,
    /// A web bot has prepared it.
    Prepared,
    /// It is live, and nobody serves it yet.
    Live,
    /// Some serve it.
    Serving,
    /// Every web bot serves it.
    Everywhere,
}

impl Stage {
    /// All but the last, in their order.
    pub const BEFORE_THE_END: [Self; 6] =
        [Self::Pushed, Self::Fetching, Self::Candidate, Self::Prepared, Self::Live, Self::Serving];
}

/// How far the publication of `sha` has come with `webs` web bots.
///
/// # Errors
/// One line, if etcd does not answer.
pub(super) async fn stage(store: &Store, sha: &str, webs: usize) -> Result<Stage, String> {
    let (site, web) = tokio::try_join!(store.look(SITE), store.look(WEB))?;
    Ok(of(&site, &web, sha, webs))
}

fn of(site: &ScopeNow, web: &ScopeNow, sha: &str, webs: usize) -> Stage {
    let is_at = |key: &str| {
        let revision: Option<ContentRevision> = site.value(key).and_then(|v| serde_json::from_str(v).ok());
        revision.is_some_and(|r| r.sha == sha)
    };
    let serving = web.serving().iter().filter(|bot| bot.sha == sha).count();
    let prepared = || web.members().keys().any(|n| web.web(n).is_some_and(|w| w.prepared.as_deref() == Some(sha)));
    let fetching = || site.members().values().any(|member| member.head.state == "fetching");
    if is_at("revision/live") {
        return match serving {
            0 => Stage::Live,
            some if some < webs => Stage::Serving,
            _ => Stage::Everywhere,
        };
    }
    match is_at("revision/candidate") {
        true if prepared() => Stage::Prepared,
        true => Stage::Candidate,
        false if fetching() => Stage::Fetching,
        false => Stage::Pushed,
    }
}
