//! How often, where and how the driver breaks down: text in a static of the module, which tests write over ([`Orders::write_into`]), so that it is compiled once.

use std::fmt;

/// Bytes of [`MARKER`] before the orders.
const PREFIX: &[u8; 32] = b"cofferdam-faulty-guest-ordered::";
/// Bytes of the orders.
const ORDERS_BYTES: usize = 160;

/// The prefix and then the orders, padded with spaces: what is written over. Without orders it never breaks down.
static MARKER: [u8; PREFIX.len() + ORDERS_BYTES] = {
    let mut marker = [b' '; PREFIX.len() + ORDERS_BYTES];
    marker.split_at_mut(PREFIX.len()).0.copy_from_slice(PREFIX);
    marker
};

/// Where it breaks down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// In `start`, of an instance that takes another one's place.
    Start,
    /// In `submit`, before anything is done.
    Before,
    /// In `submit`, when all chains are written.
    After,
    /// In `submit`, when there is a flush among the requests and its chain is written.
    Flush,
    /// In `complete`, before anything is judged.
    Judge,
    /// In `complete`, when some is judged and none of it answered.
    Judged,
    /// In the control lane: `config-changed`, and `attach` of the one that takes its place.
    Control,
}

impl Point {
    /// All of them.
    pub const ALL: [Point; 7] =
        [Point::Start, Point::Before, Point::After, Point::Flush, Point::Judge, Point::Judged, Point::Control];

    const fn letter(self) -> char {
        match self {
            Point::Start => 's',
            Point::Before => 'b',
            Point::After => 'a',
            Point::Flush => 'f',
            Point::Judge => 'j',
            Point::Judged => 'd',
            Point::Control => 'c',
        }
    }
}

/// How it breaks down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It panics.
    Trap,
    /// It never returns, until its deadline.
    Loop,
    /// It takes memory until there is none.
    Memory,
    /// Its answer breaks the contract.
    Words,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 4] = [Kind::Trap, Kind::Loop, Kind::Memory, Kind::Words];

    const fn letter(self) -> char {
        match self {
            Kind::Trap => 't',
            Kind::Loop => 'l',
            Kind::Memory => 'm',
            Kind::Words => 'w',
        }
    }
}

/// What an instance does. The default never breaks down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orders {
    /// Mean time between two faults of one lane in microseconds, at least 1; 0: it is not a matter of time.
    pub mean_us: u64,
    /// No fault before this time: milliseconds since 1970-01-01 UTC. Without it a load might fail.
    pub from_ms: u64,
    /// If not 0, quiet periods of so many microseconds alternate with others; the odd ones since 1970 are not quiet.
    pub period_us: u64,
    /// If not 0, faults are counted and not timed: the mean number of points between two, drawn from a seed that is the disk's number of sectors modulo 65,536.
    pub visits: u64,
    /// Points that every instance passes before its first fault: more than there are for what its predecessor was given, three for each request and two for each response.
    pub settle: u64,
    /// Every response is judged by the driver: its queues have no ordinary response.
    pub judges: bool,
    /// Where.
    pub points: Vec<Point>,
    /// How.
    pub kinds: Vec<Kind>,
}

impl Default for Orders {
    fn default() -> Orders {
        Orders {
            mean_us: 0,
            from_ms: 0,
            period_us: 0,
            visits: 0,
            settle: 200,
            judges: false,
            points: Point::ALL.to_vec(),
            kinds: vec![Kind::Trap],
        }
    }
}

impl fmt::Display for Orders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Orders { mean_us, from_ms, period_us, visits, settle, judges, points, kinds } = self;
        write!(f, "mean-us={mean_us} from-ms={from_ms} period-us={period_us} visits={visits} settle={settle}")?;
        write!(f, " judges={}", u8::from(*judges))?;
        let points: String = points.iter().map(|point| point.letter()).collect();
        let kinds: String = kinds.iter().map(|kind| kind.letter()).collect();
        write!(f, " points={points} kinds={kinds}")
    }
}

impl Orders {
    /// Those of this module.
    pub(crate) fn own() -> Orders {
        // The compiler must not take the bytes for the constant that it sees.
        let marker: &'static [u8; PREFIX.len() + ORDERS_BYTES] = std::hint::black_box(&MARKER);
        Orders::parse(std::str::from_utf8(&marker[PREFIX.len()..]).unwrap_or_default())
    }

    fn parse(text: &str) -> Orders {
        let mut orders = Orders::default();
        for (key, value) in text.split_whitespace().filter_map(|word| word.split_once('=')) {
            let number = value.parse().unwrap_or(0);
            match key {
                "mean-us" => orders.mean_us = number,
                "from-ms" => orders.from_ms = number,
                "period-us" => orders.period_us = number,
                "visits" => orders.visits = number,
                "settle" => orders.settle = number,
                "judges" => orders.judges = number != 0,
                "points" => {
                    orders.points = Point::ALL.into_iter().filter(|point| value.contains(point.letter())).collect();
                }
                "kinds" => orders.kinds = Kind::ALL.into_iter().filter(|kind| value.contains(kind.letter())).collect(),
                _ => {}
            }
        }
        orders
    }

    /// `component` of this guest with these orders.
    ///
    /// # Panics
    /// If it is not of this guest, or the orders are too long.
    #[must_use]
    pub fn write_into(&self, component: &[u8]) -> Vec<u8> {
        let text = self.to_string();
        assert!(text.len() <= ORDERS_BYTES, "too long: {text}");
        let mut places = component.windows(PREFIX.len()).enumerate().filter(|(_, window)| *window == PREFIX);
        let (at, _) = places.next().expect("a component of guest-faulty-blk");
        assert!(places.next().is_none(), "two markers");
        let at = at + PREFIX.len();
        let mut ordered = component.to_vec();
        ordered[at..at + ORDERS_BYTES].fill(b' ');
        ordered[at..at + text.len()].copy_from_slice(text.as_bytes());
        ordered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_as_they_were_written() {
        let orders = Orders {
            mean_us: u64::MAX,
            from_ms: u64::MAX / 1_000_000,
            period_us: 1_000_000,
            visits: 1_000_000,
            settle: 1_000,
            judges: true,
            points: Point::ALL.to_vec(),
            kinds: Kind::ALL.to_vec(),
        };
        let component = [b"before".as_slice(), &MARKER, b"behind"].concat();
        let ordered = orders.write_into(&component);
        assert_eq!((ordered.len(), &ordered[..6]), (component.len(), b"before".as_slice()));
        assert!(ordered.ends_with(b"behind"));
        let text = std::str::from_utf8(&ordered[6 + PREFIX.len()..ordered.len() - 6]).unwrap();
        assert_eq!(Orders::parse(text), orders);
        let one = Orders { points: vec![Point::Flush], kinds: vec![Kind::Words], ..Orders::default() };
        assert_eq!(Orders::parse(&one.to_string()), one);
    }

    #[test]
    fn without_orders_it_never_breaks_down() {
        let own = Orders::own();
        assert_eq!((own.mean_us, own.visits), (0, 0));
    }
}
