//! guest-trap.
