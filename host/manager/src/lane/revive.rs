//! A lane whose driver broke down gets another one, which adopts what the host holds: ring, ledger, posted buffers.
//!
//! What the dead instance was given and the device was not is *set aside* and given to the next one, one at a time: any of it may be what killed the first. What breaks
//! down two drivers is answered as failed. Responses that were being judged, and buffers that were being looked into, are set aside likewise (`unjudged`, `posted`).

use std::sync::Arc;

use cofferdam_device::Expected;
use cofferdam_device::words::REQUEST_WORDS;
use cofferdam_gate::HandleRefused;
use cofferdam_lifecycle::Phase;

use super::inside::{Inside, Sink};
use super::{Lane, Stop};
use crate::binding::Binding;
use crate::error::LaneFault;
use crate::ledger::Stage;
use crate::recovery::Next;

/// Drivers that one request, response or buffer may break down before it is given up.
pub(super) const POISON: u8 = 2;
/// Instances in a row that may fail to start.
const FALSE_STARTS: u32 = 3;

/// Whether a lane has a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    /// It has.
    Works,
    /// It broke down, and another one is to come.
    Waits,
    /// The device is away, and is to come back.
    Away,
    /// It broke down too often: what comes is answered with an error.
    Refuses,
    /// It broke down, and the binding leaves.
    Gone,
}

/// A request that a driver was given and did not take to the device.
pub(super) struct Aside {
    words: [u64; REQUEST_WORDS],
    request: Expected,
    /// Drivers that it may have broken down.
    crashes: u8,
}

impl Aside {
    pub(super) fn new(words: [u64; REQUEST_WORDS], request: Expected, crashes: u8) -> Aside {
        Aside { words, request, crashes }
    }

    pub(super) fn token(&self) -> u32 {
        self.request.token
    }

    /// Its token, and the drivers that it may have broken down.
    pub(super) fn suspicion(&self) -> (u32, u8) {
        (self.request.token, self.crashes)
    }
}

impl Inside {
    /// The driver broke down over the requests that are written down in the scratch, `crashes` of them so far.
    pub(super) fn set_aside(&mut self, crashes: u8) {
        let expected = std::mem::take(&mut self.scratch.expected);
        let (words, _) = self.scratch.requests.as_chunks::<REQUEST_WORDS>();
        let mut poison = Vec::new();
        for (request, words) in expected.iter().zip(words) {
            // What the driver had refused is answered, and what it had taken to the ring is the device's.
            if self.ledger.stage(request.token) != Some(Stage::Given) {
                continue;
            }
            if crashes >= POISON {
                poison.push(request.token);
            } else {
                self.aside.push_back(Aside { words: *words, request: *request, crashes });
            }
        }
        self.scratch.expected = expected;
        self.fail(&poison);
    }

    /// Why nothing is taken, if it is not.
    pub(super) fn why_not(&self) -> Option<Stop> {
        match self.health {
            // It may come back, or the binding is revoked.
            _ if self.handed_over => Some(Stop::Refused(HandleRefused::Held)),
            Health::Works if self.device_fault.is_none() && self.driver.is_some() => None,
            Health::Refuses => None,
            Health::Waits | Health::Away => Some(Stop::Refused(HandleRefused::Held)),
            Health::Works | Health::Gone => Some(Stop::Gone),
        }
    }

    /// Whether a driver is to come, or the device.
    pub(super) fn is_waiting(&self) -> bool {
        matches!(self.health, Health::Waits | Health::Away)
    }

    /// No driver will come: what was set aside is answered as failed.
    pub(super) fn give_up(&mut self) {
        self.health = Health::Gone;
        self.fail_aside();
    }

    fn fail_aside(&mut self) {
        let tokens: Vec<_> = std::mem::take(&mut self.aside).iter().map(|aside| aside.request.token).collect();
        self.fail(&tokens);
    }

    /// What comes is answered with errors from now on.
    pub(super) fn refuse(&mut self) {
        self.health = Health::Refuses;
        self.fail_aside();
    }

    /// Gives what was set aside to the driver, one at a time; what broke it down.
    pub(super) fn replay(&mut self) -> Option<LaneFault> {
        while let Some(Aside { words, request, crashes }) = self.aside.pop_front() {
            self.scratch.requests.clear();
            self.scratch.requests.extend(words);
            self.scratch.expected.clear();
            self.scratch.expected.push(request);
            if let Some(fault) = self.cross(crashes) {
                return Some(fault);
            }
        }
        None
    }
}

impl Lane {
    /// Driver or device broke the rules. Whether the lane has a driver that works again.
    pub(super) fn report(&self, inside: &mut Inside, fault: LaneFault) -> bool {
        let Some(binding) = self.binding.upgrade() else {
            inside.give_up();
            return false;
        };
        self.bring_up(inside, &binding, Some(fault))
    }

    /// Makes the driver that is missing, and has it look at what came meanwhile. Takes as long as guest calls may.
    pub(crate) fn revive(&self, binding: &Arc<Binding>) {
        let mut lease = self.lease();
        let inside = &mut *lease;
        match inside.health {
            Health::Waits | Health::Refuses => {
                self.bring_up(inside, binding, None);
                inside.ring_doorbell();
                self.wake_receiver();
                self.reap(inside, true, true, &mut Sink { me: None, out: &mut Vec::new() });
            }
            Health::Works => binding.revived(self.number),
            // The driver comes with the device.
            Health::Away | Health::Gone => {}
        }
        lease.wake_all();
    }

    /// After `fault`, or without one, another driver for this lane; whether it has one that works.
    pub(super) fn bring_up(&self, inside: &mut Inside, binding: &Arc<Binding>, mut fault: Option<LaneFault>) -> bool {
        let mut false_starts = 0;
        loop {
            let next = match &fault {
                None => Next::Revive,
                // Its ring is believed no more, and nothing is given to it.
                Some(LaneFault::Device(device)) if binding.device_broke(*device) => {
                    inside.health = Health::Away;
                    return false;
                }
                Some(device @ LaneFault::Device(_)) => {
                    binding.set_fault(device.clone());
                    Next::Leave
                }
                Some(LaneFault::Guest(_)) if false_starts >= FALSE_STARTS => binding.cannot_revive(),
                Some(LaneFault::Guest(guest)) => binding.broke_down(self.number, guest),
            };
            // The ladder drops what it finds; everything else is looked at first.
            let dead = if next == Next::Leave { None } else { inside.driver.take() };
            match next {
                Next::Revive => {}
                Next::Wait => inside.health = Health::Waits,
                Next::Refuse => inside.refuse(),
                Next::Leave => {
                    inside.give_up();
                    self.wake.signal();
                }
            }
            let has_crashed = fault.is_some();
            if next != Next::Revive {
                if has_crashed && next != Next::Leave {
                    binding.bury(self.number, dead);
                }
                return false;
            }
            fault = match binding.remake_lane(self) {
                Ok((driver, made_of)) => {
                    inside.made_of = made_of;
                    false_starts = 0;
                    inside.driver = Some(driver);
                    inside.health = Health::Works;
                    inside.replay()
                }
                Err(guest) => {
                    false_starts += 1;
                    Some(LaneFault::Guest(guest))
                }
            };
            // Behind its successor, for whom clients wait.
            if has_crashed || dead.is_some() {
                binding.bury(self.number, dead);
            }
            if fault.is_none() {
                binding.revived(self.number);
                return true;
            }
        }
    }

    /// The binding has failed: what comes is answered with errors, whether this lane's driver works or not.
    pub(crate) fn refuse(&self, binding: &Binding) {
        let mut lease = self.lease();
        // An operator may have tried again by now.
        if lease.health != Health::Gone && binding.phase() == Phase::Failed {
            lease.refuse();
        }
        lease.wake_all();
    }
}
