//! What an unload proves. The JSON keys are stable (DESIGN section 7).

use serde::{Deserialize, Serialize};

/// How the ladder ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Asked for by an operator, everything answered.
    Unloaded,
    /// Asked for with `--force`, cut short.
    Forced,
    /// The device went away first.
    Removed,
    /// The driver or the device broke the rules.
    Failed,
    /// A load that did not succeed was rolled back.
    RolledBack,
    /// The daemon stopped.
    Shutdown,
    /// Not over: the binding is still draining.
    Draining,
}

impl From<cofferdam_lifecycle::Outcome> for Outcome {
    fn from(outcome: cofferdam_lifecycle::Outcome) -> Outcome {
        match outcome {
            cofferdam_lifecycle::Outcome::Unloaded => Outcome::Unloaded,
            cofferdam_lifecycle::Outcome::Forced => Outcome::Forced,
            cofferdam_lifecycle::Outcome::Removed => Outcome::Removed,
            cofferdam_lifecycle::Outcome::Failed => Outcome::Failed,
            cofferdam_lifecycle::Outcome::RolledBack => Outcome::RolledBack,
            cofferdam_lifecycle::Outcome::Shutdown => Outcome::Shutdown,
        }
    }
}

/// A step of the ladder, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Admission stops for good.
    CloseGate,
    /// Handles answer `revoked`, sleepers wake.
    Revoke,
    /// Operations and crossings leave.
    Drain,
    /// Guests are interrupted (only when forced).
    Interrupt,
    /// The device is made silent (L1).
    Quiesce,
    /// Used rings are reaped, what completed is answered, the rest is failed.
    Answer,
    /// Ports flush their answers and go.
    Ports,
    /// DMA memory is unmapped from the device and freed.
    Unmap,
    /// Stores and code are dropped.
    Drop,
    /// The device is released and what is left is looked up.
    Release,
}

/// How long one stage took, over all attempts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTime {
    /// Which.
    pub name: Stage,
    /// Microseconds.
    pub micros: u64,
}

/// What was found still there after the last stage; looked up, not assumed (L7).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Residual {
    /// Crossings that have not left.
    pub calls: u64,
    /// Handles that would still be served.
    pub handles: u64,
    /// Operations in no client's hands and not answered.
    pub requests: u64,
    /// Leased buffers that still reach DMA memory.
    pub buffers: u64,
    /// Bytes of DMA memory that still exist.
    pub dma_bytes: u64,
    /// Mappings of the binding's memory in this process.
    pub mappings: u64,
    /// Descriptors of the binding that are still open.
    pub fds: u64,
}

impl Residual {
    /// Whether nothing at all is left.
    pub fn is_zero(&self) -> bool {
        *self == Residual::default()
    }
}

/// What was retired on purpose because the device could not be shown to be silent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaked {
    /// Bytes of DMA memory that stay mapped until the process ends.
    pub bytes: u64,
    /// Why; empty when nothing was.
    pub reason: String,
}

/// The certificate of one binding's end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The binding.
    pub name: String,
    /// The driver's file or label.
    pub driver: String,
    /// The device's address.
    pub device: String,
    /// How many drivers this binding has had.
    pub generation: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Handles that were open when the gate closed.
    pub handles_revoked: u64,
    /// Crossings running when the gate closed.
    pub calls_at_close: u64,
    /// Crossings of those that ended by themselves.
    pub calls_drained: u64,
    /// Crossings that were interrupted.
    pub calls_interrupted: u64,
    /// Operations in flight when the gate closed.
    pub requests_at_close: u64,
    /// Operations that the device still completed, whatever the status.
    pub requests_completed: u64,
    /// Operations that were failed to their clients after silence was confirmed.
    pub requests_failed: u64,
    /// The time of each stage.
    pub stages: Vec<StageTime>,
    /// What is left; zero in every field on a clean end.
    pub residual: Residual,
    /// What was retired on purpose.
    pub leaked: Leaked,
}
