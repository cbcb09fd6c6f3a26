//! The only source of chance: SplitMix64, so that a seed means the same on every machine and with every version of
//! everything else.

use bots_core::machine::Span;

/// A stream of numbers that a seed decides.
#[derive(Debug, Clone)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// The stream of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { state: seed ^ 0x5157_4f42_5f42_4f54 }
    }

    /// A stream of its own for one purpose, so that drawing more for one does not disturb the others.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self { state: self.draw() }
    }

    /// The next number.
    pub const fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; zero if `n` is.
    pub const fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.draw() % n }
    }

    /// A number from `low` to `high`, both included.
    pub const fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low) + 1)
    }

    /// A length of time from `low` to `high` milliseconds.
    pub const fn span(&mut self, low: u64, high: u64) -> Span {
        Span::from_millis(self.between(low, high))
    }

    /// True `permille` times out of a thousand.
    pub const fn chance(&mut self, permille: u64) -> bool {
        self.below(1_000) < permille
    }

    /// One of `items`; nothing if there are none.
    pub fn pick<'i, T>(&mut self, items: &'i [T]) -> Option<&'i T> {
        let len = u64::try_from(items.len()).unwrap_or(u64::MAX);
        items.get(usize::try_from(self.below(len)).unwrap_or(0))
    }

    /// A pause around `mean`: between a fifth of it and almost twice it.
    pub const fn around(&mut self, mean: Span) -> Span {
        let ms = mean.as_millis();
        self.span(ms / 5, ms * 9 / 5)
    }
}

#[cfg(test)]
mod tests {
    use super::Rng;

    #[test]
    fn the_stream_is_the_one_that_it_always_was() {
        let mut rng = Rng::new(0);
        let drawn: Vec<u64> = (0..3).map(|_| rng.draw() >> 48).collect();
        assert_eq!(drawn, [9_329, 50_847, 19_894], "changing the stream changes the meaning of every seed on record");
    }
}
