//! How a binding lives and leaves, as a table (DESIGN section 7, L1 to L7).
//!
//! ```text
//! LOADING ---------- loaded ---------> SERVING
//!    |                                    |
//!    | leave                              | leave: unload, removed, fault, load-failed, shutdown
//!    +---------------> closing <----------+
//!                         | gate-closed
//!                      revoking
//!                         | handles-revoked
//!                      draining <--- leave --- waiting        the only state that can give up and go on later (L2)
//!                       |  |  |                   ^
//!                       |  |  +----- gave-up -----+
//!               drained |  | device-lost, device-broken, cut-short (forced)
//!                       |  +--> interrupting
//!                       |            | interrupted
//!                       +--> quiescing <+
//!                silent  |          | not-silent (L1)
//!                    answering -> abandoning                  answering finds a lane that is not vacant: as if not silent
//!               answered |          | abandoned
//!                     detaching-ports
//!   silent and not kept  |          | not silent, or kept
//!                   unmapping    retiring
//!                        |        |    | kept
//!                        dropping    keeping
//!                            |          |
//!                            releasing -+
//!                               | released
//!                            DETACHED
//! ```
//!
//! It is a Moore machine. Every [`State`] has one [`Effect`], which the manager carries out; what came of it is an [`Event`]; [`TABLE`] says what comes next. The
//! manager owns no transition, and this crate knows no clock, thread, device or memory.
//!
//! The failure paths:
//!
//! - **The load fails, or is called off.** `leave` out of `loading`: the same ladder, over whatever there is already (L4). A load whose `loaded` is refused has
//!   been called off. No other effect is carried out before the loading thread has let go.
//! - **The caller's deadline passes, or it is cancelled.** `gave-up`, `waiting`. Nothing is admitted any more; any further `leave` goes on with the drain.
//! - **The device is lost or breaks its rules.** The drain cannot be completed and is not waited for. It also replaces the cause, see [`Cause::overtakes`].
//! - **The device cannot be shown to be silent.** `abandoning`, later `retiring`: nobody is told that a request failed which may yet happen, and no memory is freed
//!   that may yet be written (L1).
//! - **A guest does not come out of its call.** Its lane cannot be looked into, so `answering` ends like missing silence; its code is kept and counted.
//! - **The thread that carries out the effects dies.** Every effect can be carried out again, so any other thread goes on from [`Life::state`] (L2).
//! - **A pinned binding loses its device, or a rule is broken.** Handles die; memory and code stay until the process ends.
//!
//! ```
//! use cofferdam_lifecycle::{Cause, Effect, Event, Life, Outcome};
//!
//! let mut life = Life::new(false);
//! life.apply(Event::Loaded)?;
//! life.apply(Event::Leave { cause: Cause::Unload, force: false })?;
//! while life.effect() != Effect::Nothing {
//!     // Here the manager carries out the effect. In this world everything goes well.
//!     life.apply(match life.effect() {
//!         Effect::CloseGate => Event::GateClosed,
//!         Effect::RevokeHandles => Event::HandlesRevoked,
//!         Effect::Drain => Event::Drained,
//!         Effect::Quiesce => Event::Silent,
//!         Effect::Answer => Event::Answered,
//!         Effect::DetachPorts => Event::PortsDetached,
//!         Effect::Unmap => Event::Unmapped,
//!         Effect::DropCode => Event::CodeDropped,
//!         Effect::Release => Event::Released,
//!         other => unreachable!("{other}"),
//!     })?;
//! }
//! assert_eq!(life.outcome(), Some(Outcome::Unloaded));
//! # Ok::<(), cofferdam_lifecycle::Refused>(())
//! ```

mod event;
mod life;
mod named;
mod print;
mod state;
mod table;

pub use event::{Cause, Event, EventKind};
pub use life::{Life, Marks, Outcome, Refused, Step};
pub use print::{document, graph_mermaid, table_markdown};
pub use state::{Effect, Phase, State};
pub use table::{TABLE, Transition, When};
