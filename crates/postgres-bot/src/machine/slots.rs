//! Replication slots: which there shall be on this server, and what to change about those that there are. Pure and
//! level-triggered: decided anew from the members, the cluster's settings and what the server shows.
//!
//! A member's slot keeps the log on the leader while the member is away, so that it comes back by streaming. Every member that may lead
//! has a slot for every other one, too, which follows the leader's: after a failover the log is still there.

use std::collections::BTreeMap;

use bots_core::{
    machine::{Span, Time},
    wire::{
        Lsn, PostgresStatus,
        config::{is_slot_matcher, seconds},
        tags::yes_or_no,
    },
};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    event::{Action, SlotChange},
    phase::Phase,
    postgres::{ReplicationSlot, Server, SlotKind},
    state::{State, Timer},
    turn::Turn,
};

/// How long the leader keeps a slot for a member that has gone, unless told otherwise (Patroni's figure).
const MEMBER_SLOTS_TTL_DEFAULT: Span = Span::from_secs(1_800);

/// A replica keeps a slot that nobody seems to want for this long: the leader tells which ones it retains within seconds.
const GRACE: Span = Span::from_secs(30);

/// A slot on a replica follows the leader's in steps of this many bytes. The log is kept in files of 16 MiB, so that finer ones
/// would only cost.
const STEP: u64 = 1 << 20;

/// After a change, the server is looked at before the next one; a change that does not come about is tried again later and later.
const AGAIN_MIN: Span = Span::from_secs(2);
/// See [`AGAIN_MIN`].
const AGAIN_MAX: Span = Span::from_secs(60);

/// So many changes at a time: a cluster has a handful of members.
const CHANGES_MAX: usize = 32;

/// So long it is told which logical slots were made anew: whoever copies tables anew has seen it by then.
const ANEW_TOLD_FOR: Span = Span::from_secs(24 * 60 * 60);

/// Postgres' limit for a name.
const NAME_LEN_MAX: usize = 63;

/// What the cluster says of replication slots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SlotRules {
    /// Members have slots.
    pub(super) members: bool,
    /// How long the leader keeps a slot that nobody wants any more.
    pub(super) keep: Span,
    /// Slots that there shall be whoever leads.
    pub(super) permanent: BTreeMap<String, SlotKind>,
    /// Slots that are none of our business.
    pub(super) ignored: Vec<Matcher>,
    /// Nobody can make out which ones those are: all might be.
    pub(super) ignores_all: bool,
}

/// Matches slots: every field that is there must be the slot's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Matcher {
    name: Option<String>,
    kind: Option<String>,
    database: Option<String>,
    plugin: Option<String>,
}

/// What is remembered about slots.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Slots {
    /// Since when a slot has been there that nobody wants.
    unwanted: BTreeMap<String, Time>,
    /// The leader has a slot for us, as far as it has said.
    own: bool,
    /// The memory is a leader's.
    led: bool,
    /// What was asked for last, and how often in a row.
    asked: (Vec<SlotChange>, u32),
    /// Nothing is asked for before.
    not_before: Time,
    /// The permanent logical slots that another leader had, and that were made anew here; and when.
    anew: BTreeMap<String, Time>,
    /// Copies that were to be removed at the promotion, until they are seen to be gone.
    condemned: Vec<String>,
}

impl Default for SlotRules {
    fn default() -> Self {
        Self {
            members: true,
            keep: MEMBER_SLOTS_TTL_DEFAULT,
            permanent: BTreeMap::new(),
            ignored: Vec::new(),
            ignores_all: false,
        }
    }
}

impl SlotRules {
    /// Reads them from the `config` key as it has become. What cannot be used leaves a complaint, if not one of those that
    /// [`bots_core::wire::config::unclear`] knows.
    pub(super) fn changed_to(&self, config: &Value, complaints: &mut Vec<String>) -> Self {
        let mut out = Self::default();
        let section = config.get("postgresql").filter(|section| !section.is_null());
        if section.is_some_and(|section| !section.is_object()) {
            out.members = self.members;
        } else if let Some(value) = section.and_then(|map| map.get("use_slots")).filter(|value| !value.is_null()) {
            out.members = yes_or_no(value).unwrap_or(self.members);
        }
        if let Some(value) = config.get("member_slots_ttl").filter(|value| !value.is_null()) {
            match seconds(value) {
                Some(secs) => out.keep = Span::from_secs(secs),
                None => complaints
                    .push(format!("config: member_slots_ttl is {value}: use seconds, or a time such as 30min")),
            }
        }
        match config.get("slots") {
            Some(Value::Object(slots)) => out.read_permanent(slots, &self.permanent, complaints),
            None | Some(Value::Null) => {}
            Some(other) => {
                // A slip removes nothing: what a dropped slot has kept is gone.
                out.permanent = self.permanent.clone();
                complaints.push(format!("config: slots is {other}: use one entry a slot, by name"));
            }
        }
        match config.get("ignore_slots") {
            Some(Value::Array(list)) if list.iter().all(is_slot_matcher) => {
                out.ignored = list.iter().map(Matcher::from_value).collect();
            }
            None | Some(Value::Null) => {}
            Some(_unclear) => out.ignores_all = true,
        }
        out
    }

    fn read_permanent(
        &mut self,
        slots: &Map<String, Value>,
        before: &BTreeMap<String, SlotKind>,
        complaints: &mut Vec<String>,
    ) {
        for (name, value) in slots {
            let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            if name.is_empty() || name.len() > NAME_LEN_MAX || !name.chars().all(valid) {
                complaints.push(format!("config: slots.{name}: a slot's name has only a to z, 0 to 9 and _"));
                continue;
            }
            let text = |field: &str| value.get(field).and_then(Value::as_str);
            // We have no standby clusters.
            if text("cluster_type") == Some("standby") {
                continue;
            }
            let kind = match (text("type"), text("database"), text("plugin")) {
                (None | Some("physical"), None, None) => Some(SlotKind::Physical),
                (None | Some("logical"), Some(database), Some(plugin)) => {
                    Some(SlotKind::Logical { database: database.to_owned(), plugin: plugin.to_owned() })
                }
                _neither => None,
            };
            match kind {
                Some(kind) => _ = self.permanent.insert(name.clone(), kind),
                None => {
                    self.permanent.extend(before.get(name).map(|kind| (name.clone(), kind.clone())));
                    complaints.push(format!(
                        "config: slots.{name}: use type: physical, or type: logical with database and plugin"
                    ));
                }
            }
        }
    }

    pub(super) fn ignores(&self, name: &str, slot: &ReplicationSlot) -> bool {
        self.ignores_all || self.ignored.iter().any(|matcher| matcher.matches(name, slot))
    }
}

impl Matcher {
    fn from_value(value: &Value) -> Self {
        let text = |field: &str| value.get(field).and_then(Value::as_str).map(str::to_owned);
        Self { name: text("name"), kind: text("type"), database: text("database"), plugin: text("plugin") }
    }

    fn matches(&self, name: &str, slot: &ReplicationSlot) -> bool {
        let (kind, database, plugin) = match &slot.kind {
            SlotKind::Physical => ("physical", None, None),
            SlotKind::Logical { database, plugin } => ("logical", Some(database), Some(plugin)),
        };
        let is = |wanted: &Option<String>, found: Option<&String>| wanted.is_none() || wanted.as_ref() == found;
        self.name.as_ref().is_none_or(|wanted| wanted == name)
            && self.kind.as_ref().is_none_or(|wanted| wanted == kind)
            && is(&self.database, database)
            && is(&self.plugin, plugin)
    }
}

/// The slot of a member, by Patroni's rule.
#[must_use]
pub(super) fn slot_of(member: &str) -> String {
    let mut out = String::new();
    for c in member.to_lowercase().chars() {
        match c {
            'a'..='z' | '0'..='9' | '_' => out.push(c),
            '-' | '.' => out.push('_'),
            other => out += &format!("u{:04}", u32::from(other)),
        }
    }
    out.truncate(NAME_LEN_MAX);
    out
}

impl State {
    fn status(&self) -> PostgresStatus {
        self.view.json(&self.settings.scope.status()).unwrap_or_default()
    }

    /// The `status` key's value of a leader that leads on.
    pub(super) fn status_text(&self, optime: Lsn) -> String {
        let mut status = PostgresStatus { optime, handed_over_by: None, ..self.status() };
        if let Some(slots) = self.server().and_then(|server| server.slots.as_ref()) {
            let keeps = |slot: &ReplicationSlot| slot.confirmed.or(slot.restart).filter(|_| !slot.lost);
            let known = std::mem::take(&mut status.slots);
            let mut now: BTreeMap<String, Lsn> =
                slots.iter().filter_map(|(name, slot)| Some((name.clone(), keeps(slot)?))).collect();
            // What it would need if it came back as a replica.
            now.insert(slot_of(&self.settings.name), optime);
            // A step that nobody would follow is not worth a write.
            let told = |name: &String, at: Lsn| match known.get(name) {
                Some(old) if *old <= at && at.0 - old.0 < STEP => *old,
                Some(_) | None => at,
            };
            status.slots = now.into_iter().map(|(name, at)| (name.clone(), told(&name, at))).collect();
            let physical = |name: &&String| slots.get(*name).is_some_and(|slot| slot.kind == SlotKind::Physical);
            status.retain_slots = self.slots.unwanted.keys().filter(physical).cloned().collect();
        }
        serde_json::to_string(&status).unwrap_or_default()
    }

    /// Takes note of whether the leader has a slot for us: one that it does not have would keep it from serving us at all. Who
    /// leads itself goes by what was so before.
    pub(super) fn note_own_slot(&mut self) {
        if self.leader().is_some_and(|leader| leader != self.settings.name) {
            self.slots.own = self.status().slots.contains_key(&slot_of(&self.settings.name));
        }
    }

    /// The parameter by which a replica uses its slot.
    pub(super) fn own_slot_parameter(&self) -> Option<(String, String)> {
        let named = self.dynamic.slots.members && self.slots.own;
        named.then(|| (String::from("primary_slot_name"), slot_of(&self.settings.name)))
    }

    /// These copies are removed before the promotion; what is left of them then is removed after it.
    pub(super) fn condemn_copies(&mut self) -> Vec<String> {
        self.slots.condemned = self.copies_to_drop();
        self.slots.condemned.clone()
    }

    /// Which consumers have missed something, as far as this member has made their slots anew since it leads.
    pub(super) fn slots_trouble(&self, now: Time) -> Option<String> {
        let told = self.slots.anew.iter().filter(|(_, at)| now.since(**at) < ANEW_TOLD_FOR);
        let names: Vec<&str> = told.map(|(name, _)| name.as_str()).collect();
        (!names.is_empty()).then(|| {
            format!(
                "the logical slots [{}] were made anew here: their consumers have missed what was written in between, and copy their tables again",
                names.join(", ")
            )
        })
    }

    /// The slots that there shall be. On a replica, only what can follow the leader's.
    fn wanted_slots(&self, leads: bool) -> BTreeMap<String, SlotKind> {
        let mut wanted = BTreeMap::new();
        if !leads && self.settings.tags.nofailover() {
            return wanted;
        }
        let copies = if leads { BTreeMap::new() } else { self.wanted_copies() };
        let here =
            |(name, kind): &(&String, &SlotKind)| leads || **kind == SlotKind::Physical || copies.contains_key(*name);
        let permanent = self.dynamic.slots.permanent.iter().filter(here);
        wanted.extend(permanent.map(|(name, kind)| (name.clone(), kind.clone())));
        if self.dynamic.slots.members {
            wanted.extend(self.peers().map(|(name, _)| (slot_of(name), SlotKind::Physical)));
        }
        if !leads {
            // One that does not move along with the leader's would keep the log for ever.
            let status = self.status();
            wanted.extend(status.retain_slots.into_iter().map(|name| (name, SlotKind::Physical)));
            wanted.retain(|name, _| status.slots.contains_key(name));
        }
        // Nobody follows itself.
        wanted.remove(&slot_of(&self.settings.name));
        wanted
    }
}

impl Turn {
    /// Has the slots changed that are not as they shall be.
    pub(super) fn mind_slots(&mut self) {
        if self.s.server().is_none() {
            self.forget_copies();
        }
        let leads = match (&self.s.phase, self.s.server()) {
            (Phase::Primary(_), Some(server)) if !server.in_recovery => true,
            (Phase::Replica { .. }, Some(server)) if server.in_recovery => false,
            _neither => return,
        };
        if !self.s.view.is_complete() || !self.s.view.is_watched() {
            return;
        }
        let Some(server) = self.s.server().cloned() else { return };
        let Some(found) = server.slots.clone() else { return };
        if !leads {
            self.mind_copies(&found, &server);
        }
        let wanted = self.s.wanted_slots(leads);
        self.s.slots.condemned.retain(|name| found.contains_key(name));
        let mut changes = self.missing(&wanted, &found, &server, leads);
        changes.extend(self.surplus(&wanted, &found, leads));
        changes.truncate(CHANGES_MAX);
        if changes.is_empty() {
            self.s.slots.asked = (Vec::new(), 0);
            return;
        }
        if self.now < self.s.slots.not_before {
            return self.s.timers.arm(Timer::Slots, self.s.slots.not_before);
        }
        let times = if self.s.slots.asked.0 == changes { self.s.slots.asked.1 + 1 } else { 0 };
        let pause = AGAIN_MIN.times(1 << times.min(5)).min(AGAIN_MAX);
        self.s.slots.not_before = self.now + pause;
        self.s.timers.arm(Timer::Slots, self.s.slots.not_before);
        self.s.slots.asked = (changes.clone(), times);
        self.note_made_anew(&changes);
        self.out.push(Action::ChangeSlots { changes });
    }

    /// A logical slot that is to be made though the cluster had it before: by the last leader, or here until it was lost.
    fn note_made_anew(&mut self, changes: &[SlotChange]) {
        let known = self.s.status().slots;
        for change in changes {
            if let SlotChange::Create { name, kind: SlotKind::Logical { .. } } = change
                && known.contains_key(name)
            {
                self.s.slots.anew.insert(name.clone(), self.now);
            }
        }
    }

    /// What is wanted and not there, or not as it shall be.
    fn missing(
        &self,
        wanted: &BTreeMap<String, SlotKind>,
        found: &BTreeMap<String, ReplicationSlot>,
        server: &Server,
        leads: bool,
    ) -> Vec<SlotChange> {
        let positions = self.s.status().slots;
        let mut changes = Vec::new();
        for (name, kind) in wanted {
            let create = SlotChange::Create { name: name.clone(), kind: kind.clone() };
            // A copy is not made by the server.
            let create = (leads || *kind == SlotKind::Physical).then_some(create);
            let Some(slot) = found.get(name) else {
                changes.extend(create);
                continue;
            };
            if slot.active {
                continue;
            }
            if slot.lost || slot.kind != *kind || (leads && self.s.slots.condemned.contains(name)) {
                changes.push(SlotChange::Drop { name: name.clone() });
                changes.extend(create);
                continue;
            }
            let Some(there) = positions.get(name).filter(|_| !leads) else { continue };
            let to = (*there).min(server.replayed);
            let lags = |at: Option<Lsn>| at.is_some_and(|at| to.0 >= at.0.saturating_add(STEP));
            match kind {
                SlotKind::Physical if lags(slot.restart) => {
                    changes.push(SlotChange::Advance { name: name.clone(), to });
                }
                SlotKind::Logical { database, plugin: _ } if lags(slot.confirmed) => {
                    changes.push(SlotChange::Follow { name: name.clone(), database: database.clone(), to });
                }
                SlotKind::Physical | SlotKind::Logical { .. } => {}
            }
        }
        changes
    }

    /// What is there, and has not been wanted for long enough.
    fn surplus(
        &mut self,
        wanted: &BTreeMap<String, SlotKind>,
        found: &BTreeMap<String, ReplicationSlot>,
        leads: bool,
    ) -> Vec<SlotChange> {
        if self.s.slots.led != leads {
            self.s.slots.led = leads;
            if !leads {
                self.s.slots.anew.clear();
            }
            self.s.slots.unwanted.clear();
        }
        let rules = &self.s.dynamic.slots;
        let is_unwanted = |(name, slot): &(&String, &ReplicationSlot)| {
            !slot.active && !wanted.contains_key(*name) && !rules.ignores(name, slot)
        };
        let unwanted: Vec<String> = found.iter().filter(is_unwanted).map(|(name, _)| name.clone()).collect();
        let keep = if leads { rules.keep } else { GRACE };
        self.s.slots.unwanted.retain(|name, _| unwanted.contains(name));
        let mut changes = Vec::new();
        for name in unwanted {
            let due = *self.s.slots.unwanted.entry(name.clone()).or_insert(self.now) + keep;
            if self.now < due {
                self.s.timers.arm(Timer::Slots, self.s.timers.armed(Timer::Slots).map_or(due, |at| at.min(due)));
            } else if !self.s.dynamic.pause {
                changes.push(SlotChange::Drop { name });
            }
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use bots_core::machine::Span;
    use serde_json::json;

    use super::{ReplicationSlot, SlotKind, SlotRules, slot_of};

    #[test]
    fn slots_are_named_as_patroni_names_them() {
        assert_eq!(slot_of("pg-1"), "pg_1");
        assert_eq!(slot_of("PG.eu-1"), "pg_eu_1");
        assert_eq!(slot_of("db@1"), "dbu00641");
        assert_eq!(slot_of(&"x".repeat(80)).len(), 63);
    }

    #[test]
    fn rules_are_read_and_what_cannot_be_used_is_named() {
        let mut complaints = Vec::new();
        let config = json!({
            "member_slots_ttl": "5min",
            "slots": {
                "backup": {"type": "physical"},
                "changes": {"type": "logical", "database": "app", "plugin": "pgoutput"},
                "other": {"type": "physical", "cluster_type": "standby"},
                "half": {"type": "logical", "database": "app"},
                "Bad": {"type": "physical"},
            },
            "ignore_slots": [{"type": "logical", "plugin": "wal2json"}],
            "postgresql": {"use_slots": "off"},
        });
        let rules = SlotRules::default().changed_to(&config, &mut complaints);
        assert!(!rules.members);
        assert_eq!(rules.keep, Span::from_secs(300));
        assert_eq!(rules.permanent.keys().collect::<Vec<_>>(), ["backup", "changes"]);
        assert_eq!(complaints.len(), 2, "{complaints:?}");
        let slot = |plugin: &str| ReplicationSlot {
            kind: SlotKind::Logical { database: "app".into(), plugin: plugin.into() },
            ..ReplicationSlot::default()
        };
        assert!(rules.ignores("x", &slot("wal2json")));
        assert!(!rules.ignores("x", &slot("pgoutput")) && !rules.ignores("x", &ReplicationSlot::default()));
        let kept = rules.changed_to(&json!({"postgresql": {"use_slots": "onn"}}), &mut complaints);
        assert!(!kept.members, "nobody can make out what it says now");
        for slip in [json!("backup"), json!({"backup": {}, "changes": {"database": "app", "plugn": "pgoutput"}})] {
            let kept = rules.changed_to(&json!({"slots": slip}), &mut complaints);
            assert_eq!(kept.permanent, rules.permanent, "{slip}");
        }
    }

    #[test]
    fn no_slot_is_dropped_while_nobody_can_make_out_which_are_to_be_left_alone() {
        for slip in [json!([{"nam": "mine"}]), json!([{"name": "mine"}, {}]), json!({"name": "mine"}), json!(["mine"])]
        {
            let rules = SlotRules::default().changed_to(&json!({"ignore_slots": slip}), &mut Vec::new());
            assert!(rules.ignores("mine", &ReplicationSlot::default()), "{slip}");
        }
    }
}
