//! Admission counting at the price of a plain increment: admit, hold, close, drain, revoke.
//!
//! Something is used by many threads, and one day it must go, while they use it: a driver, a
//! plugin, a mapping. A [`Gate`] stands in front of it. Users ask to be let in and hold a
//! [`Guard`] while they are inside; whoever wants it gone closes the gate and drains it, and then
//! knows that nobody is inside and nobody will be.
//!
//! ```
//! use cofferdam_gate::{Cancel, Drain, Gate, Refused};
//!
//! let gate = Gate::new();
//!
//! // A user, on any thread: about a nanosecond to come in and leave.
//! let guard = gate.admit()?;
//! let elsewhere = std::thread::spawn(move || drop(guard)); // guards may travel
//!
//! // Whoever takes the thing away.
//! gate.close();
//! assert_eq!(gate.admit().unwrap_err(), Refused::Closed);
//! gate.drain(Drain::Both, None, &Cancel::new())?;
//! // Nobody is inside: free what was guarded.
//! gate.retire().expect("closed and drained");
//! assert_eq!(gate.admit().unwrap_err(), Refused::Closed); // and so for ever
//! # elsewhere.join().unwrap();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # One client's right, revoked alone
//!
//! A [`Handle`] is the right of one client to call through the gate. It can be revoked while the
//! gate stays open for the others, and the wait is for its own calls alone.
//!
//! ```
//! use cofferdam_gate::{Cancel, Gate, HandleRefused, HandleState, Notify};
//!
//! let gate = Gate::new();
//! let bell = Notify::new()?;
//! let handle = gate.open_handle(Some(bell.clone()))?;
//! let other = gate.open_handle(None)?;
//! let others_call = other.admit()?;
//!
//! // Before the revocation.
//! drop(handle.admit()?);
//! assert_eq!(handle.state(), HandleState::Open);
//!
//! // And after it. The other handle's call is still inside, and nobody waits for it.
//! handle.revoke();
//! handle.drain(None, &Cancel::new())?;
//! assert_eq!(handle.admit().unwrap_err(), HandleRefused::Revoked);
//! assert!(bell.is_hung_up() && bell.wait(None)); // readable for ever
//! assert!(other.admit().is_ok());
//! # drop(others_call);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # A pause
//!
//! ```
//! use std::time::Duration;
//! use cofferdam_gate::{Cancel, Drain, Gate, Notify, Overdue, Refused};
//!
//! let gate = Gate::new();
//! let hold = gate.hold_for(Duration::from_secs(5), Overdue::Close)?;
//! assert_eq!(gate.admit().unwrap_err(), Refused::Held); // never blocks
//! let notify = Notify::new()?;
//! gate.register_held(&notify); // and is told when to try again
//! gate.drain(Drain::Crossings, None, &Cancel::new())?;
//! // Nobody is inside the module: put another in its place.
//! hold.open()?;
//! assert!(notify.wait(None));
//! assert!(gate.admit().is_ok());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Operations and crossings
//!
//! An *operation* lasts from admission to answer and may migrate between threads
//! ([`Gate::admit`], [`Handle::admit`], and many of one handle at once:
//! [`Handle::admit_many`]). A *crossing* is one call into the guarded module and
//! stays on its thread ([`Gate::cross`]); it passes a closed gate, so that what was admitted can
//! be completed. They are counted apart and drained apart.
//!
//! # What is guaranteed
//!
//! - G1: when [`Gate::hold`], [`Gate::close`] or [`Handle::revoke`] has returned, no admission
//!   succeeds (until [`Gate::open`], for a hold).
//! - G2: [`Gate::drain`] returns `Ok` only when every guard that was admitted has been dropped
//!   and every operation of a batch has left, and sees all that was done under them.
//! - G3: a guard or a batch may be dropped on any thread and any core.
//! - G4: coming in and leaving takes no lock and no fence, and writes no cache line that another
//!   core writes. The closer pays, by one `membarrier(2)`. Where the machine cannot do that, a
//!   portable form is chosen once ([`mechanism`]).
//! - G5: a drain ends by its deadline or by [`Cancel`], and can be called again.
//! - G6: [`Gate::admit`] never blocks; [`Gate::hold_for`] is bounded.
//! - G7: a gate or handle may be asked for ever, and answers that it is closed or revoked.
//! - G8: a drain from inside a crossing of the same gate is refused, not deadlocked.
//! - G9: crossings pass a closed gate.
//!
//! # What to mind
//!
//! - A leaked guard counts for ever. [`DrainError`] says how many are out; with the feature
//!   `trace-holders`, [`Gate::holders`] says whose and since when.
//! - A thread that drains while it has a guard in its own hands waits for itself, until the
//!   deadline: guards do not know their thread. Crossings do.
//! - A gate that is not [retired](Gate::retire) keeps a cache line per core for ever. Slots are
//!   used again and never freed.
//! - [`Gate::pinned`] counts nothing: it cannot be drained or retired.
//! - A seccomp filter against `membarrier(2)` must be there before the first gate is made; one
//!   that comes later makes `close` panic, because there would be no safe way to go on.
//! - Numbers of an open gate ([`Gate::operations`], [`Gate::stats`]) are true of no one moment.

/// The README's example runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

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
mod guards;
mod handle;
mod hold;
mod holders;
mod inside;
#[cfg(all(test, not(loom)))]
mod litmus;
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
pub use guards::{Guards, MAX_BATCH};
pub use handle::{DEFAULT_HANDLES, Handle, HandleId, HandleState};
pub use hold::{Hold, Overdue};
pub use holders::Holder;
pub use inside::in_crossing;
pub use mechanism::{MECHANISM_VARIABLE, Mechanism, mechanism, mechanism_reason};
pub use notify::Notify;
pub use sleep::Woken;
pub use stats::CoreStats;
