//! Where a binding can be, and what there is to do there.

use crate::event::EventKind;
use crate::named::named;

named! {
    /// Where a binding is, in the order of its life.
    pub enum State {
        /// It is being built.
        Loading = "loading",
        /// Clients are served.
        Serving = "serving",
        /// The driver broke down and another instance takes its place, or the device is away and is to come back; clients wait.
        Recovering = "recovering",
        /// The driver broke down too often, or the device did not come back. Clients get errors, and an operator may try again.
        Failed = "failed",
        /// Admission is being stopped.
        Closing = "closing",
        /// Handles are being revoked.
        Revoking = "revoking",
        /// What was admitted is being completed.
        Draining = "draining",
        /// Whoever waited for the drain gave up; the next `leave` goes on with it.
        Waiting = "waiting",
        /// Guests are being got out of their calls.
        Interrupting = "interrupting",
        /// The device is being made silent.
        Quiescing = "quiescing",
        /// The device is silent, and what it did not complete is being answered as failed.
        Answering = "answering",
        /// The device may still act, and what it was given is being answered to nobody.
        Abandoning = "abandoning",
        /// Ports are being taken away.
        DetachingPorts = "detaching-ports",
        /// Memory is being taken from the device and freed.
        Unmapping = "unmapping",
        /// Memory is being put aside, never to be used again.
        Retiring = "retiring",
        /// Instances and code are being dropped.
        Dropping = "dropping",
        /// Instances and code are being put aside until the process ends.
        Keeping = "keeping",
        /// The device is being given back, and what is left is being looked up.
        Releasing = "releasing",
        /// Over. The certificate is written.
        Detached = "detached",
    }
}

impl State {
    /// What `ls` shows.
    pub const fn phase(self) -> Phase {
        match self {
            State::Loading => Phase::Loading,
            State::Serving => Phase::Serving,
            State::Recovering => Phase::Recovering,
            State::Failed => Phase::Failed,
            State::Detached => Phase::Detached,
            _ => Phase::Draining,
        }
    }

    /// What there is to do here.
    pub const fn effect(self) -> Effect {
        match self {
            State::Loading => Effect::Build,
            State::Serving => Effect::Serve,
            State::Recovering => Effect::Recover,
            State::Failed => Effect::Refuse,
            State::Closing => Effect::CloseGate,
            State::Revoking => Effect::RevokeHandles,
            State::Draining => Effect::Drain,
            State::Waiting => Effect::Pause,
            State::Interrupting => Effect::Interrupt,
            State::Quiescing => Effect::Quiesce,
            State::Answering => Effect::Answer,
            State::Abandoning => Effect::Abandon,
            State::DetachingPorts => Effect::DetachPorts,
            State::Unmapping => Effect::Unmap,
            State::Retiring => Effect::Retire,
            State::Dropping => Effect::DropCode,
            State::Keeping => Effect::KeepCode,
            State::Releasing => Effect::Release,
            State::Detached => Effect::Nothing,
        }
    }

    /// Whether what becomes of requests and memory is decided. From then on nothing replaces the cause: what the clients were told and what is kept must agree with it.
    pub const fn is_settled(self) -> bool {
        matches!(
            self,
            State::Answering
                | State::Abandoning
                | State::DetachingPorts
                | State::Unmapping
                | State::Retiring
                | State::Dropping
                | State::Keeping
                | State::Releasing
                | State::Detached
        )
    }
}

named! {
    /// What an operator is shown of a [`State`].
    pub enum Phase {
        /// It is being built.
        Loading = "loading",
        /// Clients are served.
        Serving = "serving",
        /// Its driver is being replaced or its device waited for; clients wait.
        Recovering = "recovering",
        /// Its driver or its device is given up; clients get errors.
        Failed = "failed",
        /// It is on the ladder.
        Draining = "draining",
        /// Over.
        Detached = "detached",
    }
}

named! {
    /// What the manager does in a [`State`]. Each can be carried out again, whole or from the middle, and has a bound of its own; only [`Effect::Drain`] may end
    /// without an end ([`EventKind::GaveUp`]).
    pub enum Effect {
        /// Instances, memory, rings, then the device's start. No other effect is carried out while it is; it ends early when the state is no longer `loading`.
        Build = "build",
        /// Nothing but to watch for loss and faults.
        Serve = "serve",
        /// Instances are made that adopt rings and requests. Of a device that is away, silence is confirmed first; then it is waited for, set up as before, and given what it had
        /// not done. Newcomers wait meanwhile, within a bound.
        Recover = "recover",
        /// What the driver was given and the device was not is answered as failed, and so is what comes. What is on the rings is answered as the device completes it.
        Refuse = "refuse",
        /// Admission stops for good (G1). Sleepers in host calls wake.
        CloseGate = "close-gate",
        /// Handles answer `revoked`, their sleepers wake, clients lose what they had mapped.
        RevokeHandles = "revoke-handles",
        /// Operations and crossings leave, reaped for clients that do not poll (L3).
        Drain = "drain",
        /// Nothing, until somebody goes on.
        Pause = "pause",
        /// Guests are interrupted and host calls made for them cancelled; no call begins any more. It waits for them within a bound, and they may still be inside.
        Interrupt = "interrupt",
        /// What the device was never given is failed, nothing more is given to it, and it is made silent (L1).
        Quiesce = "quiesce",
        /// What the device completed is answered, the rest is failed. Ends with [`EventKind::NotSilent`] when a lane cannot be looked into.
        Answer = "answer",
        /// What the device completed is answered, the rest is struck off without an answer.
        Abandon = "abandon",
        /// Ports send what was answered, within 100 ms, and go (DESIGN section 5).
        DetachPorts = "detach-ports",
        /// Memory is taken from device and guests, and freed.
        Unmap = "unmap",
        /// Memory stays as it is, belongs to nobody, and is counted under `leaked`.
        Retire = "retire",
        /// Stores are dropped, then code. A store that a call is still in is kept and counted ([`EventKind::CodeKept`], G9).
        DropCode = "drop-code",
        /// Stores and code stay until the process ends, and nothing enters them.
        KeepCode = "keep-code",
        /// The device is given back, what is left is looked up (L7), the certificate is written.
        Release = "release",
        /// Nothing.
        Nothing = "nothing",
    }
}

impl Effect {
    /// What can come of it. Every one of these has a row for the effect's state, whatever the marks; `cut-short` only when forced.
    pub const fn results(self) -> &'static [EventKind] {
        match self {
            Effect::Build => &[EventKind::Loaded, EventKind::Leave],
            Effect::Serve => &[EventKind::Faulted, EventKind::DeviceAway, EventKind::Leave],
            Effect::Recover => &[EventKind::Recovered, EventKind::Exhausted, EventKind::Leave],
            Effect::Refuse => &[EventKind::Restarted, EventKind::Leave],
            Effect::Pause => &[EventKind::Leave],
            Effect::CloseGate => &[EventKind::GateClosed],
            Effect::RevokeHandles => &[EventKind::HandlesRevoked],
            Effect::Drain => &[
                EventKind::Drained,
                EventKind::DeviceLost,
                EventKind::DeviceBroken,
                EventKind::CutShort,
                EventKind::GaveUp,
            ],
            Effect::Interrupt => &[EventKind::Interrupted],
            Effect::Quiesce => &[EventKind::Silent, EventKind::NotSilent],
            Effect::Answer => &[EventKind::Answered, EventKind::NotSilent],
            Effect::Abandon => &[EventKind::Abandoned],
            Effect::DetachPorts => &[EventKind::PortsDetached],
            Effect::Unmap => &[EventKind::Unmapped],
            Effect::Retire => &[EventKind::Retired],
            Effect::DropCode => &[EventKind::CodeDropped, EventKind::CodeKept],
            Effect::KeepCode => &[EventKind::CodeKept],
            Effect::Release => &[EventKind::Released],
            Effect::Nothing => &[],
        }
    }
}
