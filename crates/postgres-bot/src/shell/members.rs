//! What members ask of each other in failsafe mode: our questions to the others' APIs, and theirs to the machine.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bots_core::{
    dcs::Revision,
    shell::{Events, http},
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{kinship::Kinship, peers::origin};
use crate::machine::{Ask, AskId, AskedId, Event};

/// Where a primary asks; the path is Patroni's.
pub(super) const LEAD: &str = "/failsafe";

/// Where a candidate asks.
pub(super) const STAND: &str = "/failsafe/candidate";

/// What a member answers a primary that it vouches for, as Patroni's do.
pub(super) const ACCEPTED: &str = "Accepted";

/// A question names two members and a number.
pub(super) const QUESTION_BYTES_MAX: usize = 4 * 1024;

/// So many questions may wait for the machine; it answers in a millisecond.
const WAITING_MAX: usize = 64;

/// A question on its way. Patroni's primary sends its name and addresses alone: it counts every member and knows of no
/// promise, so that its question is none of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Question {
    /// Who asks.
    pub(super) name: String,
    /// Who is asked: an address may have come to be another's.
    pub(super) to: String,
    /// Of a primary: the creation of its lock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) generation: Option<Revision>,
}

/// The questions of other members that wait for the machine's answer.
#[derive(Debug, Default)]
pub(super) struct Desk {
    inner: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    count: u64,
    askers: BTreeMap<AskedId, oneshot::Sender<Result<(), String>>>,
}

impl Desk {
    /// Puts a question to the machine; nothing if it gives no answer.
    pub(super) async fn ask(&self, events: &Events<Event>, ask: Ask) -> Option<Result<(), String>> {
        let (sender, answer) = oneshot::channel();
        let id = {
            let mut waiting = self.waiting();
            waiting.askers.retain(|_, asker| !asker.is_closed());
            if waiting.askers.len() >= WAITING_MAX {
                return None;
            }
            waiting.count += 1;
            let id = AskedId(waiting.count);
            waiting.askers.insert(id, sender);
            id
        };
        events.send(Event::MemberAsked { id, ask }).await;
        answer.await.ok()
    }

    /// The machine's answer.
    pub(super) fn answer(&self, id: AskedId, answer: Result<(), String>) {
        let asker = self.waiting().askers.remove(&id);
        if let Some(asker) = asker {
            let _nobody_waits_any_more = asker.send(answer);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks each member at once; each one's answer or silence is an event of its own.
pub(super) fn ask(
    id: AskId,
    ask: &Ask,
    members: BTreeMap<String, String>,
    kinship: &Kinship,
    deadline: Duration,
    events: &Events<Event>,
) {
    for (member, api_url) in members {
        let (events, ask, kinship) = (events.clone(), ask.clone(), kinship.clone());
        tokio::spawn(async move {
            let answer = question(&member, &api_url, ask, &kinship, deadline).await;
            events.send(Event::MemberAnswered { id, member, answer }).await;
        });
    }
}

async fn question(member: &str, api_url: &str, ask: Ask, kinship: &Kinship, deadline: Duration) -> Result<(), String> {
    let (path, name, generation) = match ask {
        Ask::Lead { leader, generation } => (LEAD, leader, Some(generation)),
        Ask::Stand { candidate } => (STAND, candidate, None),
    };
    let origin = origin(api_url).ok_or_else(|| format!("its api_url `{api_url}` cannot be used"))?;
    let question = Question { name, to: member.to_owned(), generation };
    let body = serde_json::to_string(&question).map_err(|e| e.to_string())?;
    let authorization = kinship.header(path, body.as_bytes());
    let answer = http::post(&format!("{origin}{path}"), authorization.as_deref(), body, deadline).await;
    let (status, body) = answer.map_err(|e| e.to_string())?;
    let said: String = String::from_utf8_lossy(&body).chars().take(200).collect();
    let said = said.trim();
    if status == 200 && said == ACCEPTED { Ok(()) } else { Err(format!("{status}: {said}")) }
}
