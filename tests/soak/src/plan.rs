//! What a cycle does, drawn from the seed and the cycle's number alone, so that the two replay it.

use crate::backend::Kind;

/// How the binding leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `unload`.
    Unload,
    /// `unload --force`.
    Force,
    /// One handle is revoked while the other clients go on, then `unload`.
    Revoke,
    /// The backend's process is killed.
    Killed,
    /// The driver is told to fail in this way (`tests/guests/hostile`, `COMMANDS`).
    Trap(usize),
    /// A manager of its own is shut down.
    Shutdown,
    /// A manager of its own is dropped.
    LastUser,
    /// The load fails, with this of [`BAD_DRIVERS`].
    FailedLoad(usize),
    /// The device hangs, an unload gives up, the device goes on, and so does a second unload.
    GaveUp,
    /// The port is detached first, then `unload`.
    PortFirst,
    /// Two unload at once.
    TwoUnloaders,
}

/// Drivers that do not get through a load, each at another step.
pub const BAD_DRIVERS: [&str; 10] = [
    "not-wasm",
    "unknown-import",
    "not-mine",
    "trap-attach",
    "never-negotiates",
    "too-many-queues",
    "trap-properties",
    "bad-block-size",
    "trap-start",
    "refuse-start",
];

/// The ways to fail of `on-command` that end at once, by their place in its list: trap, no-words, trap-complete.
const QUICK_COMMANDS: [usize; 3] = [0, 3, TRAP_COMPLETE];
/// The one in `complete`. It needs a device that fails: the simulated one.
pub const TRAP_COMPLETE: usize = 4;
/// The one that takes until the deadline of a call: loop.
const SLOW_COMMAND: usize = 1;

impl Way {
    /// For tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Way::Unload => "unload",
            Way::Force => "force",
            Way::Revoke => "revoke",
            Way::Killed => "killed",
            Way::Trap(_) => "trap",
            Way::Shutdown => "shutdown",
            Way::LastUser => "last-user",
            Way::FailedLoad(_) => "failed-load",
            Way::GaveUp => "gave-up",
            Way::PortFirst => "port-first",
            Way::TwoUnloaders => "two-unloaders",
        }
    }

    /// Whether the cycle needs a manager that ends with it.
    #[must_use]
    pub fn has_own_manager(self) -> bool {
        matches!(self, Way::Shutdown | Way::LastUser)
    }

    fn draw(random: &mut fastrand::Rng) -> Way {
        match random.u32(..100) {
            0..22 => Way::Unload,
            22..34 => Way::Force,
            34..46 => Way::Revoke,
            46..55 => Way::Killed,
            // One in eight of them takes until its deadline.
            55..64 if random.u32(..8) == 0 => Way::Trap(SLOW_COMMAND),
            55..64 => Way::Trap(QUICK_COMMANDS[random.usize(..QUICK_COMMANDS.len())]),
            64..70 => Way::Shutdown,
            70..73 => Way::LastUser,
            73..83 => Way::FailedLoad(random.usize(..BAD_DRIVERS.len())),
            83..88 => Way::GaveUp,
            88..94 => Way::PortFirst,
            _ => Way::TwoUnloaders,
        }
    }
}

/// One cycle.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How it ends.
    pub way: Way,
    /// The device.
    pub backend: Kind,
    /// Requests that a client in this process has in flight when the binding leaves; 0: there is no such client.
    pub in_process: usize,
    /// The same of an NBD client.
    pub nbd: usize,
    /// Another handle has memory mapped and a window of it in use.
    pub mapped: bool,
    /// That handle is closed before the binding leaves; else it stays open and never polls.
    pub close_first: bool,
    /// Seed of what the clients do.
    pub seed: u64,
}

impl Plan {
    /// Draws cycle `cycle` of `seed`.
    #[must_use]
    pub fn draw(seed: u64, cycle: u64) -> Plan {
        // Neighbouring numbers give unlike generators: each seed is itself drawn.
        let mut random = fastrand::Rng::with_seed(fastrand::Rng::with_seed(seed).u64(..) ^ cycle);
        let mut random = random.fork();
        let way = Way::draw(&mut random);
        let depth = |random: &mut fastrand::Rng| if random.u32(..3) == 0 { 0 } else { 1 << random.u32(..6) };
        let mut plan = Plan {
            way,
            backend: if cycle % 10 == 9 { Kind::Qemu } else { Kind::Sim },
            in_process: depth(&mut random),
            nbd: depth(&mut random),
            mapped: random.u32(..4) == 0,
            close_first: random.bool(),
            seed: random.u64(..),
        };
        match way {
            // Something has to be in flight for these to mean what they say.
            Way::Revoke | Way::GaveUp => plan.in_process = plan.in_process.max(4),
            Way::PortFirst => plan.nbd = plan.nbd.max(4),
            Way::Trap(TRAP_COMPLETE) if plan.backend == Kind::Qemu => plan.way = Way::Trap(QUICK_COMMANDS[0]),
            _ => {}
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn a_thousand_cycles_have_every_way_out_on_both_backends() {
        let mut seen = HashMap::new();
        for cycle in 0..1000 {
            let plan = Plan::draw(4, cycle);
            *seen.entry((plan.way.name(), plan.backend.name())).or_insert(0) += 1;
        }
        assert_eq!(seen.len(), 22, "{seen:?}");
        let bad: std::collections::HashSet<_> = (0..1000)
            .filter_map(|cycle| match Plan::draw(4, cycle).way {
                Way::FailedLoad(which) => Some(which),
                _ => None,
            })
            .collect();
        assert_eq!(bad.len(), BAD_DRIVERS.len());
    }

    #[test]
    fn a_seed_and_a_number_give_the_same_cycle_again() {
        let text = |seed, cycle| format!("{:?}", Plan::draw(seed, cycle));
        assert_eq!(text(1, 77), text(1, 77));
        assert_ne!(text(1, 77), text(2, 77));
        assert_ne!(text(1, 77), text(1, 78));
    }
}
