//! What happens to a binding, and why it leaves.

use crate::named::named;

named! {
    /// Why a binding leaves.
    pub enum Cause {
        /// An operator asked.
        Unload = "unload",
        /// The device went away.
        Removed = "removed",
        /// Driver or device broke the rules.
        Fault = "fault",
        /// The load did not succeed, or was called off.
        LoadFailed = "load-failed",
        /// The daemon stops.
        Shutdown = "shutdown",
    }
}

impl Cause {
    /// Whether it replaces `earlier` as the reason: what has happened to a binding is more than what somebody wanted of it. Among things that have happened the first
    /// one counts, and so it does among wishes.
    pub const fn overtakes(self, earlier: Cause) -> bool {
        matches!(earlier, Cause::Unload | Cause::Shutdown)
            && matches!(self, Cause::Removed | Cause::Fault | Cause::LoadFailed)
    }
}

named! {
    /// An [`Event`] without what it carries: the column of the table.
    pub enum EventKind {
        /// See [`Event::Loaded`].
        Loaded = "loaded",
        /// See [`Event::Faulted`].
        Faulted = "faulted",
        /// See [`Event::DeviceAway`].
        DeviceAway = "device-away",
        /// See [`Event::Recovered`].
        Recovered = "recovered",
        /// See [`Event::Exhausted`].
        Exhausted = "exhausted",
        /// See [`Event::Restarted`].
        Restarted = "restarted",
        /// See [`Event::Leave`].
        Leave = "leave",
        /// See [`Event::GateClosed`].
        GateClosed = "gate-closed",
        /// See [`Event::HandlesRevoked`].
        HandlesRevoked = "handles-revoked",
        /// See [`Event::Drained`].
        Drained = "drained",
        /// See [`Event::DeviceLost`].
        DeviceLost = "device-lost",
        /// See [`Event::DeviceBroken`].
        DeviceBroken = "device-broken",
        /// See [`Event::CutShort`].
        CutShort = "cut-short",
        /// See [`Event::GaveUp`].
        GaveUp = "gave-up",
        /// See [`Event::Interrupted`].
        Interrupted = "interrupted",
        /// See [`Event::Silent`].
        Silent = "silent",
        /// See [`Event::NotSilent`].
        NotSilent = "not-silent",
        /// See [`Event::Answered`].
        Answered = "answered",
        /// See [`Event::Abandoned`].
        Abandoned = "abandoned",
        /// See [`Event::PortsDetached`].
        PortsDetached = "ports-detached",
        /// See [`Event::Unmapped`].
        Unmapped = "unmapped",
        /// See [`Event::Retired`].
        Retired = "retired",
        /// See [`Event::CodeDropped`].
        CodeDropped = "code-dropped",
        /// See [`Event::CodeKept`].
        CodeKept = "code-kept",
        /// See [`Event::Released`].
        Released = "released",
    }
}

/// What happens to a binding: an entry to the ladder, or what came of an effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The binding is built, and the device runs.
    Loaded,
    /// The driver broke down, and may be replaced.
    Faulted,
    /// The device was lost or broke its rings' rules, and is to be brought back.
    DeviceAway,
    /// Every lane has a driver again, and the device is there.
    Recovered,
    /// The driver broke down too often, or the device did not come back.
    Exhausted,
    /// An operator wants another try.
    Restarted,
    /// An entry to the ladder. While one is under way it only adds to the marks, and goes on where somebody gave up.
    Leave {
        /// Why.
        cause: Cause,
        /// Whether the drain may be cut short. It stays asked for.
        force: bool,
    },
    /// Nothing is admitted any more.
    GateClosed,
    /// No handle answers anything but `revoked`.
    HandlesRevoked,
    /// No operation is in flight and no call is in the driver.
    Drained,
    /// The device is gone: what is in flight cannot be completed.
    DeviceLost,
    /// The device broke its rings' rules: nothing that it says is believed any more.
    DeviceBroken,
    /// The patience of a forced run is over.
    CutShort,
    /// The patience of the caller is over.
    GaveUp,
    /// Guests are out of their calls, or had their bound.
    Interrupted,
    /// The device does no more DMA and has no more effect on the medium (L1).
    Silent,
    /// Of the device, or of a lane, that could not be shown.
    NotSilent,
    /// Every request has its answer.
    Answered,
    /// Every request has its answer or was struck off.
    Abandoned,
    /// No port is left.
    PortsDetached,
    /// No memory is left.
    Unmapped,
    /// The memory was put aside.
    Retired,
    /// No code is left.
    CodeDropped,
    /// Code stays, counted: the binding is pinned, or a call is still in it.
    CodeKept,
    /// The device is given back.
    Released,
}

impl Event {
    /// Which row it looks for.
    pub const fn kind(self) -> EventKind {
        match self {
            Event::Loaded => EventKind::Loaded,
            Event::Faulted => EventKind::Faulted,
            Event::DeviceAway => EventKind::DeviceAway,
            Event::Recovered => EventKind::Recovered,
            Event::Exhausted => EventKind::Exhausted,
            Event::Restarted => EventKind::Restarted,
            Event::Leave { .. } => EventKind::Leave,
            Event::GateClosed => EventKind::GateClosed,
            Event::HandlesRevoked => EventKind::HandlesRevoked,
            Event::Drained => EventKind::Drained,
            Event::DeviceLost => EventKind::DeviceLost,
            Event::DeviceBroken => EventKind::DeviceBroken,
            Event::CutShort => EventKind::CutShort,
            Event::GaveUp => EventKind::GaveUp,
            Event::Interrupted => EventKind::Interrupted,
            Event::Silent => EventKind::Silent,
            Event::NotSilent => EventKind::NotSilent,
            Event::Answered => EventKind::Answered,
            Event::Abandoned => EventKind::Abandoned,
            Event::PortsDetached => EventKind::PortsDetached,
            Event::Unmapped => EventKind::Unmapped,
            Event::Retired => EventKind::Retired,
            Event::CodeDropped => EventKind::CodeDropped,
            Event::CodeKept => EventKind::CodeKept,
            Event::Released => EventKind::Released,
        }
    }
}
