//! cofferdam-gate.
