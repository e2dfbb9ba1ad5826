//! Ends one instance from outside, whatever its guest is doing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use wasmtime::{Engine, EngineWeak};

/// A switch given to one instance at its making. Thrown from any thread, it ends the guest code that the instance is running at the guest's next loop head or
/// function entry, and every later call before it starts.
///
/// It does not interrupt a host call that the guest is in (those have bounds of their own), and no other instance notices it.
#[derive(Clone, Debug, Default)]
pub struct KillSwitch {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    killed: AtomicBool,
    engine: OnceLock<EngineWeak>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("killed", &self.killed).finish_non_exhaustive()
    }
}

impl KillSwitch {
    /// A switch that is not thrown.
    #[must_use]
    pub fn new() -> KillSwitch {
        KillSwitch::default()
    }

    /// Throws the switch. Idempotent, takes no lock and never blocks.
    pub fn kill(&self) {
        self.shared.killed.store(true, Ordering::Release);
        // One epoch more makes every running guest ask its callback, so that this one need not wait for the ticker. The others find nothing and go on.
        if let Some(engine) = self.shared.engine.get().and_then(EngineWeak::upgrade) {
            engine.increment_epoch();
        }
    }

    /// Whether the switch was thrown.
    #[must_use]
    pub fn is_killed(&self) -> bool {
        self.shared.killed.load(Ordering::Acquire)
    }

    /// Ties the switch to the engine whose guests it interrupts. A switch that is given to a second engine still works there, at the ticker's pace.
    pub(crate) fn arm(&self, engine: &Engine) {
        let _ = self.shared.engine.set(engine.weak());
    }
}
