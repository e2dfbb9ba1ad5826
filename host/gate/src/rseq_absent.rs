//! Stands in for `rseq.rs` where sections were not written or not measured: every other
//! architecture than x86-64.

use crate::cells::Cells;
use crate::count::By;
use crate::sync::atomic::AtomicU64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "the same type as in rseq.rs")]
pub(crate) enum Outcome {
    Counted,
    Refused,
    Homeless,
}

pub(crate) fn prepare() -> Result<(), &'static str> {
    Err("no restartable sections for this architecture")
}

pub(crate) fn add<const COLUMN: usize, const N: usize>(_: Cells<N>, _: By) -> Outcome {
    Outcome::Homeless
}

pub(crate) fn add_if<const COLUMN: usize, const N: usize>(_: &AtomicU64, _: u64, _: Cells<N>, _: By) -> Outcome {
    Outcome::Homeless
}

pub(crate) fn add_if_unless<const BITS: u8, const COLUMN: usize, const N: usize>(
    _: &AtomicU64,
    _: u64,
    _: &AtomicU64,
    _: Cells<N>,
    _: By,
) -> Outcome {
    Outcome::Homeless
}

pub(crate) fn add_unless<const BITS: u8, const COLUMN: usize, const N: usize>(
    _: &AtomicU64,
    _: Cells<N>,
    _: By,
) -> Outcome {
    Outcome::Homeless
}

pub(crate) fn add_unless_either<const FIRST: u8, const SECOND: u8, const COLUMN: usize, const N: usize>(
    _: [&AtomicU64; 2],
    _: Cells<N>,
    _: By,
) -> Outcome {
    Outcome::Homeless
}
