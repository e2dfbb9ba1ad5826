//! Faults as data: which request meets which effect.
//!
//! A rule is written as `EFFECT[@WHEN][,op=OP][,queue=N]`, on a command line and in tests alike:
//!
//! | effect | what happens to the request |
//! | --- | --- |
//! | `slow:N` or `slow:A..B` | is executed and answered N ticks later, or A to B-1, drawn from the seed |
//! | `gate` | waits until a test opens the gate ([`crate::SimDevice::open_gate`]) |
//! | `reorder` | is answered in a drawn order with whatever else is ready then |
//! | `fail:io` or `fail:unsupported` | is answered with that status (a net command: VIRTIO_NET_ERR) and has no effect |
//! | `hang` | from it on the queues stand still, until [`crate::SimDevice::release`] |
//! | `freeze` | the same, and configuration and control messages get no answer either |
//! | `lie:NAME` | see [`crate::Lie`] |
//! | `die` | the device is gone before it is executed |
//! | `power-cut` | the same, and what was not flushed is lost but for a drawn part |
//! | `config:NAME` | see [`crate::ConfigLie`]; a rule about configuration takes no `@WHEN` |
//!
//! | when | which of the matching requests, counted from 1 |
//! | --- | --- |
//! | `always` | each (and when nothing is said) |
//! | `nth=N` | the N-th alone |
//! | `every=N` | the N-th, 2N-th, ... |
//! | `from=N` | the N-th and all after it |
//! | `chance=P` | each with probability P, 0 to 1 |
//!
//! ```
//! use cofferdam_sim::{Effect, Rule, When};
//! let rule: Rule = "fail:io@nth=3,op=write".parse()?;
//! assert_eq!(rule.when, When::Nth(3));
//! assert_eq!(rule.to_string(), "fail:io@nth=3,op=write");
//! assert!("fail:io@nth=0".parse::<Rule>().is_err());
//! # Ok::<(), cofferdam_sim::RuleError>(())
//! ```

use std::fmt;
use std::str::FromStr;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP};

use crate::config::ConfigLie;
use crate::kinds::{Lie, Op};
use crate::rng::Rng;

/// A rule that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// A word that stands for nothing.
    #[error("no {what} is called {name:?}; there are: {known}")]
    Unknown {
        /// What was looked for.
        what: &'static str,
        /// What was written.
        name: String,
        /// What could have been.
        known: String,
    },
    /// A number that is none, or out of its bounds.
    #[error("{text:?} is no {what}")]
    Number {
        /// What was expected.
        what: &'static str,
        /// What was written.
        text: String,
    },
}

pub(crate) fn by_name<T: Copy>(what: &'static str, name: &str, known: &[(&'static str, T)]) -> Result<T, RuleError> {
    known.iter().find(|(known, _)| *known == name).map(|(_, value)| *value).ok_or_else(|| RuleError::Unknown {
        what,
        name: name.to_owned(),
        known: known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "),
    })
}

fn name_of<T: PartialEq>(value: &T, known: &[(&'static str, T)]) -> &'static str {
    known.iter().find(|(_, known)| known == value).map_or("?", |(name, _)| name)
}

fn number<T: FromStr + PartialOrd>(what: &'static str, text: &str, least: T) -> Result<T, RuleError> {
    text.parse().ok().filter(|value| *value >= least).ok_or_else(|| RuleError::Number { what, text: text.to_owned() })
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Effect {
    /// Later by `from` to `below` - 1 ticks.
    Slow {
        /// Least number of ticks.
        from: u64,
        /// One more than the largest number of ticks.
        below: u64,
    },
    /// Not before the gate is opened for it.
    Gate,
    /// In a drawn order.
    Reorder,
    /// Failed with this status byte (section 5.2.6).
    Fail(u8),
    /// The queues stand still.
    Hang,
    /// Queues and control stand still.
    Freeze,
    /// A lie about the request.
    Lie(Lie),
    /// The device is gone.
    Die,
    /// Power is gone.
    PowerCut,
    /// A lie in configuration space.
    Config(ConfigLie),
}

const STATUSES: &[(&str, u8)] = &[("io", VIRTIO_BLK_S_IOERR as u8), ("unsupported", VIRTIO_BLK_S_UNSUPP as u8)];

const PLAIN: &[(&str, Effect)] = &[
    ("gate", Effect::Gate),
    ("reorder", Effect::Reorder),
    ("hang", Effect::Hang),
    ("freeze", Effect::Freeze),
    ("die", Effect::Die),
    ("power-cut", Effect::PowerCut),
];

impl FromStr for Effect {
    type Err = RuleError;
    fn from_str(text: &str) -> Result<Self, RuleError> {
        match text.split_once(':') {
            Some(("slow", ticks)) => {
                let (from, below) = match ticks.split_once("..") {
                    Some((from, below)) => {
                        let from = number("number of ticks", from, 0)?;
                        (from, number("end of a range of ticks", below, from + 1)?)
                    }
                    None => {
                        let ticks: u64 = number("number of ticks", ticks, 0)?;
                        (ticks, ticks.saturating_add(1))
                    }
                };
                Ok(Self::Slow { from, below })
            }
            Some(("fail", status)) => by_name("status", status, STATUSES).map(Self::Fail),
            Some(("lie", lie)) => by_name("lie", lie, Lie::NAMES).map(Self::Lie),
            Some(("config", lie)) => lie.parse().map(Self::Config),
            _ => by_name("effect", text, PLAIN).map_err(|error| match error {
                RuleError::Unknown { what, name, known } => RuleError::Unknown {
                    what,
                    name,
                    known: format!("slow:N, fail:STATUS, lie:NAME, config:NAME, {known}"),
                },
                other => other,
            }),
        }
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slow { from, below } if *below == from + 1 => write!(f, "slow:{from}"),
            Self::Slow { from, below } => write!(f, "slow:{from}..{below}"),
            Self::Fail(status) => write!(f, "fail:{}", name_of(status, STATUSES)),
            Self::Lie(lie) => write!(f, "lie:{}", name_of(lie, Lie::NAMES)),
            Self::Config(lie) => write!(f, "config:{}", name_of(lie, ConfigLie::NAMES)),
            plain => f.write_str(name_of(plain, PLAIN)),
        }
    }
}

/// Which of the matching requests a rule is about, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum When {
    /// Each.
    Always,
    /// One.
    Nth(u64),
    /// Each whose number is a multiple.
    Every(u64),
    /// This one and all after it.
    From(u64),
    /// Each with a probability of 0 to 1.
    Chance(f64),
}

impl FromStr for When {
    type Err = RuleError;
    fn from_str(text: &str) -> Result<Self, RuleError> {
        match text.split_once('=') {
            Some(("nth", n)) => number("request number", n, 1).map(Self::Nth),
            Some(("every", n)) => number("request number", n, 1).map(Self::Every),
            Some(("from", n)) => number("request number", n, 1).map(Self::From),
            Some(("chance", p)) => number("probability", p, 0.0).and_then(|p: f64| {
                if p <= 1.0 {
                    Ok(Self::Chance(p))
                } else {
                    Err(RuleError::Number { what: "probability", text: p.to_string() })
                }
            }),
            _ => by_name("time", text, &[("always", Self::Always)]).map_err(|_| RuleError::Unknown {
                what: "time",
                name: text.to_owned(),
                known: "always, nth=N, every=N, from=N, chance=P".to_owned(),
            }),
        }
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Always => f.write_str("always"),
            Self::Nth(n) => write!(f, "nth={n}"),
            Self::Every(n) => write!(f, "every={n}"),
            Self::From(n) => write!(f, "from={n}"),
            Self::Chance(p) => write!(f, "chance={p}"),
        }
    }
}

/// One fault: an effect, and which requests meet it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// What happens.
    pub effect: Effect,
    /// To which of the requests that match.
    pub when: When,
    /// Only requests of this kind match.
    pub op: Option<Op>,
    /// Only requests of this queue match.
    pub queue: Option<u16>,
}

impl Rule {
    /// A rule about every request.
    pub fn always(effect: Effect) -> Self {
        Self { effect, when: When::Always, op: None, queue: None }
    }
}

impl FromStr for Rule {
    type Err = RuleError;
    fn from_str(text: &str) -> Result<Self, RuleError> {
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default();
        let (effect, when) = match first.split_once('@') {
            Some((effect, when)) => (effect.parse()?, when.parse()?),
            None => (first.parse()?, When::Always),
        };
        let mut rule = Self { effect, when, op: None, queue: None };
        for part in parts {
            match part.split_once('=') {
                Some(("op", op)) => rule.op = Some(by_name("operation", op, Op::NAMES)?),
                Some(("queue", queue)) => rule.queue = Some(number("queue", queue, 0)?),
                _ => by_name("condition", part, &[("op=OP", ()), ("queue=N", ())])?,
            }
        }
        Ok(rule)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.effect, self.when)?;
        if let Some(op) = self.op {
            write!(f, ",op={}", name_of(&op, Op::NAMES))?;
        }
        if let Some(queue) = self.queue {
            write!(f, ",queue={queue}")?;
        }
        Ok(())
    }
}

/// What one request meets: the sum of the rules that match it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fate {
    pub(crate) ticks: u64,
    pub(crate) gated: bool,
    pub(crate) reorder: bool,
    pub(crate) status: Option<u8>,
    pub(crate) hang: bool,
    pub(crate) freeze: bool,
    pub(crate) die: bool,
    pub(crate) power_cut: bool,
    pub(crate) lies: Vec<Lie>,
}

impl Fate {
    pub(crate) fn lies(&self, lie: Lie) -> bool {
        self.lies.contains(&lie)
    }
}

/// The rules in force, with their counters and their generator.
pub(crate) struct Script {
    rules: Vec<(Rule, u64)>,
    rng: Rng,
}

impl Script {
    pub(crate) fn new(rules: &[Rule], seed: u64) -> Self {
        Self { rules: rules.iter().map(|rule| (*rule, 0)).collect(), rng: Rng::part(seed, 1) }
    }

    pub(crate) fn add(&mut self, rule: Rule) {
        self.rules.push((rule, 0));
    }

    pub(crate) fn clear(&mut self) {
        self.rules.clear();
    }

    /// Whether a rule could touch a request.
    pub(crate) fn is_idle(&self) -> bool {
        self.rules.iter().all(|(rule, _)| matches!(rule.effect, Effect::Config(_)))
    }

    pub(crate) fn config_lies(&self) -> Vec<ConfigLie> {
        let lie = |(rule, _): &(Rule, u64)| if let Effect::Config(lie) = rule.effect { Some(lie) } else { None };
        self.rules.iter().filter_map(lie).collect()
    }

    pub(crate) fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    /// What the next request of kind `op` on `queue` meets. Counts it.
    pub(crate) fn judge(&mut self, queue: u16, op: Op) -> Fate {
        let mut fate = Fate::default();
        for (rule, seen) in &mut self.rules {
            if rule.op.is_some_and(|wanted| wanted != op) || rule.queue.is_some_and(|wanted| wanted != queue) {
                continue;
            }
            *seen += 1;
            let meets = match rule.when {
                When::Always => true,
                When::Nth(n) => *seen == n,
                When::Every(n) => *seen % n == 0,
                When::From(n) => *seen >= n,
                When::Chance(chance) => self.rng.chance(chance),
            };
            if !meets {
                continue;
            }
            match rule.effect {
                Effect::Slow { from, below } => {
                    fate.ticks = fate.ticks.max(from + self.rng.below(below.saturating_sub(from)));
                }
                Effect::Gate => fate.gated = true,
                Effect::Reorder => fate.reorder = true,
                Effect::Fail(status) => fate.status = Some(status),
                Effect::Hang => fate.hang = true,
                Effect::Freeze => fate.freeze = true,
                Effect::Lie(lie) => fate.lies.push(lie),
                Effect::Die => fate.die = true,
                Effect::PowerCut => fate.power_cut = true,
                Effect::Config(_) => {}
            }
        }
        fate
    }
}
