//! Our words for a store and etcd's, put into each other. No request is sent here.

use etcd_client::{Compare as EtcdCompare, CompareOp, GetResponse, PutOptions, Txn, TxnOp, TxnOpResponse};

use crate::{
    dcs::{Compare, KeyValue, LeaseId, Outcome, Revision, Transaction, Write},
    machine::Span,
};

pub(super) fn to_txn(transaction: &Transaction) -> Txn {
    let compare: Vec<EtcdCompare> = transaction.compare.iter().map(to_compare).collect();
    let then: Vec<TxnOp> = transaction.then.iter().map(to_op).collect();
    let mut keys: Vec<&str> = transaction.compare.iter().map(Compare::key).collect();
    keys.sort_unstable();
    keys.dedup();
    let otherwise: Vec<TxnOp> = keys.into_iter().map(|key| TxnOp::get(key, None)).collect();
    Txn::new().when(compare).and_then(then).or_else(otherwise)
}

fn to_compare(compare: &Compare) -> EtcdCompare {
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    match compare {
        Compare::Absent(key) => EtcdCompare::create_revision(key.as_str(), CompareOp::Equal, 0),
        Compare::Present(key) => EtcdCompare::create_revision(key.as_str(), CompareOp::Greater, 0),
        Compare::ValueIs(key, value) => EtcdCompare::value(key.as_str(), CompareOp::Equal, value.as_str()),
        Compare::ModifiedAt(key, at) => EtcdCompare::mod_revision(key.as_str(), CompareOp::Equal, number(at.0)),
        Compare::CreatedAt(key, at) => EtcdCompare::create_revision(key.as_str(), CompareOp::Equal, number(at.0)),
        Compare::LeaseIs(key, lease) => EtcdCompare::lease(key.as_str(), CompareOp::Equal, lease.0),
    }
}

fn to_op(write: &Write) -> TxnOp {
    match write {
        Write::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            TxnOp::put(key.as_str(), value.as_str(), options)
        }
        Write::Delete { key } => TxnOp::delete(key.as_str(), None),
    }
}

pub(super) fn outcome(answer: &etcd_client::TxnResponse) -> Outcome {
    let revision = header_revision(answer.header());
    if answer.succeeded() {
        return Outcome::Done(revision);
    }
    let read = answer.op_responses().into_iter().filter_map(|op| match op {
        TxnOpResponse::Get(found) => Some(range(&found).1),
        TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
    });
    Outcome::Refused { revision, found: read.flatten().collect() }
}

pub(super) fn range(found: &GetResponse) -> (Revision, Vec<KeyValue>) {
    (header_revision(found.header()), found.kvs().iter().map(key_value).collect())
}

fn header_revision(header: Option<&etcd_client::ResponseHeader>) -> Revision {
    Revision(header.map_or(0, |h| u64::try_from(h.revision()).unwrap_or(0)))
}

/// Ours are UTF-8; a foreign value that is not is shown as well as it can be.
pub(super) fn key_value(kv: &etcd_client::KeyValue) -> KeyValue {
    let revision = |n: i64| Revision(u64::try_from(n).unwrap_or(0));
    KeyValue {
        key: String::from_utf8_lossy(kv.key()).into_owned(),
        value: String::from_utf8_lossy(kv.value()).into_owned(),
        created: revision(kv.create_revision()),
        modified: revision(kv.mod_revision()),
        lease: (kv.lease() != 0).then(|| LeaseId(kv.lease())),
    }
}

pub(super) fn secs_span(secs: i64) -> Span {
    Span::from_secs(u64::try_from(secs).unwrap_or(0))
}
