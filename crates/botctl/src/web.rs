//! `botctl web`: what an operator asks of a web fleet, as edits of its configuration. Pure; the bots watch that key.

use bots_core::wire::{Kind, SLOTS_MAX};
use clap::Subcommand;
use serde_json::Value;

use crate::{failure::Failure, fleet::ScopeView};

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

impl Web {
    /// The scope.
    pub(crate) fn scope(&self) -> &str {
        match self {
            Self::Scale { scope, .. }
            | Self::Pin { scope, .. }
            | Self::Restart { scope }
            | Self::Drain { scope, .. }
            | Self::Wake { scope, .. } => scope,
        }
    }
}

/// Checks that there is somebody who would act on a request.
pub(crate) fn check(asked: &Web, view: &ScopeView) -> Result<(), Failure> {
    let scope = asked.scope();
    let known = || view.members.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    if let Some((name, other)) = view.members.iter().find(|(_, member)| member.head.kind != Kind::Web) {
        return Err(Failure::failed(format!("{scope} is no web scope: {name} is a {} bot", other.head.kind)));
    }
    match asked {
        Web::Drain { name, .. } if !view.members.contains_key(name) => {
            let known =
                if view.members.is_empty() { String::from("none is alive") } else { format!("it has {}", known()) };
            Err(Failure::not_found(format!("{scope} has no bot {name}: {known}")))
        }
        Web::Wake { name, .. } if !is_drained(view, name) => Err(Failure::not_found(format!(
            "{name} of {scope} is not drained, so there is nothing to take back: a bot that rests wakes when load asks for one, or for \
             more of them: botctl web scale {scope} --min N"
        ))),
        Web::Drain { .. } | Web::Wake { .. } | Web::Scale { .. } | Web::Pin { .. } | Web::Restart { .. } => Ok(()),
    }
}

fn is_drained(view: &ScopeView, name: &str) -> bool {
    view.json::<Value>("config").is_some_and(|config| config["drain"][name] == true)
}

/// What is wrong with the fields of web bots that `new` has other than `old`, a line each: they would go on by what was there
/// before, with the whole of it or with its scaling.
pub(crate) fn faults(new: &Value, old: &Value) -> Vec<String> {
    let changed = |field: &str| new.get(field).filter(|value| old.get(field) != Some(value));
    let scaling = changed("scaling").and_then(|_| fault(new));
    let restart = changed("restart").filter(|value| !value.is_u64());
    let restart = restart.map(|value| format!("restart is {value}: use a whole number, another than before"));
    let cdn_url = changed("cdn_url").filter(|value| !value.is_string() && !value.is_null());
    let cdn_url = cdn_url.map(|value| format!("cdn_url is {value}: use the address of a CDN, as text"));
    let drain = changed("drain").and_then(|value| match value.as_object() {
        Some(bots) => {
            let (name, value) = bots.iter().find(|(_, value)| !value.is_boolean())?;
            Some(format!("drain.{name} is {value}: use true or false"))
        }
        None => Some(format!("drain is {value}: it must be a mapping of bots to true or false")),
    });
    [scaling, restart, cdn_url, drain].into_iter().flatten().collect()
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
    use crate::fleet::{Fleet, samples};

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
    fn what_would_have_the_whole_key_passed_over_is_named() {
        let none = json!({});
        let wrong = |config: serde_json::Value| faults(&config, &none).join("; ");
        assert_eq!(wrong(json!({"restart": "now"})), r#"restart is "now": use a whole number, another than before"#);
        assert_eq!(wrong(json!({"drain": {"a": true, "b": "yes"}})), r#"drain.b is "yes": use true or false"#);
        assert_eq!(wrong(json!({"drain": null})), "drain is null: it must be a mapping of bots to true or false");
        assert_eq!(wrong(json!({"cdn_url": 3})), "cdn_url is 3: use the address of a CDN, as text");
        assert!(wrong(json!({"scaling": {"min": 25, "max": 20}})).contains("scaling.min is 25"));
        let good = json!({"restart": 7, "drain": {"a": false}, "cdn_url": null, "scaling": {"min": 1}, "mine": "now"});
        assert_eq!(wrong(good), "");
        let old = json!({"restart": "now", "scaling": 3});
        assert_eq!(faults(&json!({"restart": "now", "scaling": 3, "drain": {"a": true}}), &old), Vec::<String>::new());
    }

    #[test]
    fn requests_are_checked_against_who_is_there() {
        let entries = samples::fleet();
        let fleet = Fleet::of("service", &entries);
        let check = |scope: &str, name: &str| {
            let asked = Web::Drain { scope: scope.to_owned(), name: name.to_owned() };
            super::check(&asked, &fleet.scopes[scope]).map_err(|failure| failure.message)
        };
        assert_eq!(check("web", "web-2"), Ok(()));
        assert!(check("web", "web-9").is_err_and(|why| why.starts_with("web has no bot web-9: it has web-1")));
        assert_eq!(check("main", "pg-1"), Err(String::from("main is no web scope: pg-1 is a postgres bot")));
        let wake = Web::Wake { scope: String::from("web"), name: String::from("web-2") };
        let why = super::check(&wake, &fleet.scopes["web"]).expect_err("nobody has drained it").message;
        assert!(why.starts_with("web-2 of web is not drained"), "{why}");
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
