//! What was counted of a caller's quota: numbers that only grow, so that copies of them on several edges can be put together in any
//! order, and as often as one likes, without anything being lost or counted twice.
//!
//! Each process that counts does so under a number of its own, in two counters: one for what was taken, and one for what was given
//! back (a PN-counter: Shapiro, Preguiça, Baquero, Zawirski, "A comprehensive study of convergent and commutative replicated data
//! types", 2011, §3.1.3). Copies are merged by the larger of each.

use super::quota::{PARTS, Span};

/// Parts of time that are remembered; more than a span has, for clocks that jump.
const MAX_PARTS: usize = 2 * PARTS as usize + 4;
/// Processes that are remembered of each: so many edges have owned the counter, or were upgraded while they did.
const MAX_LIVES: usize = 64;
const COUNT_BYTES: usize = 32;

/// A process that counts, as long as it can remember.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Life(pub(crate) u64);

impl Life {
    /// Under what all edges reset, so that two who do so at once do it once.
    const RESETS: Self = Self(0);
}

/// What was counted for a part of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Count {
    part: u64,
    life: Life,
    taken: u64,
    returned: u64,
}

/// What was counted, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Counts(Vec<Count>);

impl Counts {
    /// How much counts.
    pub(crate) fn sum(&self, span: Span) -> u64 {
        self.sum_of(|count| (span.since..=span.part).contains(&count.part))
    }

    fn sum_of(&self, which: impl Fn(&Count) -> bool) -> u64 {
        let counts = self.0.iter().filter(|count| which(count));
        let (taken, returned) = counts.fold((0u64, 0u64), |(taken, returned), count| {
            (taken.saturating_add(count.taken), returned.saturating_add(count.returned))
        });
        taken.saturating_sub(returned)
    }

    /// Takes for a part of time.
    pub(crate) fn add(&mut self, part: u64, life: Life, count: u64) {
        self.change(part, life, |known| known.taken = known.taken.saturating_add(count));
    }

    /// Gives back what was taken, by whomever.
    pub(crate) fn give_back(&mut self, part: u64, life: Life, count: u64) {
        self.change(part, life, |known| known.returned = known.returned.saturating_add(count));
    }

    /// Gives everything back.
    pub(crate) fn clear(&mut self) {
        let mut parts: Vec<u64> = self.0.iter().map(|count| count.part).collect();
        parts.dedup();
        for part in parts {
            let all = self.sum_of(|count| count.part == part);
            self.give_back(part, Life::RESETS, all);
        }
    }

    /// Part of time, process, what was taken and what was given back, of each that counts.
    pub(super) fn numbers(&self) -> impl Iterator<Item = (u64, u64, u64, u64)> {
        self.0.iter().map(|count| (count.part, count.life.0, count.taken, count.returned))
    }

    /// Learns one of them.
    pub(super) fn learn(&mut self, part: u64, life: u64, taken: u64, returned: u64) {
        self.change(part, Life(life), |known| {
            (known.taken, known.returned) = (known.taken.max(taken), known.returned.max(returned));
        });
    }

    /// Learns what another copy has; whether there was anything.
    pub(crate) fn merge(&mut self, other: &Self) -> bool {
        let before = self.clone();
        for count in &other.0 {
            self.learn(count.part, count.life.0, count.taken, count.returned);
        }
        *self != before
    }

    fn change(&mut self, part: u64, life: Life, change: impl FnOnce(&mut Count)) {
        match self.0.binary_search_by_key(&(part, life), |count| (count.part, count.life)) {
            Ok(at) => change(&mut self.0[at]),
            Err(at) => {
                let mut new = Count { part, life, taken: 0, returned: 0 };
                change(&mut new);
                if new.taken > 0 || new.returned > 0 {
                    self.0.insert(at, new);
                    self.make_room(part, life);
                }
            }
        }
    }

    /// Forgets what there is too much of, after something was added there.
    fn make_room(&mut self, part: u64, life: Life) {
        let of_part = self.0.iter().filter(|count| count.part == part && count.life != life);
        if of_part.clone().count() >= MAX_LIVES {
            // Also one that has only given back says something.
            let least = of_part.min_by_key(|count| count.taken.max(count.returned)).map(|count| count.life);
            self.0.retain(|count| count.part != part || Some(count.life) != least);
        }
        let parts = 1 + self.0.windows(2).filter(|two| two[0].part != two[1].part).count();
        if parts > MAX_PARTS {
            // The one that is farthest from now, on whichever side: a clock that was wrong has left parts that nobody needs.
            let [first, last] = [self.0[0].part, self.0[self.0.len() - 1].part];
            let farthest = if part - first >= last - part { first } else { last };
            self.0.retain(|count| count.part != farthest);
        }
    }

    /// Whether a process has counted any of it.
    pub(crate) fn has(&self, life: Life) -> bool {
        self.0.iter().any(|count| count.life == life)
    }

    /// The last part of which there is anything; 0 if there is nothing.
    pub(crate) fn latest(&self) -> u64 {
        self.0.last().map_or(0, |count| count.part)
    }

    /// Seconds until there is room again, or more of it.
    pub(crate) fn reset(&self, span: Span, now: u64) -> u64 {
        let oldest = self.0.iter().find(|count| (span.since..=span.part).contains(&count.part) && count.taken > 0);
        let (part, kept) = (oldest.map_or(span.part, |count| count.part), span.part - span.since);
        (part + kept + span.part_seconds).saturating_sub(now).max(1)
    }

    /// Four numbers of eight bytes for each part of time and process.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let numbers = |count: &Count| [count.part, count.life.0, count.taken, count.returned];
        self.0.iter().flat_map(numbers).flat_map(u64::to_be_bytes).collect()
    }

    /// `None` if it is none.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        const MAX_BYTES: usize = MAX_PARTS * MAX_LIVES * COUNT_BYTES;
        if bytes.len() > MAX_BYTES {
            return None;
        }
        let (numbers, rest) = bytes.as_chunks::<8>();
        let (counts, odd) = numbers.as_chunks::<4>();
        let mut all = Self::default();
        for count in counts {
            let [part, life, taken, returned] = count.map(u64::from_be_bytes);
            all.learn(part, life, taken, returned);
        }
        (rest.is_empty() && odd.is_empty()).then_some(all)
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    fn day(part: u64) -> Span {
        Span { part, since: part, part_seconds: 100 }
    }

    /// Three edges count, give back and tell one another, in whatever order, and some of it twice.
    #[test]
    fn copies_come_together_whatever_is_told_when() {
        let mut rng = StdRng::seed_from_u64(7);
        for _ in 0..200 {
            let (mut edges, mut told) = (vec![Counts::default(); 3], Vec::<Counts>::new());
            let mut used = 0;
            for _ in 0..100 {
                let at = rng.random_range(0..3);
                let life = Life(at as u64 + 1);
                match rng.random_range(0..4) {
                    0 => {
                        edges[at].add(500, life, 5);
                        used += 5;
                    }
                    1 if used >= 2 => {
                        edges[at].give_back(500, life, 2);
                        used -= 2;
                    }
                    2 => told.push(edges[at].clone()),
                    _ if !told.is_empty() => {
                        let of = rng.random_range(0..told.len());
                        edges[at].merge(&told[of]);
                    }
                    _ => {}
                }
            }
            let all = edges.iter().fold(Counts::default(), |mut all, one| {
                all.merge(one);
                all
            });
            assert_eq!(all.sum(day(500)), used);
            assert_eq!(Counts::decode(&all.encode()), Some(all.clone()));
            let mut cleared = all.clone();
            cleared.clear();
            assert!(!cleared.merge(&all), "what is known already is no news");
            assert_eq!(cleared.sum(day(500)), 0, "and does not come back");
        }
    }

    #[test]
    fn what_is_remembered_has_an_end() {
        let mut counts = Counts::default();
        for part in 0..200 {
            for life in 1..100 {
                counts.add(part * 100, Life(life), life);
            }
        }
        assert!(counts.0.len() <= MAX_PARTS * (MAX_LIVES + 1), "{}", counts.0.len());
        assert!(counts.sum(day(19_900)) >= (37..=99).sum::<u64>(), "the largest stay");
        assert_eq!(Counts::decode(&[1, 2, 3]), None);
        assert_eq!(Counts::decode(&vec![0; 1 << 20]), None);
    }
}
