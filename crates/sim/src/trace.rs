//! What happened, line by line. Written only when somebody wants to read it: lines cost more than the world itself.

use std::fmt::Arguments;

use bots_core::machine::Time;

/// The record of a run.
#[derive(Debug, Default)]
pub struct Trace {
    lines: Option<Vec<String>>,
    hash: u64,
}

impl Trace {
    /// A record that keeps its lines.
    #[must_use]
    pub const fn kept() -> Self {
        Self { lines: Some(Vec::new()), hash: 0 }
    }

    /// Whether lines are kept.
    #[must_use]
    pub const fn is_kept(&self) -> bool {
        self.lines.is_some()
    }

    /// Writes a line.
    pub fn line(&mut self, now: Time, text: Arguments<'_>) {
        if let Some(lines) = &mut self.lines {
            let ms = now.as_millis();
            lines.push(format!("{:>4}.{:03} {text}", ms / 1_000, ms % 1_000));
        }
    }

    /// Mixes a number into the fingerprint of the run, which is kept even when lines are not.
    pub const fn mix(&mut self, n: u64) {
        self.hash = (self.hash.rotate_left(5) ^ n).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    /// The fingerprint.
    #[must_use]
    pub const fn hash(&self) -> u64 {
        self.hash
    }

    /// The lines.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        self.lines.as_deref().unwrap_or_default()
    }
}
