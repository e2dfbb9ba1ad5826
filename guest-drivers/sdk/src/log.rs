//! The log capability: `log.write` of the WIT.
//!
//! The host bounds lines (4,096 bytes) and rate (1,000 lines per second and driver), so a driver may log what it likes; but never per
//! request. In a native build lines go to standard error.

/// How important a line is; the host maps it to its own levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// The driver cannot do what it was asked.
    Error,
    /// The device is odd, and the driver goes on.
    Warn,
    /// What an operator wants to know once.
    Info,
    /// For the driver's author.
    Debug,
    /// For the driver's author, in bulk.
    Trace,
}

/// Writes one line. Never blocks and never fails.
pub fn write(level: Level, message: &str) {
    #[cfg(all(target_family = "wasm", not(feature = "function")))]
    crate::glue::log(level, message);
    #[cfg(all(target_family = "wasm", feature = "function"))]
    crate::function_glue::log(level, message);
    #[cfg(not(target_family = "wasm"))]
    eprintln!("[driver {level:?}] {message}");
}

/// Writes one line at [`Level::Error`].
pub fn error(message: &str) {
    write(Level::Error, message);
}

/// Writes one line at [`Level::Warn`].
pub fn warn(message: &str) {
    write(Level::Warn, message);
}

/// Writes one line at [`Level::Info`].
pub fn info(message: &str) {
    write(Level::Info, message);
}
