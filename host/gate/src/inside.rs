//! Which crossings the current thread is in (G8).

use std::cell::Cell;

/// Crossings nest at most this deep with their gate remembered; deeper ones count as crossings
/// of every gate, which errs towards refusing a drain.
const REMEMBERED: usize = 8;

/// Gate keys (addresses of slots) in the order of entry. Plain data without a destructor, so it
/// may be used while a thread ends.
struct Inside {
    gates: [Cell<usize>; REMEMBERED],
    used: Cell<usize>,
    beyond: Cell<usize>,
}

impl Inside {
    const fn nowhere() -> Inside {
        Inside { gates: [const { Cell::new(0) }; REMEMBERED], used: Cell::new(0), beyond: Cell::new(0) }
    }
}

#[cfg(not(loom))]
thread_local! {
    static INSIDE: Inside = const { Inside::nowhere() };
}
#[cfg(loom)]
loom::thread_local! {
    static INSIDE: Inside = Inside::nowhere();
}

/// Notes that this thread entered a crossing of the gate with this key.
#[inline]
pub(crate) fn enter(key: usize) {
    INSIDE.with(|inside| {
        let used = inside.used.get();
        if let Some(free) = inside.gates.get(used) {
            free.set(key);
            inside.used.set(used + 1);
        } else {
            inside.beyond.set(inside.beyond.get() + 1);
        }
    });
}

/// Notes that this thread left a crossing of the gate with this key.
#[inline]
pub(crate) fn leave(key: usize) {
    INSIDE.with(|inside| {
        // Crossings normally end last in, first out.
        let last = inside.used.get().wrapping_sub(1);
        if inside.beyond.get() == 0 && inside.gates.get(last).is_some_and(|gate| gate.get() == key) {
            inside.used.set(last);
        } else {
            leave_out_of_order(inside, key);
        }
    });
}

#[cold]
fn leave_out_of_order(inside: &Inside, key: usize) {
    let used = inside.used.get();
    if let Some(at) = inside.gates[..used].iter().rposition(|gate| gate.get() == key) {
        for later in at + 1..used {
            inside.gates[later - 1].set(inside.gates[later].get());
        }
        inside.used.set(used - 1);
    } else {
        inside.beyond.set(inside.beyond.get().saturating_sub(1));
    }
}

/// Whether this thread is inside a crossing of the gate with this key.
pub(crate) fn is_in(key: usize) -> bool {
    INSIDE.with(|inside| {
        let known = &inside.gates[..inside.used.get()];
        inside.beyond.get() > 0 || known.iter().any(|gate| gate.get() == key)
    })
}

/// Whether this thread is inside a crossing of any gate.
///
/// What might wait for a drain should not be done then; put it off to another thread.
#[must_use]
pub fn in_crossing() -> bool {
    INSIDE.with(|inside| inside.beyond.get() > 0 || inside.used.get() > 0)
}
