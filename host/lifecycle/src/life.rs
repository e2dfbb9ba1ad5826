//! One binding's place in the table, and what it remembers.

use std::error::Error;
use std::fmt;

use crate::event::{Cause, Event, EventKind};
use crate::named::named;
use crate::state::{Effect, Phase, State};
use crate::table::{TABLE, Transition, When};

named! {
    /// How it ended.
    pub enum Outcome {
        /// Asked for by an operator, everything answered.
        Unloaded = "unloaded",
        /// Asked for by an operator, with force.
        Forced = "forced",
        /// The device went away first.
        Removed = "removed",
        /// The driver or the device broke the rules.
        Failed = "failed",
        /// A load that did not succeed was rolled back.
        RolledBack = "rolled-back",
        /// The daemon stopped.
        Shutdown = "shutdown",
    }
}

/// What a binding remembers beside its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Marks {
    /// Why it leaves.
    pub cause: Option<Cause>,
    /// Whether force was asked for.
    pub forced: bool,
    /// Whether the device is silent; `None` until that was asked.
    pub silent: Option<bool>,
    /// Whether it was loaded `--pinned`.
    pub pinned: bool,
}

impl Marks {
    /// What they are after `event` in `state`.
    fn after(mut self, state: State, event: Event) -> Marks {
        match event {
            Event::Leave { cause, force } => {
                // Too late to cut anything short: it would only change what the end is called.
                self.forced |= force && !state.is_settled();
                self.because(state, cause);
            }
            Event::DeviceLost => self.because(state, Cause::Removed),
            Event::DeviceBroken => self.because(state, Cause::Fault),
            Event::Silent => self.silent = Some(true),
            Event::NotSilent => self.silent = Some(false),
            _ => {}
        }
        self
    }

    fn because(&mut self, state: State, cause: Cause) {
        match self.cause {
            None => self.cause = Some(cause),
            Some(earlier) if !state.is_settled() && cause.overtakes(earlier) => self.cause = Some(cause),
            Some(_) => {}
        }
    }
}

/// One binding's life: a state of the [`TABLE`] and its marks. [`Life::apply`] is the only way to change it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Life {
    state: State,
    marks: Marks,
}

/// An event that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where the binding was.
    pub from: State,
    /// Where it is; the same when the event was only remembered.
    pub to: State,
    /// Why it leaves, as it is now.
    pub cause: Option<Cause>,
}

/// An event that was not taken. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// A pinned binding leaves only when the daemon stops. The caller's mistake.
    Pinned,
    /// There is no row for it. A `loaded` after the load was called off, a `leave` after the end; anything else is the manager's mistake.
    Illegal {
        /// Where the binding is.
        state: State,
        /// What does not happen there.
        event: EventKind,
    },
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refused::Pinned => f.write_str("the binding is pinned: it leaves only when the daemon stops"),
            Refused::Illegal { state, event } => write!(f, "'{event}' does not happen to a binding that is {state}"),
        }
    }
}

impl Error for Refused {}

impl Life {
    /// A binding that is about to be built.
    pub const fn new(pinned: bool) -> Life {
        Life { state: State::Loading, marks: Marks { cause: None, forced: false, silent: None, pinned } }
    }

    /// Where it is.
    pub const fn state(&self) -> State {
        self.state
    }

    /// What `ls` shows.
    pub const fn phase(&self) -> Phase {
        self.state.phase()
    }

    /// What the manager has to do now. It may have been done already, by a thread that died before it could say so.
    pub const fn effect(&self) -> Effect {
        self.state.effect()
    }

    /// Why it leaves.
    pub const fn cause(&self) -> Option<Cause> {
        self.marks.cause
    }

    /// Whether the drain may be cut short.
    pub const fn forced(&self) -> bool {
        self.marks.forced
    }

    /// Whether the device is silent; `None` until that was asked.
    pub const fn silent(&self) -> Option<bool> {
        self.marks.silent
    }

    /// Whether it was loaded `--pinned`.
    pub const fn pinned(&self) -> bool {
        self.marks.pinned
    }

    /// All marks.
    pub const fn marks(&self) -> Marks {
        self.marks
    }

    /// Takes an event.
    ///
    /// # Errors
    /// [`Refused`]; then nothing has changed.
    pub fn apply(&mut self, event: Event) -> Result<Step, Refused> {
        self.apply_by(TABLE, event)
    }

    /// The same by another table, so that tests can show that a wrong one would be noticed.
    #[doc(hidden)]
    pub fn apply_by(&mut self, table: &[Transition], event: Event) -> Result<Step, Refused> {
        let (from, marks) = (self.state, self.marks.after(self.state, event));
        let mut refused = Refused::Illegal { state: from, event: event.kind() };
        for row in table.iter().filter(|row| row.from == from && row.event == event.kind()) {
            if row.when.holds(&marks) {
                (self.state, self.marks) = (row.to, marks);
                return Ok(Step { from, to: row.to, cause: marks.cause });
            }
            if row.when == When::MayLeave {
                refused = Refused::Pinned;
            }
        }
        Err(refused)
    }

    /// How it ended; `None` before the end.
    pub const fn outcome(&self) -> Option<Outcome> {
        if !matches!(self.state, State::Detached) {
            return None;
        }
        Some(match self.marks.cause {
            Some(Cause::Removed) => Outcome::Removed,
            Some(Cause::Fault) => Outcome::Failed,
            Some(Cause::LoadFailed) => Outcome::RolledBack,
            Some(Cause::Shutdown) => Outcome::Shutdown,
            Some(Cause::Unload) | None if self.marks.forced => Outcome::Forced,
            Some(Cause::Unload) | None => Outcome::Unloaded,
        })
    }
}
