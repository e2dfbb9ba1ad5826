//! The last close of a function, which takes the kernel over a minute when it resets one that is gone.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::Address;
use crate::bounded::Bounded;

/// Closes `held` and then drops `then`, which is for after the kernel has let the function go. Waits for the kernel for `within`; where it is slower, both happen later, on a thread
/// that ends with them.
pub(super) fn close(address: Address, within: Duration, held: impl Send + 'static, then: Box<dyn Send>) {
    // Whoever lets go of this last drops what is in it.
    let heir = Arc::new(Mutex::new(None));
    let closers = Arc::clone(&heir);
    // A `Bounded` of its own, for one that resets may still be running.
    let closed = Bounded::default().run("vfio-close", Instant::now() + within, move || {
        drop(held);
        drop(closers);
    });
    if closed.is_err() {
        tracing::warn!(%address, "the kernel is slow to let the function go; it is closed, and goes back, when it does");
        *heir.lock().unwrap_or_else(PoisonError::into_inner) = Some(then);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};

    use super::*;

    const ENOUGH: Duration = Duration::from_secs(20);

    /// Ends when it is told to, as the kernel does.
    struct Held(Receiver<()>);

    impl Drop for Held {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    fn set() -> (Sender<()>, Held, Receiver<()>, Box<dyn Send>) {
        let ((end, ended), (then, dropped)) = (mpsc::channel(), mpsc::channel::<()>());
        (end, Held(ended), dropped, Box::new(then))
    }

    #[test]
    fn what_comes_after_a_close_that_lasts_waits_for_it_and_nobody_else_does() {
        let (end, held, dropped, then) = set();
        close("0000:00:04.0".parse().unwrap(), Duration::ZERO, held, then);
        assert_eq!(dropped.try_recv(), Err(TryRecvError::Empty), "the function is still open");
        drop(end);
        assert_eq!(dropped.recv_timeout(ENOUGH), Err(mpsc::RecvTimeoutError::Disconnected));
    }

    #[test]
    fn what_comes_after_a_close_is_done_when_the_caller_goes_on() {
        let (end, held, dropped, then) = set();
        drop(end);
        close("0000:00:04.0".parse().unwrap(), ENOUGH, held, then);
        assert_eq!(dropped.try_recv(), Err(TryRecvError::Disconnected));
    }
}
