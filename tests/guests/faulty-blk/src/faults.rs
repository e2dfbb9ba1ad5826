//! When an instance breaks down.
//!
//! By time it is a Poisson process: whenever a point is reached, the time since the last one decides. By count the point is drawn from the device's seed and the first request
//! that the instance is given, which is another one for every instance.

use crate::clock;
use crate::orders::{Kind, Orders, Point};

/// How long it waits for the point that was drawn; then any will do.
const PATIENCE_US: u64 = 20_000;
/// One in so many instances breaks down in `start`. Three in a row fail the binding.
const START_ONE_IN: u64 = 64;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next() % bound }
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        of.get(self.below(of.len() as u64) as usize).copied()
    }
}

/// The faults of one instance.
pub(crate) struct Faults {
    orders: Orders,
    rng: Rng,
    /// Points that lie on a data lane's way.
    on_the_way: Vec<Point>,
    /// Points that are left before the first fault: it is given what its predecessor was given, one by one, and what breaks down two in a row is failed.
    settles: u64,
    /// By time: until when it was decided, in microseconds since 1970.
    decided_us: u64,
    /// Where it is to be, and since when.
    due: Option<(Point, u64)>,
    /// By count: points that are left.
    left: Option<u64>,
    seed: u64,
}

impl Faults {
    /// `seed`: the device's.
    pub(crate) fn new(seed: u64) -> Faults {
        Faults::with(Orders::own(), seed, clock::unix_ns())
    }

    fn with(orders: Orders, seed: u64, now_ns: u64) -> Faults {
        let apart = [Point::Start, Point::Control];
        let on_the_way = orders.points.iter().copied().filter(|point| !apart.contains(point)).collect();
        let mut rng = Rng(now_ns);
        rng.next();
        let settles = orders.settle;
        Faults { orders, rng, on_the_way, settles, decided_us: u64::MAX, due: None, left: None, seed }
    }

    pub(crate) fn judges(&self) -> bool {
        self.orders.judges
    }

    /// By count, faults are those of whoever gets this first.
    pub(crate) fn begin(&mut self, token: u32) {
        if self.orders.visits > 0 && self.left.is_none() {
            self.rng = Rng(self.seed ^ u64::from(token) << 16);
            self.rng.next();
            self.left = Some(1 + self.rng.below(2 * self.orders.visits));
        }
    }

    /// How it breaks down at this point, if it does.
    pub(crate) fn at(&mut self, point: Point) -> Option<Kind> {
        if self.settles > 0 {
            self.settles -= 1;
            return None;
        }
        let is_due = if self.orders.visits > 0 {
            self.is_counted_out(point)
        } else {
            self.orders.mean_us > 0 && self.is_due(point, clock::unix_ns() / 1000)
        };
        if is_due { self.rng.one_of(&self.orders.kinds) } else { None }
    }

    /// Whether an instance that takes another one's place breaks down in `start`.
    pub(crate) fn at_start(&mut self) -> Option<Kind> {
        self.apart(Point::Start, START_ONE_IN)
    }

    /// Whether a control lane breaks down, once in `one_in` times.
    pub(crate) fn in_control(&mut self, one_in: u64) -> Option<Kind> {
        self.apart(Point::Control, one_in)
    }

    fn apart(&mut self, point: Point, one_in: u64) -> Option<Kind> {
        let timed = self.orders.mean_us > 0 && self.orders.points.contains(&point);
        let is_due = timed && self.noisy_since(clock::unix_ns() / 1000).is_some() && self.rng.below(one_in) == 0;
        if is_due { self.rng.one_of(&self.orders.kinds) } else { None }
    }

    fn is_counted_out(&mut self, point: Point) -> bool {
        let Some(left) = self.left.as_mut() else { return false };
        *left = left.saturating_sub(1);
        // At a point that is not one of the orders it waits for the next one.
        *left == 0 && self.orders.points.contains(&point)
    }

    /// When the time of faults that `now_us` is in began, if it is in one.
    fn noisy_since(&self, now_us: u64) -> Option<u64> {
        let from_us = self.orders.from_ms * 1000;
        let began = match self.orders.period_us {
            0 => 0,
            period if (now_us / period) % 2 == 1 => now_us / period * period,
            _ => return None,
        };
        (now_us >= from_us).then_some(began.max(from_us))
    }

    fn is_due(&mut self, point: Point, now_us: u64) -> bool {
        if let Some((due, since)) = self.due {
            return due == point || now_us.saturating_sub(since) > PATIENCE_US;
        }
        let Some(noisy_since) = self.noisy_since(now_us) else { return false };
        let since = self.decided_us.min(now_us).max(noisy_since);
        let passed = now_us - since;
        self.decided_us = now_us;
        // That an event of a Poisson process lies in a time that is short beside the mean.
        if self.rng.below(self.orders.mean_us) >= passed {
            return false;
        }
        let Some(drawn) = self.rng.one_of(&self.on_the_way) else { return false };
        self.due = Some((drawn, now_us));
        drawn == point
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTLE: u64 = 100;

    /// Times of the faults of one instance after the other in so many microseconds, with a point every 50.
    fn run(orders: &Orders, length_us: u64) -> Vec<u64> {
        let mut times = Vec::new();
        let mut faults = Faults::with(orders.clone(), 0, 0);
        for now in (0..length_us).step_by(50) {
            let settled = times.last().is_none_or(|last| now - last > SETTLE * 50);
            if settled && faults.is_due([Point::Before, Point::After][now as usize / 50 % 2], now) {
                times.push(now);
                faults = Faults::with(orders.clone(), 0, now * 1000);
            }
        }
        times
    }

    #[test]
    fn faults_by_time_come_at_their_rate() {
        let orders = Orders { mean_us: 95_000, points: vec![Point::Before, Point::After], ..Orders::default() };
        let times = run(&orders, 100_000_000);
        assert!((850..1150).contains(&times.len()), "{} of about 1,000", times.len());
    }

    #[test]
    fn a_quiet_period_has_none_and_neither_has_the_time_before_they_begin() {
        let points = vec![Point::Before, Point::After];
        let orders = Orders { mean_us: 10_000, from_ms: 5_000, period_us: 1_000_000, points, ..Orders::default() };
        let times = run(&orders, 20_000_000);
        // What was drawn at the very end of a period comes with the next point.
        assert!(times.iter().all(|time| (time - 100) / 1_000_000 % 2 == 1 && *time >= 5_000_000), "{times:?}");
        assert!((300..700).contains(&times.len()), "{} of about 500", times.len());
    }

    #[test]
    fn counted_faults_are_the_same_for_the_same_seed_and_request() {
        let count = |seed, token| {
            let orders = Orders { visits: 50, settle: SETTLE, ..Orders::default() };
            let mut faults = Faults::with(orders, seed, 12345);
            faults.begin(token);
            (1..).find(|_| faults.at(Point::Before).is_some()).unwrap()
        };
        assert_eq!(count(3, 7), count(3, 7));
        let different: std::collections::HashSet<u64> = (0..100).map(|token| count(3, token)).collect();
        assert!(
            different.len() > 30 && different.iter().all(|at| (SETTLE..SETTLE + 102).contains(at)),
            "{different:?}"
        );
    }
}
