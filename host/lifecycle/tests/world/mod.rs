//! A world for a binding to live in: handles, requests, one lane, a port, memory, code and a device, each small enough to be walked through completely.
//!
//! ```text
//! client -> handle -> given -> [crossing] -> published -> device -> answered
//! ```
//!
//! Effects act on it ([`effects`]) and say what came of it; everything else moves by itself ([`moves`]). Time is not in it: what is slow is what has not moved yet.
//! What must never happen is noticed where it happens or, for a situation, by [`claims`].

#![allow(dead_code, reason = "each test program uses its part")]

pub(crate) mod claims;
pub(crate) mod effects;
pub(crate) mod moves;

use cofferdam_lifecycle::{Cause, Event, Life, TABLE, Transition};

/// How far the load has come. The loading thread owns all of it until it lets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Built {
    Nothing,
    Claimed,
    Instantiated,
    Mapped,
    Started,
}

/// A call in the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Call {
    None,
    /// Leaves by itself.
    Running,
    /// In a loop, or asleep in a host call: leaves when it is interrupted.
    Looping,
    /// Does not hear of the interruption. It may still leave by itself.
    Stuck,
}

/// The device, and who runs it. A slow one is a healthy one that has not moved yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Device {
    Healthy,
    /// Completes nothing, and does not answer when it is told to stop.
    Hung,
    /// Its process is dead, or it was pulled out.
    Gone,
    /// The connection is lost, and whoever runs it goes on with what it was given.
    CutOff,
    /// Breaks its rings' rules.
    Broken,
}

/// DMA memory: rings and buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Memory {
    None,
    Mapped,
    Freed,
    Retired,
}

/// Instances and machine code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Code {
    None,
    Live,
    Dropped,
    Kept,
}

/// How much of it there can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Size {
    pub(crate) handles: u8,
    pub(crate) requests: u8,
}

/// Everything that there is of one binding.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) size: Size,
    /// The loading thread is at it.
    pub(crate) loading: bool,
    pub(crate) built: Built,
    pub(crate) claimed: bool,
    pub(crate) gate_open: bool,
    pub(crate) handles: u8,
    /// Clients asleep in a wait on their handle.
    pub(crate) sleepers: u8,
    /// Clients that have buffers mapped.
    pub(crate) maps: u8,
    pub(crate) port: bool,
    /// Admitted, not given to the device.
    pub(crate) given: u8,
    /// On the ring.
    pub(crate) published: u8,
    /// Struck off unanswered while on the ring.
    pub(crate) abandoned: bool,
    pub(crate) call: Call,
    /// The driver has broken down, and none has taken its place.
    pub(crate) down: bool,
    /// The device was lost or broke a rule, and is to be brought back.
    pub(crate) away: bool,
    /// No call begins any more.
    pub(crate) killed: bool,
    /// Nothing is put on the ring any more.
    pub(crate) withdrawn: bool,
    pub(crate) device: Device,
    /// It was stopped, and that was confirmed.
    pub(crate) stopped: bool,
    pub(crate) memory: Memory,
    pub(crate) code: Code,
}

impl World {
    pub(crate) fn new(size: Size) -> World {
        World {
            size,
            loading: true,
            built: Built::Nothing,
            claimed: false,
            gate_open: true,
            handles: 0,
            sleepers: 0,
            maps: 0,
            port: false,
            given: 0,
            published: 0,
            abandoned: false,
            call: Call::None,
            down: false,
            away: false,
            killed: false,
            withdrawn: false,
            device: Device::Healthy,
            stopped: false,
            memory: Memory::None,
            code: Code::None,
        }
    }

    /// Whether memory may still be written or a request still have an effect (L1).
    pub(crate) fn device_may_act(&self) -> bool {
        self.built == Built::Started
            && !self.stopped
            && match self.device {
                Device::Gone => false,
                Device::CutOff => self.published > 0 || self.abandoned,
                Device::Healthy | Device::Hung | Device::Broken => true,
            }
    }

    pub(crate) fn in_flight(&self) -> bool {
        self.given > 0 || self.published > 0 || self.call != Call::None
    }
}

/// A binding's life in its world.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Situation {
    pub(crate) life: Life,
    pub(crate) world: World,
}

/// Which table and how large a world.
#[derive(Clone, Copy)]
pub(crate) struct Setting<'a> {
    pub(crate) table: &'a [Transition],
    pub(crate) size: Size,
}

impl Setting<'static> {
    pub(crate) fn true_table(size: Size) -> Setting<'static> {
        Setting { table: TABLE, size }
    }
}

/// What must never happen has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Broken(pub(crate) String);

/// One move and where it leads.
pub(crate) struct Move {
    pub(crate) name: String,
    /// What the life was told.
    pub(crate) event: Option<Event>,
    pub(crate) next: Result<Situation, Broken>,
}

impl Situation {
    pub(crate) fn new(pinned: bool, setting: Setting<'_>) -> Situation {
        Situation { life: Life::new(pinned), world: World::new(setting.size) }
    }

    /// The same life in another world.
    pub(crate) fn with(&self, world: World) -> Situation {
        Situation { life: self.life.clone(), world }
    }

    pub(crate) fn apply(&self, setting: Setting<'_>, event: Event) -> Result<Situation, Broken> {
        let mut next = self.clone();
        next.life.apply_by(setting.table, event).map_err(|refused| Broken(format!("refused: {refused}")))?;
        Ok(next)
    }

    /// The leave that nothing may refuse.
    pub(crate) fn leave_by_force(&self, setting: Setting<'_>) -> Result<Situation, Broken> {
        self.apply(setting, Event::Leave { cause: Cause::Shutdown, force: true })
    }
}
