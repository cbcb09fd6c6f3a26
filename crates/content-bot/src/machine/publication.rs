//! The publication as it stands in etcd, and the one transaction that is under way. Not the decision what to do next:
//! that is the leader's.

use std::collections::BTreeSet;

use bots_core::{
    dcs::{Compare, Outcome, RequestId, Revision, Scope, View, Write},
    machine::{Span, Time},
    membership::RETRY_AFTER,
    wire::{Canary, ContentRevision, Kind, Member, PublicationHistory, Published, Purged, Quarantined, WebFacts},
};
use serde::Serialize;

/// How many quarantined commits are remembered; the oldest goes first. A commit comes back only by a force-push.
pub const QUARANTINE_MAX: usize = 32;

/// How many publications are remembered: more than a mirror keeps, so that every commit that it keeps has its place.
pub const HISTORY_MAX: usize = 32;

/// The longest reason that is written to etcd, in bytes.
const REASON_LEN_MAX: usize = 300;

/// `revision/live` or `revision/candidate`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pointer {
    /// Nothing if the key holds something that no bot of ours wrote: it is replaced, not believed.
    pub(super) revision: Option<ContentRevision>,
    pub(super) modified: Revision,
}

impl Pointer {
    pub(super) fn at(view: &View, key: &str) -> Option<Self> {
        view.get(key).map(|kv| Self { revision: serde_json::from_str(&kv.value).ok(), modified: kv.modified })
    }
}

/// Both pointers, as the view shows them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pointers {
    pub(super) live: Option<Pointer>,
    pub(super) candidate: Option<Pointer>,
}

impl Pointers {
    pub(super) fn of(scope: &Scope, view: &View) -> Self {
        Self {
            live: Pointer::at(view, &scope.revision_live()),
            candidate: Pointer::at(view, &scope.revision_candidate()),
        }
    }

    pub(super) fn live(&self) -> Option<&ContentRevision> {
        self.live.as_ref().and_then(|p| p.revision.as_ref())
    }

    pub(super) fn candidate(&self) -> Option<&ContentRevision> {
        self.candidate.as_ref().and_then(|p| p.revision.as_ref())
    }

    pub(super) fn live_is(&self, sha: &str) -> bool {
        self.live().is_some_and(|r| r.sha == sha)
    }

    /// The number of the next publication. What was published counts where no pointer tells of it any more: web bots remember
    /// the number that they serve, and follow none that is less.
    pub(super) fn generation_next(&self, scope: &Scope, view: &View) -> u64 {
        let history: PublicationHistory = view.json(&scope.revision_history()).unwrap_or_default();
        let published = history.0.iter().map(|published| published.generation);
        let pointed_at = [self.live(), self.candidate()].into_iter().flatten().map(|revision| revision.generation);
        published.chain(pointed_at).max().unwrap_or(0).saturating_add(1)
    }

    /// The condition that both stand as they were seen: a late or stale step is refused.
    pub(super) fn unchanged(&self, scope: &Scope) -> [Compare; 2] {
        let same = |key: String, pointer: &Option<Pointer>| match pointer {
            Some(p) => Compare::ModifiedAt(key, p.modified),
            None => Compare::Absent(key),
        };
        [same(scope.revision_live(), &self.live), same(scope.revision_candidate(), &self.candidate)]
    }
}

/// One change of the publication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) enum Move {
    /// Mark a commit as never to be published.
    Quarantine { sha: String, reason: String },
    /// Let the web bots prepare a commit.
    Post { revision: ContentRevision },
    /// Let the web bots serve the candidate.
    Publish { revision: ContentRevision, late: Vec<String> },
    /// Take the candidate back.
    Withdraw,
    /// Let one web bot serve the candidate.
    Try { sha: String, member: String },
    /// Write down that caches were purged.
    Record { purged: Purged },
}

impl Move {
    /// The commit that it brings closer to visitors.
    pub(super) fn shows(&self) -> Option<&str> {
        match self {
            Self::Post { revision } | Self::Publish { revision, late: _ } => Some(&revision.sha),
            Self::Try { sha, member: _ } => Some(sha),
            Self::Quarantine { .. } | Self::Withdraw | Self::Record { .. } => None,
        }
    }

    /// The writes that make it, in one transaction.
    pub(super) fn writes(&self, scope: &Scope, view: &View, now_unix_ms: u64) -> Vec<Write> {
        let json = |value: &ContentRevision| serde_json::to_string(value).unwrap_or_default();
        // What was said of an earlier candidate goes with it.
        let without = |keys: &[String]| {
            keys.iter().filter(|key| view.get(key).is_some()).cloned().map(Write::delete).collect::<Vec<_>>()
        };
        let (canary, promote) = (scope.revision_canary(), scope.revision_promote());
        match self {
            Self::Post { revision } => {
                [vec![Write::put(scope.revision_candidate(), json(revision))], without(&[canary])].concat()
            }
            Self::Publish { revision, late: _ } => {
                let live = Write::put(scope.revision_live(), json(revision));
                let history = Write::put(scope.revision_history(), history(scope, view, revision, now_unix_ms));
                let gone = Write::delete(scope.revision_candidate());
                [vec![live, gone, history], without(&[canary, promote])].concat()
            }
            Self::Withdraw => [vec![Write::delete(scope.revision_candidate())], without(&[canary, promote])].concat(),
            Self::Try { sha, member } => {
                let value = Canary { sha: sha.clone(), member: member.clone(), since_unix_ms: now_unix_ms };
                vec![Write::put(canary, serde_json::to_string(&value).unwrap_or_default())]
            }
            Self::Record { purged } => {
                vec![Write::put(scope.revision_purged(), serde_json::to_string(purged).unwrap_or_default())]
            }
            Self::Quarantine { sha, reason } => {
                let mark = Quarantined { reason: cut(reason), since_unix_ms: now_unix_ms };
                let put = Write::put(scope.quarantine(sha), serde_json::to_string(&mark).unwrap_or_default());
                let prefix = scope.quarantine_prefix();
                let mut marks: Vec<_> = view.below(&prefix).map(|kv| (kv.modified, &kv.key)).collect();
                marks.sort();
                let surplus = (marks.len() + 1).saturating_sub(QUARANTINE_MAX);
                let old = marks.into_iter().take(surplus).map(|(_, key)| Write::delete(key.clone()));
                let tried = view.json::<Canary>(&canary).is_some_and(|tried| tried.sha == *sha);
                let untried = if tried { without(&[canary]) } else { Vec::new() };
                std::iter::once(put).chain(old).chain(untried).collect()
            }
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
enum Wait {
    Nothing,
    /// The change is made; the view must show it before the next one is thought of.
    ViewAt {
        revision: Revision,
        posted: bool,
    },
    /// Refused or unknown: the view will show what stands there.
    Until(Time),
}

/// A commit that a fetch found unfit, until its mark stands in etcd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Unfit {
    pub(super) sha: String,
    pub(super) reason: String,
}

/// The web bots that had not prepared a commit when it went live.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Late {
    pub(super) sha: String,
    pub(super) names: Vec<String>,
}

/// The leader's hand on the publication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Publication {
    request: Option<(RequestId, Move)>,
    wait: Wait,
    /// The candidate's last change, and when this leader saw it first.
    preparing: Option<(Revision, Time)>,
    unfit: Option<Unfit>,
    late: Option<Late>,
    setback: Option<String>,
}

impl Publication {
    pub(super) const fn new() -> Self {
        Self { request: None, wait: Wait::Nothing, preparing: None, unfit: None, late: None, setback: None }
    }

    /// Follows the view: starts the candidate's clock, drops what has come true.
    pub(super) fn observe(&mut self, now: Time, scope: &Scope, view: &View, pointers: &Pointers) {
        let modified = pointers.candidate.as_ref().map(|p| p.modified);
        if self.preparing.map(|(seen, _)| seen) != modified {
            self.preparing = modified.map(|m| (m, now));
        }
        self.unfit.take_if(|u| view.get(&scope.quarantine(&u.sha)).is_some());
        let over = match self.wait {
            Wait::Nothing => false,
            Wait::ViewAt { revision, posted: _ } => view.revision(&scope.prefix()) >= revision,
            Wait::Until(at) => at <= now,
        };
        if over {
            self.wait = Wait::Nothing;
            self.setback = None;
        }
    }

    /// Whether the next change may be thought of.
    pub(super) fn is_settled(&self) -> bool {
        self.request.is_none() && self.wait == Wait::Nothing
    }

    pub(super) fn begin(&mut self, id: RequestId, change: Move) {
        self.request = Some((id, change));
    }

    /// Takes in what became of a change; yields the revision, if a commit went live by it.
    pub(super) fn answered(&mut self, now: Time, id: RequestId, outcome: &Outcome) -> Option<Revision> {
        let (_, change) = self.request.take_if(|(request, _)| *request == id)?;
        match outcome {
            Outcome::Done(revision) => {
                self.wait = Wait::ViewAt { revision: *revision, posted: matches!(change, Move::Post { .. }) };
                if let Move::Publish { revision: published, late } = change {
                    self.late = (!late.is_empty()).then_some(Late { sha: published.sha, names: late });
                    return Some(*revision);
                }
            }
            Outcome::Refused { .. } => {
                self.wait = Wait::Until(now + RETRY_AFTER);
                self.setback = Some(String::from("etcd refused a step: somebody else changed the publication"));
            }
            Outcome::Unknown(why) => {
                self.wait = Wait::Until(now + RETRY_AFTER);
                self.setback = Some(format!("etcd did not say whether it made a step: {why}"));
            }
        }
        None
    }

    pub(super) fn found_unfit(&mut self, sha: String, reason: String) {
        self.unfit = Some(Unfit { sha, reason });
    }

    pub(super) const fn unfit(&self) -> Option<&Unfit> {
        self.unfit.as_ref()
    }

    pub(super) const fn late(&self) -> Option<&Late> {
        self.late.as_ref()
    }

    pub(super) fn setback(&self) -> Option<&str> {
        self.setback.as_deref()
    }

    /// When the web bots' time to prepare the candidate is over.
    pub(super) fn prepare_until(&self, timeout: Span) -> Option<Time> {
        self.preparing.map(|(_, since)| since + timeout)
    }

    pub(super) const fn retry_at(&self) -> Option<Time> {
        match self.wait {
            Wait::Until(at) => Some(at),
            Wait::Nothing | Wait::ViewAt { .. } => None,
        }
    }

    /// Whether a candidate is on its way to etcd, or there and not yet in the view.
    pub(super) const fn is_posting(&self) -> bool {
        matches!(self.request, Some((_, Move::Post { .. }))) || matches!(self.wait, Wait::ViewAt { posted: true, .. })
    }

    pub(super) const fn has_request(&self) -> bool {
        self.request.is_some()
    }
}

/// The publications of the past, with this one at their end.
fn history(scope: &Scope, view: &View, revision: &ContentRevision, now_unix_ms: u64) -> String {
    let mut history: PublicationHistory = view.json(&scope.revision_history()).unwrap_or_default();
    history.0.push(Published {
        sha: revision.sha.clone(),
        generation: revision.generation,
        subject: revision.subject.clone(),
        since_unix_ms: now_unix_ms,
    });
    let surplus = history.0.len().saturating_sub(HISTORY_MAX);
    history.0.drain(..surplus);
    serde_json::to_string(&history).unwrap_or_default()
}

/// The serving web bots that do not serve `sha`, by name.
pub(super) fn behind(view: &View, web_scopes: &BTreeSet<Scope>, sha: &str) -> Vec<String> {
    let serves = |facts: &WebFacts| facts.serving.as_deref() == Some(sha);
    webs(view, web_scopes).into_iter().filter(|w| w.holds_slot() && !serves(&w.facts)).map(|w| w.name).collect()
}

/// Who has a commit, among the web bots that are asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Readiness {
    /// Somebody could serve it: what nobody can must not go live. Where nobody is, nobody is harmed.
    pub(super) can_be_served: bool,
    /// The bots that have not prepared it, by name.
    pub(super) late: Vec<String>,
    /// What one of them says that it lacks.
    pub(super) trouble: Option<String>,
}

impl Readiness {
    /// Those with a slot are asked. Where nobody has one, those who stand by are: they serve next.
    pub(super) fn of(view: &View, web_scopes: &BTreeSet<Scope>, sha: &str) -> Self {
        let (serving, standby): (Vec<_>, Vec<_>) = webs(view, web_scopes).into_iter().partition(Web::holds_slot);
        let asked = if serving.is_empty() { standby } else { serving };
        // The word of a bot that does not serve yet is about files alone: it counts where surely no bot knows more.
        let nobody_serves = view.is_watched() && !asked.iter().any(Web::serves);
        let has_it = |web: &Web| web.has(sha) && (web.serves() || nobody_serves);
        let can_be_served = (nobody_serves && asked.is_empty()) || asked.iter().any(has_it);
        let late: Vec<Web> = asked.into_iter().filter(|web| !web.has(sha)).collect();
        let trouble = late.iter().find_map(Web::lacks);
        Self { can_be_served, late: late.into_iter().map(|web| web.name).collect(), trouble }
    }
}

/// A serving web bot that can never serve `sha`, by `scope/name`, and why. It serves another commit, so that neither its
/// settings nor its machine are to blame; what a bot says that does not serve may be its own fault.
pub(super) fn refusal(view: &View, web_scopes: &BTreeSet<Scope>, sha: &str) -> Option<(String, String)> {
    let refuses = |web: Web| {
        let refused = web.facts.refused.filter(|refused| refused.sha == sha)?;
        web.facts.serving.map(|_other| (format!("{}/{}", web.scope, web.name), refused.why))
    };
    webs(view, web_scopes).into_iter().filter(Web::holds_slot).find_map(refuses)
}

/// The commits that some web bot serves, or has prepared. Idle bots count: they serve what they hold when they wake up.
pub(super) fn in_use(view: &View, web_scopes: &BTreeSet<Scope>) -> BTreeSet<String> {
    webs(view, web_scopes).into_iter().flat_map(|web| [web.facts.serving, web.facts.prepared]).flatten().collect()
}

/// A web bot, as it shows itself.
#[derive(Debug, Clone)]
pub(super) struct Web {
    pub(super) scope: String,
    pub(super) name: String,
    pub(super) facts: WebFacts,
}

impl Web {
    /// A bot serves as long as it holds a slot.
    pub(super) const fn holds_slot(&self) -> bool {
        self.facts.slot.is_some()
    }

    pub(super) fn has(&self, sha: &str) -> bool {
        self.facts.prepared.as_deref() == Some(sha) || self.facts.serving.as_deref() == Some(sha)
    }

    pub(super) const fn serves(&self) -> bool {
        self.facts.serving.is_some()
    }

    fn lacks(&self) -> Option<String> {
        let why = self.facts.refused.as_ref().map(|refused| &refused.why).or(self.facts.trouble.as_ref())?;
        Some(format!("{}: {why}", self.name))
    }
}

/// All web bots that are there.
pub(super) fn webs(view: &View, web_scopes: &BTreeSet<Scope>) -> Vec<Web> {
    let mut found = Vec::new();
    for scope in web_scopes {
        let prefix = scope.members_prefix();
        for kv in view.below(&prefix) {
            let Some(member) = Member::from_json(&kv.value).filter(|m| m.head.kind == Kind::Web) else { continue };
            let Some(facts) = member.facts::<WebFacts>() else { continue };
            let name = kv.key.strip_prefix(&prefix).unwrap_or(&kv.key).to_owned();
            found.push(Web { scope: scope.name().to_owned(), name, facts });
        }
    }
    found
}

/// One line of bounded length.
fn cut(reason: &str) -> String {
    let line: String = reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let end = line.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= REASON_LEN_MAX).last();
    line.get(..end.unwrap_or(0)).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::{REASON_LEN_MAX, cut};

    #[test]
    fn reasons_are_one_line_of_bounded_length() {
        assert_eq!(cut("a\nb"), "a b");
        assert_eq!(cut(&"ä".repeat(400)).len(), REASON_LEN_MAX);
    }
}
