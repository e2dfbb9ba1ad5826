//! Whether a series of looks is flat.
//!
//! Counts (descriptors, mappings, threads) are compared by medians: that of the last fifth of the cycles may exceed that of the second fifth by [`COUNT_TOLERANCE`]. The
//! first fifth is the warm-up, in which stacks are cached and pools are filled. Between the middles of the two fifths lie 600 of 1,000 cycles, so one thing left behind in
//! each 100 cycles is six more, twice the tolerance. Medians do not see what a single cycle happens to hold when it is looked at.
//!
//! Memory is noisier than that by nature, see [`rss_bound`]; there the slope is judged.

use crate::census::Census;

/// Fewer cycles than this say nothing.
pub const LEAST_CYCLES: usize = 500;

/// What a median of counts may differ by. The counts that nothing leaks from are equal to the last one, but for mappings: the thread library caches stacks, and the
/// allocator splits and joins its own by what happens to be free.
pub const COUNT_TOLERANCE: u64 = 3;

/// Growth of resident memory over the judged cycles, all in all, that is still noise.
///
/// Measured: about 2 KiB per cycle over the first 1,000 cycles, 242 bytes per cycle over 6,000, and in a trace of all allocations nothing of it was live heap. It is a
/// sum that fills up, then, and no rate: what nobody holds, but the allocator and the kernel do not give back or have not counted yet. So the bound is a sum as well:
/// 3,277 bytes per cycle of 1,000, which is below the least that a binding could leave behind in each cycle, a page of a ring; and 33 bytes per cycle of 100,000, over
/// which the same sum is spread thin and what leaks at a rate stands out.
const RSS_NOISE_BYTES: f64 = 2560.0 * 1024.0;

/// Points that a series of memory is reduced to, by medians, before a line is fitted.
const POINTS: usize = 40;

/// Bytes per cycle that resident memory may grow by, of so many cycles: the noise spread over the cycles that are judged. 3,277 bytes for 1,000, 33 for 100,000.
#[must_use]
pub fn rss_bound(cycles: usize) -> f64 {
    RSS_NOISE_BYTES / (cycles as f64 * 0.8)
}

/// A count's name, and where it is found.
type Count = (&'static str, fn(&Census) -> u64);

/// What has grown, in sentences; empty when all is flat.
#[must_use]
pub fn growth(series: &[Census]) -> Vec<String> {
    if series.len() < LEAST_CYCLES {
        return vec![format!("{} cycles are too few to be judged: at least {LEAST_CYCLES}", series.len())];
    }
    let counts: [Count; 3] = [
        ("descriptors", |census| census.descriptors),
        ("mappings", |census| census.mappings),
        ("threads", |census| census.threads),
    ];
    let mut found = Vec::new();
    for (name, of) in counts {
        let fifth = series.len() / 5;
        let middle = |part: &[Census]| median(part.iter().map(of).collect());
        let (early, late) = (middle(&series[fifth..2 * fifth]), middle(&series[series.len() - fifth..]));
        if late > early + COUNT_TOLERANCE {
            found.push(format!("{name} grow: {early} in the second fifth of the cycles, {late} in the last"));
        }
    }
    let (slope, bound) = (rss_slope(series), rss_bound(series.len()));
    if slope > bound {
        found.push(format!("resident memory grows by {slope:.0} bytes per cycle, over {bound:.0}"));
    }
    found
}

/// Growth of resident memory in bytes per cycle, after the first fifth: the median of the slopes between all pairs of points (Theil and Sen), which a few outliers
/// do not move, of medians of as many neighbours as leave 40 points.
#[must_use]
pub fn rss_slope(series: &[Census]) -> f64 {
    let judged = &series[series.len() / 5..];
    let width = judged.len().div_ceil(POINTS).max(1);
    let points: Vec<f64> = judged
        .chunks_exact(width)
        .map(|part| median(part.iter().map(|census| census.rss_kib).collect()) as f64 * 1024.0)
        .collect();
    let mut slopes = Vec::new();
    for (from, first) in points.iter().enumerate() {
        for (to, second) in points.iter().enumerate().skip(from + 1) {
            slopes.push((second - first) / ((to - from) * width) as f64);
        }
    }
    slopes.sort_by(f64::total_cmp);
    slopes.get(slopes.len() / 2).copied().unwrap_or(0.0)
}

/// The middle value; 0 of nothing.
#[must_use]
pub fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that leaks nothing: it warms up, is noisy, and single cycles stick out.
    fn innocent(cycles: usize) -> Vec<Census> {
        let mut random = fastrand::Rng::with_seed(7);
        let sample = |cycle: usize| {
            let warm_up = (cycle * 400 / cycles).min(40) as u64;
            let sticks_out = if random.u32(..20) == 0 { 5 } else { 0 };
            Census {
                rss_kib: 60_000 + warm_up * 100 + random.u64(..1500) + sticks_out * 800,
                descriptors: 24 + sticks_out,
                mappings: 300 + warm_up + random.u64(..6) + sticks_out,
                threads: 5 + sticks_out,
            }
        };
        (0..cycles).map(sample).collect()
    }

    fn leaking(cycles: usize, leak: impl Fn(u64, &mut Census)) -> Vec<String> {
        let mut series = innocent(cycles);
        series.iter_mut().enumerate().for_each(|(cycle, census)| leak(cycle as u64, census));
        growth(&series)
    }

    #[test]
    fn noise_warm_up_and_single_cycles_are_no_leak() {
        for cycles in [500, 1000, 100_000] {
            assert_eq!(growth(&innocent(cycles)), [""; 0], "{cycles} cycles");
        }
    }

    #[test]
    fn one_descriptor_mapping_or_thread_in_a_hundred_cycles_is_a_leak() {
        for cycles in [1000, 100_000] {
            let descriptors = leaking(cycles, |cycle, census| census.descriptors += cycle / 100);
            let mappings = leaking(cycles, |cycle, census| census.mappings += cycle / 100);
            let threads = leaking(cycles, |cycle, census| census.threads += cycle / 100);
            for (found, name) in [(descriptors, "descriptors"), (mappings, "mappings"), (threads, "threads")] {
                assert!(found.len() == 1 && found[0].starts_with(name), "{cycles} cycles, {name}: {found:?}");
            }
        }
    }

    #[test]
    fn a_page_in_each_of_a_thousand_cycles_is_a_leak_and_fifty_bytes_in_a_hundred_thousand() {
        let found = leaking(1000, |cycle, census| census.rss_kib += cycle * 4);
        assert!(found.len() == 1 && found[0].starts_with("resident memory grows by 4"), "{found:?}");
        let found = leaking(100_000, |cycle, census| census.rss_kib += cycle / 20);
        assert!(found.len() == 1 && found[0].starts_with("resident memory grows by 5"), "{found:?}");
    }

    #[test]
    fn a_leak_of_one_rare_way_out_is_seen() {
        // One way out in twenty leaves a descriptor and 64 KiB.
        let found = leaking(1000, |cycle, census| {
            census.descriptors += cycle / 20;
            census.rss_kib += cycle / 20 * 64;
        });
        assert_eq!(found.len(), 2, "{found:?}");
    }

    #[test]
    fn too_few_cycles_are_not_called_flat() {
        assert_eq!(growth(&innocent(LEAST_CYCLES - 1)).len(), 1);
    }
}
