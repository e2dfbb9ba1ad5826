//! Medians, and how sure they are.

/// A middle value with the interval that holds the true one in 95 of 100 cases.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Estimate {
    /// The median.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// The middle value, between the two middle ones of an even number; NaN of none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        count if count.is_multiple_of(2) => f64::midpoint(sorted[middle - 1], sorted[middle]),
        _ => sorted[middle],
    }
}

/// The median with its interval from order statistics, which asks nothing of the distribution: with the k-th least and k-th greatest values as ends it misses the true median
/// when fewer than k of n fair coins fall on one side. Of fewer than six values no such interval reaches 95 %, and the ends are the extremes.
#[must_use]
pub fn estimate(values: &[f64]) -> Estimate {
    let sorted = sorted(values);
    let Some(last) = sorted.len().checked_sub(1) else {
        return Estimate { median: f64::NAN, low: f64::NAN, high: f64::NAN };
    };
    let rank = rank(sorted.len());
    Estimate { median: median(&sorted), low: sorted[rank], high: sorted[last - rank] }
}

/// The ratios of what was measured in the same rounds.
#[must_use]
pub fn paired(over: &[f64], under: &[f64]) -> Vec<f64> {
    over.iter().zip(under).map(|(over, under)| over / under).filter(|ratio| ratio.is_finite()).collect()
}

/// The value that `per_mille` of the values do not exceed; NaN of none.
#[must_use]
pub fn percentile(sorted: &[u32], per_mille: usize) -> f64 {
    match sorted.len() {
        0 => f64::NAN,
        count => f64::from(sorted[(count * per_mille / 1000).min(count - 1)]),
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// How many values are cut off at either end.
fn rank(count: usize) -> usize {
    // The chance that at most `rank - 1` of `count` coins show heads.
    let mut term = 0.5_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let (mut below, mut rank) = (0.0, 0);
    while rank < count / 2 {
        below += term;
        if below > 0.025 {
            break;
        }
        term *= (count - rank) as f64 / (rank + 1) as f64;
        rank += 1;
    }
    rank.saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_between_the_middle_ones() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn the_interval_is_the_sign_tests() {
        let values: Vec<f64> = (1..=12).map(f64::from).collect();
        // 3rd and 10th of 12: the table of every textbook.
        let Estimate { low, high, .. } = estimate(&values);
        assert_eq!((low, high), (3.0, 10.0));
        let values: Vec<f64> = (1..=20).map(f64::from).collect();
        let Estimate { low, high, .. } = estimate(&values);
        assert_eq!((low, high), (6.0, 15.0));
        let Estimate { low, high, .. } = estimate(&[1.0, 2.0, 3.0]);
        assert_eq!((low, high), (1.0, 3.0));
        let values: Vec<f64> = (1..=6).map(f64::from).collect();
        assert_eq!(estimate(&values).low, 1.0);
    }

    #[test]
    fn percentiles_are_of_the_sorted() {
        let values: Vec<u32> = (0..1000).collect();
        assert_eq!(percentile(&values, 500), 500.0);
        assert_eq!(percentile(&values, 999), 999.0);
        assert!(percentile(&[], 500).is_nan());
    }
}
