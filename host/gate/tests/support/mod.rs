//! Draining, as the tests of behaviour do it.

use std::time::{Duration, Instant};

use cofferdam_gate::{Cancel, Drain, DrainError, Gate};

/// Longer than anything takes on a busy machine.
pub(crate) fn long() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(60))
}

/// Has passed.
pub(crate) fn at_once() -> Option<Instant> {
    Some(Instant::now())
}

/// Waits for operations and crossings.
pub(crate) fn drain(gate: Gate, deadline: Option<Instant>) -> Result<(), DrainError> {
    gate.drain(Drain::Both, deadline, &Cancel::new())
}
