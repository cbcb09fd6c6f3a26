//! `botctl web`: what an operator asks of a web fleet, as edits of its configuration. Pure; the bots watch that key.

use bots_core::wire::SLOTS_MAX;
use clap::Subcommand;
use serde_json::Value;

use crate::failure::Failure;

/// What to do with a web fleet.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub(crate) enum Web {
    /// Say how few and how many bots may serve
    Scale {
        /// The scope
        scope: String,
        /// At least so many
        #[arg(long)]
        min: Option<u32>,
        /// At most so many
        #[arg(long)]
        max: Option<u32>,
        /// How many requests in flight one bot shall carry
        #[arg(long)]
        target: Option<u32>,
    },
    /// Let exactly so many bots serve, whatever the load; `scale` ends it
    Pin {
        /// The scope
        scope: String,
        /// How many
        count: u32,
    },
    /// Replace every app's instance by a new one, without losing a request
    Restart {
        /// The scope
        scope: String,
    },
    /// Let a bot finish its requests and rest until `wake`; another takes its place if there is one
    Drain {
        /// The scope
        scope: String,
        /// The bot
        name: String,
    },
    /// Take a drain back: the bot is idle, and serves again as soon as a place is free for it. It posts no place: `scale` does
    Wake {
        /// The scope
        scope: String,
        /// The bot
        name: String,
    },
}

/// The edit of a scope's configuration that does it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Edit {
    pub(crate) scope: String,
    pub(crate) set: Vec<String>,
    pub(crate) unset: Vec<String>,
}

/// Puts a request into the configuration's terms. `now_unix_ms` tells one restart from the next.
pub(crate) fn edit(asked: Web, now_unix_ms: u64) -> Result<Edit, Failure> {
    let (scope, set, unset) = match asked {
        Web::Scale { scope, min, max, target } => {
            let fields = [("min", min), ("max", max), ("target_in_flight", target)];
            let set: Vec<String> = fields
                .iter()
                .filter_map(|(name, value)| value.map(|value| format!("scaling.{name}={value}")))
                .collect();
            if set.is_empty() {
                return Err(Failure::usage("nothing to scale: give --min, --max or --target"));
            }
            (scope, set, Vec::new())
        }
        Web::Pin { scope, count } => {
            (scope, vec![format!("scaling.min={count}"), format!("scaling.max={count}")], Vec::new())
        }
        Web::Restart { scope } => (scope, vec![format!("restart={now_unix_ms}")], Vec::new()),
        Web::Drain { scope, name } => (scope, vec![format!("drain.\"{name}\"=true")], Vec::new()),
        Web::Wake { scope, name } => (scope, Vec::new(), vec![format!("drain.\"{name}\"")]),
    };
    Ok(Edit { scope, set, unset })
}

/// What is wrong with the figures of `scaling` in a configuration, one line: no web bot would go by them. Those that are left out
/// are in the bots' own files, and not known here.
pub(crate) fn fault(config: &Value) -> Option<String> {
    let scaling = config.get("scaling").filter(|scaling| !scaling.is_null())?;
    let Some(fields) = scaling.as_object() else { return Some(format!("scaling is {scaling}: it must be a mapping")) };
    let bots_max = u64::from(SLOTS_MAX);
    let bounds = [("min", 0, bots_max), ("max", 1, bots_max), ("target_in_flight", 1, u64::from(u32::MAX))];
    let bounds = bounds.into_iter().chain([("stable_window_s", 0, u64::from(u32::MAX))]);
    for (name, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        let Some((_, least, most)) = bounds.clone().find(|(known, ..)| known == name) else {
            return Some(format!("scaling.{name} is no field: use min, max, target_in_flight or stable_window_s"));
        };
        if !value.as_u64().is_some_and(|value| (least..=most).contains(&value)) {
            return Some(format!("scaling.{name} is {value}: use a whole number from {least} to {most}"));
        }
    }
    let figure = |name: &str| fields.get(name).and_then(Value::as_u64);
    let (min, max) = figure("min").zip(figure("max")).filter(|(min, max)| min > max)?;
    Some(format!("scaling.min is {min} and scaling.max is {max}: raise the one or lower the other"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(asked: Web, before: serde_json::Value, after: &serde_json::Value) {
        let Edit { set, unset, .. } = edit(asked, 7).expect("an edit");
        assert_eq!(crate::config::apply(before, &set, &unset).expect("applied"), *after);
    }

    #[test]
    fn figures_that_no_bot_would_go_by_are_named() {
        let wrong = |scaling: serde_json::Value| fault(&json!({ "scaling": scaling })).expect("a fault");
        assert!(wrong(json!({"min": 25, "max": 20})).contains("scaling.min is 25 and scaling.max is 20"));
        assert!(wrong(json!({"min": 0, "max": 0})).contains("scaling.max is 0: use a whole number from 1 to 1000"));
        assert!(wrong(json!({"max": 1001})).contains("from 1 to 1000"));
        assert!(wrong(json!({"target_in_flight": 0})).contains("scaling.target_in_flight is 0"));
        assert!(wrong(json!({"min": "two"})).contains("scaling.min is \"two\""));
        assert!(wrong(json!({"most": 2})).contains("scaling.most"));
        assert!(wrong(json!(3)).contains("a mapping"));
        let good =
            [json!({}), json!({"scaling": null}), json!({"scaling": {"min": 3, "max": 3, "stable_window_s": 0}})];
        assert_eq!(good.map(|config| fault(&config)), [None, None, None]);
    }

    #[test]
    fn requests_are_edits() {
        let scope = || String::from("web");
        let scale = Web::Scale { scope: scope(), min: Some(2), max: None, target: Some(16) };
        check(scale, json!({"mine": 1}), &json!({"mine": 1, "scaling": {"min": 2, "target_in_flight": 16}}));
        check(Web::Pin { scope: scope(), count: 3 }, json!({}), &json!({"scaling": {"min": 3, "max": 3}}));
        let (drain, wake) = (|name: &str| Web::Drain { scope: scope(), name: name.to_owned() }, "web-1.example");
        check(drain(wake), json!({}), &json!({"drain": {"web-1.example": true}}));
        let awake = Web::Wake { scope: scope(), name: wake.to_owned() };
        check(awake, json!({"drain": {"web-1.example": true, "b": true}}), &json!({"drain": {"b": true}}));
        check(Web::Restart { scope: scope() }, json!({"restart": 3}), &json!({"restart": 7}));
        let nothing = Web::Scale { scope: scope(), min: None, max: None, target: None };
        assert!(edit(nothing, 7).expect_err("nothing to do").message.contains("--min"));
    }
}
