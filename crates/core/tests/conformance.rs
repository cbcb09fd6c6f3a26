//! One contract, two stores: the in-memory model and a real etcd must pass the same suite.

mod support;

use bots_core::{
    dcs::{Change, Compare, DcsEvent, LeaseId, Outcome, Revision, TRANSACTION_OPS_MAX, Transaction, Write},
    machine::Span,
};
use support::store::{Memory, Real, Store, changes};

/// etcd grants no less than two seconds at its default election time-out.
const TTL: Span = Span::from_secs(2);

macro_rules! both {
    ($($test:ident)*) => {
        mod memory {
            use super::*;
            $(#[tokio::test] async fn $test() { super::$test(Memory::start().await).await; })*
        }
        mod etcd {
            use super::*;
            $(#[tokio::test] async fn $test() { super::$test(Real::start().await).await; })*
        }
    };
}

both! {
    a_key_is_created_by_one_only
    every_compare_holds_and_fails_as_it_says
    a_refused_transaction_changes_nothing_and_shows_what_it_found
    a_transaction_is_one_revision
    a_transaction_with_too_many_operations_is_never_carried_out
    deleting_nothing_changes_nothing
    a_lease_that_is_not_renewed_takes_its_keys_with_it
    a_renewed_lease_lives
    a_revoked_lease_takes_its_keys_with_it
    a_put_under_a_dead_lease_is_refused
    a_key_follows_its_last_lease
    a_list_ends_at_the_prefix
    a_watch_shows_changes_in_order
    a_watch_shows_the_end_of_a_lease
    a_list_is_whole_after_compaction
}

async fn done(store: &mut impl Store, compare: Vec<Compare>, then: Vec<Write>) -> Revision {
    match store.transact(Transaction::new(compare, then)).await {
        Outcome::Done(revision) => revision,
        other => panic!("{other:?}"),
    }
}

async fn put(store: &mut impl Store, key: &str, value: &str) -> Revision {
    done(store, vec![], vec![Write::put(key, value)]).await
}

async fn refused(store: &mut impl Store, compare: Vec<Compare>, then: Vec<Write>) -> Vec<String> {
    match store.transact(Transaction::new(compare, then)).await {
        Outcome::Refused { found, .. } => found.into_iter().map(|kv| format!("{}={}", kv.key, kv.value)).collect(),
        other => panic!("{other:?}"),
    }
}

async fn keys(store: &mut impl Store, prefix: &str) -> Vec<String> {
    store.list(prefix).await.1.into_iter().map(|kv| kv.key).collect()
}

async fn a_key_is_created_by_one_only(mut s: impl Store) {
    let create = |who: &str| (vec![Compare::Absent("/k".into())], vec![Write::put("/k", who)]);
    let (compare, then) = create("a");
    let revision = done(&mut s, compare, then).await;
    let (compare, then) = create("b");
    assert_eq!(refused(&mut s, compare, then).await, ["/k=a"]);
    let (_, found) = s.list("/k").await;
    assert_eq!((found[0].created, found[0].modified, found[0].lease), (revision, revision, None));
}

async fn every_compare_holds_and_fails_as_it_says(mut s: impl Store) {
    let lease = s.grant(TTL.times(5)).await;
    let created = done(&mut s, vec![], vec![Write::put_leased("/k", "1", lease)]).await;
    let modified = done(&mut s, vec![], vec![Write::put_leased("/k", "2", lease)]).await;
    let k = || String::from("/k");
    let holds = [
        Compare::Present(k()),
        Compare::ValueIs(k(), "2".into()),
        Compare::ModifiedAt(k(), modified),
        Compare::CreatedAt(k(), created),
        Compare::LeaseIs(k(), lease),
        Compare::Absent("/other".into()),
    ];
    let fails = [
        Compare::Absent(k()),
        Compare::ValueIs(k(), "1".into()),
        Compare::ModifiedAt(k(), created),
        Compare::CreatedAt(k(), modified),
        Compare::LeaseIs(k(), LeaseId(lease.0 + 1)),
        Compare::Present("/other".into()),
        Compare::ValueIs("/other".into(), "2".into()),
        Compare::LeaseIs("/other".into(), lease),
    ];
    for compare in holds {
        done(&mut s, vec![compare], vec![]).await;
    }
    for compare in fails {
        refused(&mut s, vec![compare.clone(), Compare::Present(k())], vec![]).await;
    }
}

async fn a_refused_transaction_changes_nothing_and_shows_what_it_found(mut s: impl Store) {
    put(&mut s, "/a", "1").await;
    let before = put(&mut s, "/b", "2").await;
    let compare = vec![Compare::Present("/b".into()), Compare::Absent("/a".into()), Compare::Absent("/c".into())];
    let outcome = s.transact(Transaction::new(compare, vec![Write::put("/a", "x"), Write::delete("/b")])).await;
    let Outcome::Refused { revision, found } = outcome else { panic!("{outcome:?}") };
    let found: Vec<_> = found.iter().map(|kv| (kv.key.as_str(), kv.value.as_str())).collect();
    assert_eq!((revision, found), (before, vec![("/a", "1"), ("/b", "2")]));
    assert_eq!(s.list("/").await.0, before);
}

async fn a_transaction_is_one_revision(mut s: impl Store) {
    let first = put(&mut s, "/a", "1").await;
    let second = done(&mut s, vec![], vec![Write::delete("/a"), Write::put("/b", "1"), Write::put("/c", "1")]).await;
    assert_eq!(second.0, first.0 + 1);
    let (revision, found) = s.list("/").await;
    assert_eq!(revision, second);
    assert!(found.iter().all(|kv| kv.modified == second && kv.created == second));
    assert_eq!(found.len(), 2);
}

async fn a_transaction_with_too_many_operations_is_never_carried_out(mut s: impl Store) {
    let puts = |count: usize| (0..count).map(|n| Write::put(format!("/put/{n:03}"), "1")).collect::<Vec<_>>();
    let absences = |count: usize| (0..count).map(|n| Compare::Absent(format!("/absent/{n:03}"))).collect::<Vec<_>>();
    for (compare, then) in [
        (Vec::new(), puts(TRANSACTION_OPS_MAX + 1)),
        (absences(TRANSACTION_OPS_MAX + 1), vec![Write::put("/put/000", "1")]),
    ] {
        let outcome = s.transact(Transaction::new(compare, then)).await;
        assert!(matches!(outcome, Outcome::Unknown(_)), "{outcome:?}");
    }
    assert!(keys(&mut s, "/put/").await.is_empty());
    done(&mut s, absences(TRANSACTION_OPS_MAX), puts(TRANSACTION_OPS_MAX)).await;
    assert_eq!(keys(&mut s, "/put/").await.len(), TRANSACTION_OPS_MAX);
}

async fn deleting_nothing_changes_nothing(mut s: impl Store) {
    let before = put(&mut s, "/a", "1").await;
    assert_eq!(done(&mut s, vec![], vec![Write::delete("/nothing")]).await, before);
}

async fn a_lease_that_is_not_renewed_takes_its_keys_with_it(mut s: impl Store) {
    let lease = s.grant(TTL).await;
    done(&mut s, vec![], vec![Write::put_leased("/a", "1", lease), Write::put_leased("/b", "1", lease)]).await;
    put(&mut s, "/c", "1").await;
    assert_eq!(keys(&mut s, "/").await, ["/a", "/b", "/c"]);
    s.pass(TTL.times(2)).await;
    assert_eq!(keys(&mut s, "/").await, ["/c"]);
    assert!(!s.keep_alive(lease).await);
}

async fn a_renewed_lease_lives(mut s: impl Store) {
    let lease = s.grant(TTL).await;
    done(&mut s, vec![], vec![Write::put_leased("/a", "1", lease)]).await;
    for _ in 0..5 {
        s.pass(TTL.divided_by(2)).await;
        assert!(s.keep_alive(lease).await);
    }
    assert_eq!(keys(&mut s, "/").await, ["/a"]);
}

async fn a_revoked_lease_takes_its_keys_with_it(mut s: impl Store) {
    let lease = s.grant(TTL.times(5)).await;
    done(&mut s, vec![], vec![Write::put_leased("/a", "1", lease)]).await;
    assert!(s.revoke(lease).await);
    assert!(keys(&mut s, "/").await.is_empty());
    assert!(!s.revoke(lease).await);
    assert!(!s.keep_alive(lease).await);
}

async fn a_put_under_a_dead_lease_is_refused(mut s: impl Store) {
    let lease = s.grant(TTL).await;
    s.revoke(lease).await;
    let before = put(&mut s, "/a", "1").await;
    refused(&mut s, vec![], vec![Write::put("/a", "2"), Write::put_leased("/b", "1", lease)]).await;
    let (revision, found) = s.list("/").await;
    assert_eq!((revision, found.len(), found[0].value.as_str()), (before, 1, "1"));
}

async fn a_key_follows_its_last_lease(mut s: impl Store) {
    let first = s.grant(TTL.times(5)).await;
    let second = s.grant(TTL.times(5)).await;
    let created = done(&mut s, vec![], vec![Write::put_leased("/a", "1", first)]).await;
    done(&mut s, vec![], vec![Write::put_leased("/a", "1", second)]).await;
    s.revoke(first).await;
    let (_, found) = s.list("/a").await;
    assert_eq!((found[0].lease, found[0].created), (Some(second), created));
    done(&mut s, vec![], vec![Write::put("/a", "1")]).await;
    s.revoke(second).await;
    assert_eq!(keys(&mut s, "/").await, ["/a"]);
}

async fn a_list_ends_at_the_prefix(mut s: impl Store) {
    for key in ["/service/a/x", "/service/a/y", "/service/ab/x", "/service/b/x", "/service/a"] {
        put(&mut s, key, "1").await;
    }
    assert_eq!(keys(&mut s, "/service/a/").await, ["/service/a/x", "/service/a/y"]);
}

async fn a_watch_shows_changes_in_order(mut s: impl Store) {
    put(&mut s, "/w/old", "1").await;
    s.watch("/w/").await;
    let DcsEvent::Listed { entries, revision: listed, .. } = s.next().await else { panic!("a list comes first") };
    assert_eq!(entries.len(), 1);
    put(&mut s, "/elsewhere", "1").await;
    let first = put(&mut s, "/w/a", "1").await;
    let second = done(&mut s, vec![], vec![Write::put("/w/b", "1"), Write::delete("/w/a")]).await;
    let third = done(&mut s, vec![], vec![Write::delete("/w/old")]).await;
    assert!(listed < first);
    let mut seen = changes(&mut s, 4).await;
    // The order within one transaction is the store's own.
    seen[1..3].sort_by_key(|c| matches!(c, Change::Deleted { .. }));
    let seen: Vec<_> = seen
        .iter()
        .map(|c| match c {
            Change::Put(kv) => (kv.key.as_str(), Some(kv.value.as_str()), kv.modified),
            Change::Deleted { key, revision } => (key.as_str(), None, *revision),
        })
        .collect();
    let wanted =
        [("/w/a", Some("1"), first), ("/w/b", Some("1"), second), ("/w/a", None, second), ("/w/old", None, third)];
    assert_eq!(seen, wanted);
}

async fn a_watch_shows_the_end_of_a_lease(mut s: impl Store) {
    let lease = s.grant(TTL).await;
    done(&mut s, vec![], vec![Write::put_leased("/w/a", "1", lease)]).await;
    s.watch("/w/").await;
    assert!(matches!(s.next().await, DcsEvent::Listed { .. }));
    s.pass(TTL.times(2)).await;
    let seen = changes(&mut s, 1).await;
    assert!(matches!(&seen[0], Change::Deleted { key, .. } if key == "/w/a"), "{seen:?}");
}

async fn a_list_is_whole_after_compaction(mut s: impl Store) {
    put(&mut s, "/w/a", "1").await;
    let last = put(&mut s, "/w/a", "2").await;
    s.compact(last).await;
    s.watch("/w/").await;
    let DcsEvent::Listed { revision, entries, .. } = s.next().await else { panic!("a list comes first") };
    assert_eq!((revision, entries[0].value.as_str()), (last, "2"));
    put(&mut s, "/w/b", "1").await;
    assert_eq!(changes(&mut s, 1).await.len(), 1);
}
