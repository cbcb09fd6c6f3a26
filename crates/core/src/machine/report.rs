//! The report: a bot's answer to "what are you, what do you wait for, since when, and why not something else?"

use serde::{Deserialize, Serialize};

use super::{Deadline, Span, Time};

/// Why an alternative that an operator may expect is not taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhyNot {
    /// The alternative, as an imperative: `promote`, `serve`.
    pub alternative: String,
    /// What stands in its way.
    pub because: String,
}

/// What a bot says of itself after a step. `botctl why` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[must_use]
pub struct Report {
    /// The node of the state diagram, lower case.
    pub role: String,
    /// One sentence: what the bot is and does at the moment.
    pub doing: String,
    /// How long it has been in this role, in milliseconds.
    pub for_ms: u64,
    /// What it waits for.
    pub waiting_for: String,
    /// The next deadline and its reason, in milliseconds from now.
    pub next_deadline: Option<(u64, String)>,
    /// The alternatives, and why not.
    pub why_not: Vec<WhyNot>,
    /// Troubles that an operator should know of: each one line that says what and how to fix it.
    pub troubles: Vec<String>,
}

impl Report {
    /// A report with the parts that every bot has.
    pub fn new(role: impl std::fmt::Display, since: Time, now: Time) -> Self {
        Self {
            role: role.to_string(),
            doing: String::new(),
            for_ms: now.since(since).as_millis(),
            waiting_for: String::from("events"),
            next_deadline: None,
            why_not: Vec::new(),
            troubles: Vec::new(),
        }
    }

    /// Says what the bot does.
    pub fn doing(mut self, doing: impl Into<String>) -> Self {
        self.doing = doing.into();
        self
    }

    /// Says what the bot waits for.
    pub fn waiting_for(mut self, what: impl Into<String>) -> Self {
        self.waiting_for = what.into();
        self
    }

    /// Adds an alternative and why it is not taken.
    pub fn why_not(mut self, alternative: impl Into<String>, because: impl Into<String>) -> Self {
        self.why_not.push(WhyNot { alternative: alternative.into(), because: because.into() });
        self
    }

    /// Adds a trouble.
    pub fn trouble(mut self, trouble: impl Into<String>) -> Self {
        self.troubles.push(trouble.into());
        self
    }

    /// Names the next deadline.
    pub fn next(mut self, deadline: Option<Deadline>, now: Time) -> Self {
        self.next_deadline = deadline.map(|d| (d.at.since(now).as_millis(), d.reason));
        self
    }

    /// How long the bot has been in this role.
    #[must_use]
    pub fn held_for(&self) -> Span {
        Span::from_millis(self.for_ms)
    }
}
