//! Teardown from within, and teardowns that meet: regression tests named after the bugs that other systems had.
//!
//! The rule (G8, L2, L3): a thread that a teardown waits for never waits for that teardown. Asked for a teardown, it gets
//! an answer at once, and the teardown is completed by somebody else. Everything here is bounded by conditions with a
//! time limit; nothing sleeps.
//!
//! ```text
//! support    the sim, drivers, ports and transports with a callback, log lines with a callback, limits
//! within     asked for by the driver: from a call, a log line, a completion
//! nested     asked for by a part of a teardown: a port, a transport, the last manager
//! meeting    two of them at once: unload, open, load, loss, fault
//! ```

mod meeting;
mod nested;
mod support;
mod within;
