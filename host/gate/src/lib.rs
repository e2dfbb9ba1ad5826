//! Admission counting at the price of a plain increment: admit, hold, close, drain, revoke.

mod cancel;
mod cells;
mod count;
mod cpu;
mod drain;
mod error;
mod event;
#[cfg(not(loom))]
mod eventfd;
mod gate;
mod guard;
mod handle;
mod hold;
mod holders;
mod inside;
mod mechanism;
mod notify;
mod order;
#[cfg(all(target_arch = "x86_64", not(miri), not(loom)))]
mod rseq;
#[cfg(not(any(all(target_arch = "x86_64", not(miri)), loom)))]
#[path = "rseq_absent.rs"]
mod rseq;
mod sleep;
mod slot;
mod stats;
mod sync;

#[cfg(loom)]
#[doc(hidden)]
pub mod model;
#[cfg(loom)]
use model::{eventfd, rseq};

pub use cancel::Cancel;
pub use drain::Drain;
pub use error::{DrainError, HandleError, HandleRefused, HoldError, Refused};
pub use gate::{Gate, State};
pub use guard::{Crossing, Guard};
pub use handle::{DEFAULT_HANDLES, Handle, HandleId, HandleState};
pub use hold::{Hold, Overdue};
pub use holders::Holder;
pub use inside::in_crossing;
pub use mechanism::{MECHANISM_VARIABLE, Mechanism, mechanism, mechanism_reason};
pub use notify::Notify;
pub use sleep::Woken;
pub use stats::CoreStats;
