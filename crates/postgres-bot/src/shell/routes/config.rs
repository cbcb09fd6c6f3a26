//! The cluster's configuration: shown, and changed by compare-and-swap.

use axum::{
    Json,
    body::Bytes,
    extract::State as Extract,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use bots_core::{
    dcs::{Compare, Outcome, Transaction, Write},
    wire::config::misfits,
};
use serde_json::Value;

use super::{Site, read, say, show};

/// `GET /config`.
pub(super) async fn show(Extract(site): Extract<Site>) -> Response {
    let state = site.state();
    match state.view().value(&state.settings().scope.config()) {
        Some(text) => show::raw_json(text.to_owned()),
        None => say(StatusCode::BAD_GATEWAY, "the cluster has no configuration yet"),
    }
}

/// `PATCH /config`: objects are merged, `null` deletes, anything else replaces.
pub(super) async fn patch(Extract(site): Extract<Site>, body: Bytes) -> Response {
    let patch = match object(&body) {
        Ok(patch) => patch,
        Err(refusal) => return *refusal,
    };
    let key = site.state().settings().scope.config();
    let found = match site.inner.etcd.get(&key).await {
        Ok(Some(found)) => found,
        Ok(None) => return say(StatusCode::SERVICE_UNAVAILABLE, "the cluster has no configuration yet"),
        Err(error) => return say(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
    };
    let Ok(before) = serde_json::from_str::<Value>(&found.value) else {
        return say(StatusCode::SERVICE_UNAVAILABLE, format!("the value of {key} in etcd is not JSON: mend it there"));
    };
    let mut config = before.clone();
    merge(&mut config, patch);
    if config == before {
        return Json(config).into_response();
    }
    if let Err(refusal) = fit(&config, &before) {
        return *refusal;
    }
    let unchanged = Compare::ModifiedAt(key.clone(), found.modified);
    let transaction = Transaction::new(vec![unchanged], vec![Write::put(key, config.to_string())]);
    match site.inner.etcd.transact(&transaction).await {
        Outcome::Done(_) => Json(config).into_response(),
        Outcome::Refused { .. } => {
            say(StatusCode::CONFLICT, "somebody else changed the configuration meanwhile: try again")
        }
        Outcome::Unknown(why) => say(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("etcd did not answer ({why}): look whether the change was made"),
        ),
    }
}

/// `PUT /config`: the whole configuration, whatever it was before.
pub(super) async fn put(Extract(site): Extract<Site>, body: Bytes) -> Response {
    let config = match object(&body) {
        Ok(config) => config,
        Err(refusal) => return *refusal,
    };
    if let Err(refusal) = fit(&config, &Value::Null) {
        return *refusal;
    }
    let key = site.state().settings().scope.config();
    // One that is carried out late must not overwrite what was changed since.
    let unchanged = match site.inner.etcd.get(&key).await {
        Ok(Some(found)) => Compare::ModifiedAt(key.clone(), found.modified),
        Ok(None) => Compare::Absent(key.clone()),
        Err(error) => return say(StatusCode::BAD_GATEWAY, error.to_string()),
    };
    let transaction = Transaction::new(vec![unchanged], vec![Write::put(key, config.to_string())]);
    match site.inner.etcd.transact(&transaction).await {
        Outcome::Done(_) => Json(config).into_response(),
        Outcome::Refused { .. } => {
            say(StatusCode::CONFLICT, "somebody else changed the configuration meanwhile: try again")
        }
        Outcome::Unknown(why) => {
            say(StatusCode::BAD_GATEWAY, format!("etcd did not answer ({why}): look whether the change was made"))
        }
    }
}

fn object(body: &[u8]) -> Result<Value, Box<Response>> {
    let value: Value = read(body)?;
    if value.as_object().is_none_or(serde_json::Map::is_empty) {
        let why = "the body must be a JSON object of the fields to change";
        return Err(Box::new(say(StatusCode::BAD_REQUEST, why)));
    }
    Ok(value)
}

/// Nothing goes into etcd that no bot could go by. What was wrong before keeps nobody from changing something else.
fn fit(config: &Value, before: &Value) -> Result<(), Box<Response>> {
    let known = misfits(before);
    let misfits: Vec<String> = misfits(config).into_iter().filter(|misfit| !known.contains(misfit)).collect();
    if misfits.is_empty() { Ok(()) } else { Err(Box::new(say(StatusCode::BAD_REQUEST, misfits.join("; ")))) }
}

fn merge(base: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *base = patch;
        return;
    };
    if !base.is_object() {
        *base = Value::Object(serde_json::Map::new());
    }
    let Value::Object(base) = base else { return };
    for (name, value) in patch {
        if value.is_null() {
            base.remove(&name);
        } else {
            merge(base.entry(name).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::merge;

    #[test]
    fn a_patch_merges_and_null_deletes() {
        let mut config = json!({"ttl": 5, "postgresql": {"parameters": {"a": 1, "b": 2}, "use_pg_rewind": true}});
        merge(&mut config, json!({"ttl": null, "postgresql": {"parameters": {"a": null, "c": {"d": null, "e": 3}}}}));
        assert_eq!(config, json!({"postgresql": {"parameters": {"b": 2, "c": {"e": 3}}, "use_pg_rewind": true}}));
    }
}
