//! How long things took, in fixed exponential buckets: whatever is counted with them can be added up.

use std::time::Duration;

/// Buckets per doubling, as a power of two: OpenTelemetry's exponential histogram of scale 4, whose bounds are 4.4 % apart.
pub(crate) const SCALE: i32 = 4;
const PER_OCTAVE: i32 = 1 << SCALE;
/// The shortest and the longest time told apart, as powers of two of a second: 1 us, and 2.3 h.
const EXPONENTS: std::ops::Range<i32> = -20..13;

/// Times, counted.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Distribution {
    count: u64,
    sum_s: f64,
    /// In the order of their exponents. Calls of one kind fall into few of them.
    octaves: Vec<Octave>,
}

/// Times above `2^exponent` seconds, up to twice as long.
#[derive(Debug, Clone, PartialEq)]
struct Octave {
    exponent: i32,
    counts: [u64; PER_OCTAVE as usize],
}

/// The bucket of a time: those above `2^(index/16)` seconds, up to the next bound (OpenTelemetry's metrics data model).
fn index_of(seconds: f64) -> i32 {
    let index = (seconds.log2() * f64::from(PER_OCTAVE)).ceil() - 1.0;
    // Nothing took no time: the logarithm of zero is below every bound.
    (index as i32).clamp(EXPONENTS.start * PER_OCTAVE, EXPONENTS.end * PER_OCTAVE - 1)
}

fn lower_bound_s(index: i32) -> f64 {
    (f64::from(index) / f64::from(PER_OCTAVE)).exp2()
}

impl Distribution {
    /// Counts one.
    pub(crate) fn add(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        self.count += 1;
        self.sum_s += seconds;
        let index = index_of(seconds);
        let octave = self.octave(index.div_euclid(PER_OCTAVE));
        octave.counts[index.rem_euclid(PER_OCTAVE) as usize] += 1;
    }

    fn octave(&mut self, exponent: i32) -> &mut Octave {
        let at = self.octaves.iter().position(|octave| octave.exponent >= exponent).unwrap_or(self.octaves.len());
        if self.octaves.get(at).is_none_or(|octave| octave.exponent != exponent) {
            self.octaves.insert(at, Octave { exponent, counts: Default::default() });
        }
        &mut self.octaves[at]
    }

    /// Counts all that the other has counted.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.sum_s += other.sum_s;
        for Octave { exponent, counts } in &other.octaves {
            let own = self.octave(*exponent);
            own.counts.iter_mut().zip(counts).for_each(|(own, more)| *own += more);
        }
    }

    /// How many.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// All times together, in seconds.
    pub(crate) fn sum_s(&self) -> f64 {
        self.sum_s
    }

    /// The index of the first bucket that may have counts, and the counts from there on, without a gap.
    pub(crate) fn buckets(&self) -> (i32, Vec<u64>) {
        let (Some(first), Some(last)) = (self.octaves.first(), self.octaves.last()) else { return (0, Vec::new()) };
        let mut counts = vec![0; ((last.exponent - first.exponent + 1) * PER_OCTAVE) as usize];
        for octave in &self.octaves {
            let at = ((octave.exponent - first.exponent) * PER_OCTAVE) as usize;
            counts[at..at + PER_OCTAVE as usize].copy_from_slice(&octave.counts);
        }
        (first.exponent * PER_OCTAVE, counts)
    }

    /// The same in other buckets, with these upper bounds in seconds, ascending; what is above all of them is in the last, which
    /// has no bound. A bucket of ours goes as a whole where its middle belongs, so bounds are off by 2.2 % at most.
    pub(crate) fn in_buckets(&self, bounds_s: &[f64]) -> Vec<(f64, u64)> {
        let mut buckets: Vec<(f64, u64)> =
            bounds_s.iter().copied().chain([f64::INFINITY]).map(|bound| (bound, 0)).collect();
        let (first, counts) = self.buckets();
        for (index, count) in (first..).zip(counts).filter(|(_, count)| *count > 0) {
            let middle = lower_bound_s(index) * (0.5 / f64::from(PER_OCTAVE)).exp2();
            let at = buckets.partition_point(|(bound, _)| *bound < middle);
            buckets[at].1 += count;
        }
        buckets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(times: &[f64]) -> Distribution {
        let mut all = Distribution::default();
        times.iter().for_each(|time| all.add(Duration::from_secs_f64(*time)));
        all
    }

    #[test]
    fn a_time_is_between_the_bounds_of_its_bucket() {
        let mut time = 1.5e-6;
        while time < 8000.0 {
            let index = index_of(time);
            assert!(lower_bound_s(index) < time * 1.000_001, "{time}: {index}");
            assert!(time <= lower_bound_s(index + 1) * 1.000_001, "{time}: {index}");
            time *= 1.013;
        }
        // Upper bounds belong to their buckets.
        for exponent in -19..13 {
            assert_eq!(index_of(f64::from(exponent).exp2()), exponent * PER_OCTAVE - 1);
        }
    }

    #[test]
    fn what_is_out_of_range_is_counted_at_the_end_of_it() {
        let all = of(&[0.0, 1e-9, 1e6]);
        let (first, counts) = all.buckets();
        assert_eq!(first, -20 * PER_OCTAVE);
        assert_eq!((counts.first(), counts.last()), (Some(&2), Some(&1)));
        assert_eq!(counts.iter().sum::<u64>(), all.count());
    }

    #[test]
    fn adding_up_is_the_same_as_counting_together() {
        let (a, b) = (&[0.001, 0.0012, 3.0][..], &[0.000_02, 0.0011, 400.0][..]);
        let together = of(&[a, b].concat());
        for (one, other) in [(a, b), (b, a)] {
            let mut merged = of(one);
            merged.merge(&of(other));
            assert_eq!((merged.count(), merged.buckets()), (together.count(), together.buckets()));
            assert!((merged.sum_s() - together.sum_s()).abs() < 1e-9);
        }
    }

    #[test]
    fn other_buckets_have_the_same_counts() {
        let all = of(&[0.0001, 0.0004, 0.0007, 0.02, 0.3, 60.0]);
        let buckets = all.in_buckets(&[0.0005, 0.001, 0.1, 1.0]);
        assert_eq!(buckets.iter().map(|(_, count)| *count).collect::<Vec<_>>(), [2, 1, 1, 1, 1]);
        assert_eq!(buckets.last().map(|(bound, _)| *bound), Some(f64::INFINITY));
        assert!(Distribution::default().in_buckets(&[1.0]).iter().all(|(_, count)| *count == 0));
    }
}
