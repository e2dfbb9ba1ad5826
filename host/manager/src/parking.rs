//! The threads of a port while its clients are on their way to another process ([`crate::Port::export`]).
//!
//! ```text
//! port      gather ----------------------------------------> what each thread said ... release
//! thread    sees that it is wanted -> comes to a standstill -> stands ---------------> goes on, or ends without a word
//! ```
//!
//! A thread that stands touches neither its binding nor a descriptor: whatever it has stays as it is, for whichever side goes on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// See the module. `T` is what a thread says of what it has.
#[derive(Debug)]
pub struct Parking<T> {
    /// Whether threads are to come to a standstill, for a look on the way.
    wanted: AtomicBool,
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    order: Order,
    /// How often threads were wanted.
    round: u64,
    /// Whoever gathers them is to give up.
    cancelled: bool,
    said: Vec<T>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Go,
    Stand,
    End,
}

impl<T> Parking<T> {
    /// Of a port whose threads run, or are to stand from the start because it was adopted.
    #[must_use]
    pub fn new(stands: bool) -> Parking<T> {
        let order = if stands { Order::Stand } else { Order::Go };
        let state = Mutex::new(State { order, round: 0, cancelled: false, said: Vec::new() });
        Parking { wanted: AtomicBool::new(stands), state, changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread's look: whether it is to come to a standstill and then [`Parking::stand`]. Whoever wants it sees to it that the thread wakes.
    #[inline]
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// The thread stands, having said what it has, until it is told what next: true, go on; false, end, and leave everything as it is.
    #[must_use = "a thread that is to end has nothing any more"]
    pub fn stand(&self, said: T) -> bool {
        let mut state = self.lock();
        if state.order == Order::Stand {
            state.said.push(said);
            self.changed.notify_all();
        }
        // Wanted once more before it could go on, it goes on all the same, to say what it has now.
        let round = state.round;
        while state.order == Order::Stand && state.round == round {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.order != Order::End
    }

    /// The port's: wants all its threads to stand, wakes them with `wake`, and waits until `count` of them do. `None` if they did not by `until`, or it was cancelled; then
    /// [`Parking::release`] has them go on, as after a success.
    pub fn gather(&self, count: usize, until: Instant, wake: impl FnOnce()) -> Option<Vec<T>> {
        {
            let mut state = self.lock();
            state.order = Order::Stand;
            state.round += 1;
            state.said.clear();
            self.changed.notify_all();
        }
        self.wanted.store(true, Ordering::Release);
        wake();
        let mut state = self.lock();
        while state.said.len() < count {
            if state.cancelled {
                return None;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Some(std::mem::take(&mut state.said))
    }

    /// Has whoever gathers, or is going to, give up: until [`Parking::release`].
    pub fn cancel(&self) {
        self.lock().cancelled = true;
        self.changed.notify_all();
    }

    /// All of them go on, or end without a word.
    pub fn release(&self, go_on: bool) {
        // Before the order: a thread that goes on does not come back for the old one. One that is to end may stand first, to be told so.
        self.wanted.store(!go_on, Ordering::Release);
        let stale = {
            let mut state = self.lock();
            state.order = if go_on { Order::Go } else { Order::End };
            state.cancelled = false;
            std::mem::take(&mut state.said)
        };
        self.changed.notify_all();
        // What nobody asked for has descriptors of its own.
        drop(stale);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;

    use super::*;

    #[test]
    fn threads_stand_when_all_of_them_do_and_go_on_or_end_as_they_are_told() {
        let parking = Arc::new(Parking::new(false));
        let turns = Arc::new(AtomicU32::new(0));
        let threads: Vec<_> = (0..3)
            .map(|number| {
                let (parking, turns) = (Arc::clone(&parking), Arc::clone(&turns));
                std::thread::spawn(move || {
                    loop {
                        turns.fetch_add(1, Ordering::SeqCst);
                        if parking.is_wanted() && !parking.stand(number) {
                            return;
                        }
                        std::thread::yield_now();
                    }
                })
            })
            .collect();
        let soon = || Instant::now() + Duration::from_secs(20);
        for _ in 0..100 {
            let mut said = parking.gather(3, soon(), || {}).unwrap();
            said.sort_unstable();
            assert_eq!(said, [0, 1, 2]);
            let before = turns.load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(turns.load(Ordering::SeqCst), before, "they stand");
            parking.release(true);
        }
        // One that does not come: the others go on all the same.
        assert_eq!(parking.gather(4, Instant::now(), || {}), None);
        parking.release(true);
        // One that is called off beforehand does not wait.
        parking.cancel();
        assert_eq!(parking.gather(4, soon(), || {}), None);
        parking.release(true);
        parking.gather(3, soon(), || {}).unwrap();
        parking.release(false);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn threads_of_an_adopted_port_stand_from_the_start() {
        let parking = Arc::new(Parking::new(true));
        let theirs = Arc::clone(&parking);
        let thread = std::thread::spawn(move || (theirs.is_wanted(), theirs.stand(())));
        parking.release(true);
        assert!(thread.join().unwrap().1);
        assert!(!parking.is_wanted());
    }
}
