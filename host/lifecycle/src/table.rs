//! The table: the only place where it is decided what comes next.

use crate::event::{Cause, EventKind as E};
use crate::life::Marks;
use crate::named::named;
use crate::state::State as S;

named! {
    /// On what a row depends besides state and event. It looks at the marks as the event leaves them.
    pub enum When {
        /// On nothing.
        Always = "",
        /// Force was asked for.
        Forced = "forced",
        /// It is not the unload of a pinned binding. Where this fails the refusal is [`crate::Refused::Pinned`].
        MayLeave = "unless pinned and asked to unload",
        /// Pinned, and a device that went away or a broken rule is the cause: memory and code stay until the process ends.
        Pinned = "to stay",
        /// The contrary of [`When::Pinned`].
        NotPinned = "not to stay",
        /// The memory can be freed: the device is silent and nothing is pinned to it.
        SilentMemory = "silent and not to stay",
        /// The contrary of [`When::SilentMemory`]. Silence that was never asked about is none.
        RetiredMemory = "not silent, or to stay",
    }
}

impl When {
    /// Whether a row applies.
    pub const fn holds(self, marks: &Marks) -> bool {
        let stays = marks.pinned && matches!(marks.cause, Some(Cause::Removed | Cause::Fault));
        let free = matches!(marks.silent, Some(true)) && !stays;
        match self {
            When::Always => true,
            When::Forced => marks.forced,
            When::MayLeave => !(marks.pinned && matches!(marks.cause, Some(Cause::Unload))),
            When::Pinned => stays,
            When::NotPinned => !stays,
            When::SilentMemory => free,
            When::RetiredMemory => !free,
        }
    }
}

/// One row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// In this state
    pub from: S,
    /// this event
    pub event: E,
    /// under this condition
    pub when: When,
    /// leads here.
    pub to: S,
}

const fn row(from: S, event: E, when: When, to: S) -> Transition {
    Transition { from, event, when, to }
}

/// Every transition there is. What has no row is refused and changes nothing.
pub const TABLE: &[Transition] = &[
    // In.
    row(S::Loading, E::Loaded, When::Always, S::Serving),
    // A driver that breaks down, a device that is to come back.
    row(S::Serving, E::Faulted, When::Always, S::Recovering),
    row(S::Serving, E::DeviceAway, When::Always, S::Recovering),
    row(S::Recovering, E::Recovered, When::Always, S::Serving),
    row(S::Recovering, E::Exhausted, When::Always, S::Failed),
    row(S::Failed, E::Restarted, When::Always, S::Recovering),
    // The entries.
    row(S::Loading, E::Leave, When::MayLeave, S::Closing),
    row(S::Serving, E::Leave, When::MayLeave, S::Closing),
    row(S::Recovering, E::Leave, When::MayLeave, S::Closing),
    row(S::Failed, E::Leave, When::MayLeave, S::Closing),
    row(S::Waiting, E::Leave, When::Always, S::Draining),
    // The ladder.
    row(S::Closing, E::GateClosed, When::Always, S::Revoking),
    row(S::Revoking, E::HandlesRevoked, When::Always, S::Draining),
    row(S::Draining, E::Drained, When::Always, S::Quiescing),
    row(S::Draining, E::DeviceLost, When::Always, S::Interrupting),
    row(S::Draining, E::DeviceBroken, When::Always, S::Interrupting),
    row(S::Draining, E::CutShort, When::Forced, S::Interrupting),
    row(S::Draining, E::GaveUp, When::Always, S::Waiting),
    row(S::Interrupting, E::Interrupted, When::Always, S::Quiescing),
    row(S::Quiescing, E::Silent, When::Always, S::Answering),
    row(S::Quiescing, E::NotSilent, When::Always, S::Abandoning),
    row(S::Answering, E::Answered, When::Always, S::DetachingPorts),
    row(S::Answering, E::NotSilent, When::Always, S::Abandoning),
    row(S::Abandoning, E::Abandoned, When::Always, S::DetachingPorts),
    row(S::DetachingPorts, E::PortsDetached, When::SilentMemory, S::Unmapping),
    row(S::DetachingPorts, E::PortsDetached, When::RetiredMemory, S::Retiring),
    row(S::Unmapping, E::Unmapped, When::Always, S::Dropping),
    row(S::Retiring, E::Retired, When::NotPinned, S::Dropping),
    row(S::Retiring, E::Retired, When::Pinned, S::Keeping),
    row(S::Dropping, E::CodeDropped, When::Always, S::Releasing),
    row(S::Dropping, E::CodeKept, When::Always, S::Releasing),
    row(S::Keeping, E::CodeKept, When::Always, S::Releasing),
    row(S::Releasing, E::Released, When::Always, S::Detached),
    // Who asks while it is under way: heard, in the marks.
    row(S::Closing, E::Leave, When::Always, S::Closing),
    row(S::Revoking, E::Leave, When::Always, S::Revoking),
    row(S::Draining, E::Leave, When::Always, S::Draining),
    row(S::Interrupting, E::Leave, When::Always, S::Interrupting),
    row(S::Quiescing, E::Leave, When::Always, S::Quiescing),
    row(S::Answering, E::Leave, When::Always, S::Answering),
    row(S::Abandoning, E::Leave, When::Always, S::Abandoning),
    row(S::DetachingPorts, E::Leave, When::Always, S::DetachingPorts),
    row(S::Unmapping, E::Leave, When::Always, S::Unmapping),
    row(S::Retiring, E::Leave, When::Always, S::Retiring),
    row(S::Dropping, E::Leave, When::Always, S::Dropping),
    row(S::Keeping, E::Leave, When::Always, S::Keeping),
    row(S::Releasing, E::Leave, When::Always, S::Releasing),
];
