//! How a guest call ends badly: with an answer (the driver's typed error), or with a fault (the instance is dead).

use std::fmt;

use wasmtime::{Trap, WasmBacktrace};

use crate::bindings::cofferdam::driver::types;
use crate::text::{MAX_MESSAGE_BYTES, clean};

/// Frames kept of a guest's backtrace.
pub(crate) const MAX_BACKTRACE_FRAMES: usize = 32;

/// What kind of fault ended an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// The guest trapped (a panic, an access out of its memory, a division by zero, an overrun of its stack).
    Trap,
    /// The guest's own time in one call, or the host's on its behalf, went over its bound.
    Deadline,
    /// The host interrupted the instance with its [`KillSwitch`](crate::KillSwitch).
    Killed,
    /// The guest went over a memory or table bound and could not go on.
    OutOfMemory,
    /// Words that break the layout written in `wit/`.
    Layout,
}

impl FaultKind {
    /// The kind in one lower-case word, as used in log fields and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            FaultKind::Trap => "trap",
            FaultKind::Deadline => "deadline",
            FaultKind::Killed => "killed",
            FaultKind::OutOfMemory => "out-of-memory",
            FaultKind::Layout => "layout",
        }
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A fault of a driver. The instance that had it is never entered again (L5).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the driver faulted ({kind}): {message}")]
pub struct GuestFault {
    /// What kind.
    pub kind: FaultKind,
    /// What happened, in a sentence; at most a few hundred bytes, control characters escaped.
    pub message: String,
    /// Guest frames, innermost first, by function name where the component has names: at most 32 lines.
    pub backtrace: Vec<String>,
}

impl GuestFault {
    /// Words of the guest that broke the layout; for whoever parses what `submit` and `complete` returned.
    #[must_use]
    pub fn layout(message: impl Into<String>) -> GuestFault {
        GuestFault { kind: FaultKind::Layout, message: message.into(), backtrace: Vec::new() }
    }

    /// Classifies the error that wasmtime ended a guest call with. `denied` says which bound the guest had hit during the call, if any.
    pub(crate) fn classify(error: &wasmtime::Error, denied: Option<&str>) -> GuestFault {
        let backtrace = error.downcast_ref::<WasmBacktrace>().map(frames).unwrap_or_default();
        let (kind, message) = if let Some(interrupt) = error.downcast_ref::<Interrupt>() {
            (interrupt.kind(), interrupt.to_string())
        } else if let Some(bound) = denied {
            (FaultKind::OutOfMemory, format!("{bound}; then: {}", root(error)))
        } else if let Some(trap) = error.downcast_ref::<Trap>() {
            (FaultKind::Trap, trap.to_string())
        } else if backtrace.is_empty() {
            // Nothing of the guest was on the stack: the host could not lift what it returned.
            (FaultKind::Layout, root(error))
        } else {
            // A host import refused the guest's words.
            (FaultKind::Trap, root(error))
        };
        GuestFault { kind, message, backtrace }
    }
}

fn root(error: &wasmtime::Error) -> String {
    clean(&error.root_cause().to_string(), MAX_MESSAGE_BYTES)
}

/// A backtrace as text, bounded.
pub(crate) fn frames(backtrace: &WasmBacktrace) -> Vec<String> {
    let frames = backtrace.frames().iter().take(MAX_BACKTRACE_FRAMES);
    frames
        .map(|frame| {
            let module = frame.module().name().unwrap_or("?");
            let name = frame.func_name().map_or_else(
                || format!("function {}", frame.func_index()),
                // Names are the guest's own text; mangled Rust names are made readable.
                |name| rustc_demangle::demangle(name).to_string(),
            );
            let offset = frame.module_offset().map(|o| format!(" at {o:#x}")).unwrap_or_default();
            clean(&format!("{module}: {name}{offset}"), MAX_MESSAGE_BYTES)
        })
        .collect()
}

/// Why the host interrupted a guest; travels through wasmtime as the error of an epoch callback or of an import.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Interrupt {
    #[error("one call ran for more than {limit_ms} ms")]
    Deadline { limit_ms: u64 },
    #[error("one call kept the host busy for more than {limit_ms} ms")]
    HostBudget { limit_ms: u64 },
    #[error("the host interrupted the instance")]
    Killed,
}

impl Interrupt {
    fn kind(self) -> FaultKind {
        match self {
            Interrupt::Deadline { .. } | Interrupt::HostBudget { .. } => FaultKind::Deadline,
            Interrupt::Killed => FaultKind::Killed,
        }
    }
}

/// A driver's own answer that it cannot do what was asked. Its texts are at most 512 bytes, control characters escaped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The device is not of a kind that this driver serves.
    #[error("not a device of this driver: {0}")]
    NotMine(String),
    /// The device broke its specification.
    #[error("the device broke its specification: {0}")]
    Device(String),
    /// The device needs something that the driver does not do.
    #[error("not supported by the driver: {0}")]
    Unsupported(String),
    /// The host refused an import that the driver cannot do without.
    #[error("the host refused the driver: {0}")]
    Host(String),
}

impl From<types::DriverError> for DriverError {
    fn from(error: types::DriverError) -> DriverError {
        let clean = |text: String| clean(&text, MAX_MESSAGE_BYTES);
        match error {
            types::DriverError::NotMine(text) => DriverError::NotMine(clean(text)),
            types::DriverError::Device(text) => DriverError::Device(clean(text)),
            types::DriverError::Unsupported(text) => DriverError::Unsupported(clean(text)),
            types::DriverError::Host(text) => DriverError::Host(clean(text)),
        }
    }
}

/// How a call into a driver failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The driver answered with an error. The instance lives.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The driver is to blame for more than an error. The instance is dead; every later call answers the same fault.
    #[error(transparent)]
    Fault(#[from] GuestFault),
}
