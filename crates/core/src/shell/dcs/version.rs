//! What the renewal of a lease is worth that an etcd member has answered: by its version, by its cluster, or by reads beside it.

use std::{sync::Arc, time::Duration};

use etcd_client::{Client, GetOptions, MemberListResponse};

use super::{
    etcd::{Etcd, EtcdError, Failure},
    route::Member,
};
use crate::{
    machine::{Span, Time},
    shell::clock::Clock,
};

/// The first versions whose leader makes sure, before it answers a renewal, that it has not been replaced. Before them the leader
/// answers from its own memory: one whose disk has stalled does so after another was elected, which lets the lease run out.
const SINCE_3_4: u64 = 31;
const SINCE_3_5: u64 = 13;

/// For how long an etcd of one member is taken to be one without asking again. To replace its leader it would have to become one of
/// three, and a third member cannot be added before the second has caught up.
const ALONE_FOR: Span = Span::from_secs(30);

/// Whether a member's renewals are the word of a leader that was one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Renews {
    /// Its leader makes sure, for as long as the connection lasts.
    AsLeader,
    /// It is all of its cluster: there is nobody who could be elected in its place.
    Alone { until: Time },
    /// Only a read can tell.
    Unproven,
}

/// A read that a majority stood behind: in this term of etcd's leaders this member answered it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sighting {
    pub(super) member: Member,
    /// How etcd calls that member: an address may lead to another one after a new connection.
    pub(super) id: u64,
    pub(super) term: u64,
}

impl Etcd {
    /// Whether a renewal that `member` answers is the word of a leader that was one. One that does not say its version is taken
    /// for an old one, which costs a read and no safety.
    ///
    /// # Errors
    /// If it does not answer.
    pub(super) async fn renews_only_as_leader(&self, member: Member, deadline: Duration) -> Result<bool, EtcdError> {
        let now = Clock::now();
        let known = self.connection(member, |connection| connection.renews);
        let renews = match known {
            Some(Renews::Alone { until }) if until <= now => self.alone(member, now, deadline).await?,
            Some(known) => return Ok(known != Renews::Unproven),
            None => {
                let status = |client: Arc<Client>| async move { client.maintenance_client().status().await };
                match self.attempt("status", member, deadline, status).await {
                    Ok(status) if renews_only_as_leader(status.version()) => Renews::AsLeader,
                    Ok(_) | Err(Failure::Refused { .. }) => self.alone(member, now, deadline).await?,
                    Err(failure) => return Err(failure.into()),
                }
            }
        };
        self.connection(member, |connection| connection.renews = Some(renews));
        Ok(renews != Renews::Unproven)
    }

    async fn alone(&self, member: Member, now: Time, deadline: Duration) -> Result<Renews, EtcdError> {
        let members = |client: Arc<Client>| async move { client.cluster_client().member_list().await };
        match self.attempt("member_list", member, deadline, members).await {
            Ok(list) if is_alone(&list) => Ok(Renews::Alone { until: now + ALONE_FOR }),
            Ok(_) | Err(Failure::Refused { .. }) => Ok(Renews::Unproven),
            Err(failure) => Err(failure.into()),
        }
    }

    /// Who answers a read at `member` that a majority stands behind, and in which term of etcd's leaders. What stands at `key` is
    /// of no interest.
    ///
    /// # Errors
    /// If it does not answer, or refuses.
    pub(super) async fn sighting(&self, member: Member, key: &str, deadline: Duration) -> Result<Sighting, EtcdError> {
        let read = |client: Arc<Client>| async move {
            client.kv_client().get(key, Some(GetOptions::new().with_keys_only().with_limit(1))).await
        };
        match self.attempt("range", member, deadline, read).await {
            Ok(found) => {
                let said = found.header().map(|header| (header.member_id(), header.raft_term()));
                let (id, term) =
                    said.ok_or_else(|| EtcdError::Unavailable(String::from("an answer without a header")))?;
                Ok(Sighting { member, id, term })
            }
            Err(failure) => Err(failure.into()),
        }
    }
}

/// Whether the member that answers is the only one of its cluster. A proxy in front of it names itself, and has no number.
fn is_alone(list: &MemberListResponse) -> bool {
    let own = list.header().map_or(0, etcd_client::ResponseHeader::member_id);
    matches!(list.members(), [only] if own != 0 && only.id() == own)
}

/// Whether a member of this version renews a lease only while its leader is sure to lead.
fn renews_only_as_leader(version: &str) -> bool {
    let figure = |part: &str| part.split(['-', '+']).next().and_then(|digits| digits.parse::<u64>().ok());
    let parts: Option<Vec<u64>> = version.trim().trim_start_matches('v').splitn(3, '.').map(figure).collect();
    match parts.as_deref() {
        Some([3, 4, patch]) => *patch >= SINCE_3_4,
        Some([3, 5, patch]) => *patch >= SINCE_3_5,
        Some([major, minor, _]) => (*major, *minor) >= (3, 6),
        Some(_) | None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::renews_only_as_leader;

    #[test]
    fn the_versions_that_make_sure_are_known() {
        let sure = ["3.4.31", "3.4.40", "3.5.13", "3.5.21", "3.6.0", "3.6.0-rc.1", "v3.6.4", "4.0.0"];
        assert_eq!(sure.map(renews_only_as_leader), [true; 8]);
        let old = ["3.4.23", "3.4.30", "3.5.0", "3.5.12", "3.3.27", "2.3.8", "", "3.6", "main", "3.5.x"];
        assert_eq!(old.map(renews_only_as_leader), [false; 10]);
    }
}
