//! The thread of one function: takes its INTx and notices that it goes.
//!
//! ```text
//! the line asserted -> the kernel masks it and makes the descriptor readable (uio: /dev/uioN; vfio: the eventfd of INTx)
//!     -> take the count -> ask the driver whose it is -> signal its eventfds -> let the line assert again
//! the kernel has given the function up (uio: poll answers 0x19, read EIO), or its configuration space answers nobody -> the event is readable for good; the thread ends
//! ```
//!
//! Nobody tells a process about a function that was pulled out (slot power off) before the kernel has noticed, so its configuration space is looked at each
//! [`LOOK_EVERY`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// How often an idle function is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Interrupts in a row that were nobody's before the line is let go more slowly: its reason is not being taken away.
const MAX_UNCLAIMED: u32 = 100;
/// Pause between them from then on: at most 100 in a second.
const UNCLAIMED_PAUSE: Duration = Duration::from_millis(10);
/// How long [`Watch::stop`] waits for the thread.
const STOP_WITHIN: Duration = Duration::from_secs(1);

/// What the thread watches.
pub(crate) trait Source: Send + 'static {
    /// Becomes readable with an interrupt. `None` for a function without INTx.
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// Takes what made it readable; whether there was anything. Never blocks.
    ///
    /// # Errors
    /// When the kernel has given the function up.
    fn take(&mut self) -> io::Result<bool>;

    /// Lets the line assert again.
    fn rearm(&mut self) -> io::Result<()>;

    /// Whether the function is out of the machine.
    fn is_absent(&mut self) -> bool;
}

/// Who takes interrupts.
pub(crate) struct Line {
    /// Takes the function's reason away; whether there was one. `None` where only the driver can: then the line stays masked until [`Watch::line`]'s holder lets it
    /// assert again.
    pub(crate) acknowledge: Option<Box<dyn FnMut() -> bool + Send>>,
    /// Non-blocking eventfds.
    pub(crate) signal: Vec<OwnedFd>,
}

#[derive(Default)]
struct Shared {
    line: Mutex<Option<Line>>,
    lost: AtomicBool,
    absent: AtomicBool,
}

/// The thread, if it runs, and what it has seen.
pub(crate) struct Watch {
    shared: Arc<Shared>,
    stop: OwnedFd,
    /// Readable from the loss on.
    event: Arc<OwnedFd>,
    thread: Mutex<Option<Running>>,
}

struct Running {
    /// Disconnected when the thread has nothing left to do.
    ended: Receiver<()>,
    thread: JoinHandle<()>,
}

/// A non-blocking eventfd.
pub(crate) fn event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Makes an eventfd readable; a full counter is readable already.
pub(crate) fn signal(event: impl AsFd) {
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

impl Watch {
    /// One without a thread: nobody takes interrupts or notices anything until [`Watch::run`]. `event` becomes readable when the function is lost; others may signal it too.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub(crate) fn asleep(event: Arc<OwnedFd>) -> io::Result<Self> {
        Ok(Self { shared: Arc::default(), stop: self::event()?, event, thread: Mutex::new(None) })
    }

    /// Starts the thread, named `name`, of one that is asleep or was stopped.
    ///
    /// # Errors
    /// When the system has no thread or descriptor left.
    pub(crate) fn run(&mut self, name: &str, source: impl Source) -> io::Result<()> {
        match lock(&self.thread).take() {
            // It did not stop in time: it ends by the descriptor that it has, and holds its source until then.
            Some(_) => self.stop = self::event()?,
            None => drop(rustix::io::read(&self.stop, &mut [0; 8])),
        }
        let (alive, ended) = mpsc::channel();
        let mut body = Body {
            source,
            shared: Arc::clone(&self.shared),
            stop: rustix::io::fcntl_dupfd_cloexec(&self.stop, 0)?,
            event: Arc::clone(&self.event),
            unclaimed: 0,
            _alive: alive,
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || body.run())?;
        *lock(&self.thread) = Some(Running { ended, thread });
        Ok(())
    }

    /// The function is lost: nobody is there to notice it.
    pub(crate) fn give_up(&self) {
        self.shared.lost.store(true, Ordering::Release);
        signal(&self.event);
    }

    /// Who takes interrupts from now on. Nothing lets the line assert while the guard is held; with `None` nothing ever does.
    pub(crate) fn line(&self) -> MutexGuard<'_, Option<Line>> {
        lock(&self.shared.line)
    }

    /// Readable when the function may be lost.
    pub(crate) fn event(&self) -> BorrowedFd<'_> {
        (*self.event).as_fd()
    }

    /// Whether the function was lost. Never blocks.
    pub(crate) fn is_lost(&self) -> bool {
        self.shared.lost.load(Ordering::Acquire)
    }

    /// Whether it was seen to be out of the machine.
    pub(crate) fn is_absent(&self) -> bool {
        self.shared.absent.load(Ordering::Acquire)
    }

    /// Ends the thread, waiting a second at most; whether it has ended. Idempotent.
    pub(crate) fn stop(&self) -> bool {
        signal(&self.stop);
        let mut thread = lock(&self.thread);
        if let Some(running) = thread.take() {
            if running.ended.recv_timeout(STOP_WITHIN) != Err(RecvTimeoutError::Disconnected) {
                *thread = Some(running);
                return false;
            }
            let _ = running.thread.join();
        }
        lock(&self.shared.line).take();
        true
    }

    /// What it holds open.
    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.stop.as_fd(), self.event()]
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.stop() {
            tracing::error!(
                "the thread of a function does not end: its descriptor stays open until the kernel answers"
            );
        }
    }
}

/// A handler that panicked has left nothing half done that anybody reads.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Body<S> {
    source: S,
    shared: Arc<Shared>,
    stop: OwnedFd,
    event: Arc<OwnedFd>,
    unclaimed: u32,
    _alive: mpsc::Sender<()>,
}

impl<S: Source> Body<S> {
    fn run(&mut self) {
        let mut wait = LOOK_EVERY;
        let mut rearm = false;
        loop {
            let (stopped, readable) = match self.poll(wait, !rearm) {
                Ok(seen) => seen,
                Err(error) => {
                    tracing::error!(%error, "the thread of a function cannot wait");
                    return self.lose(false);
                }
            };
            if stopped {
                return;
            }
            wait = LOOK_EVERY;
            if std::mem::take(&mut rearm) {
                self.rearm();
                continue;
            }
            if !readable {
                if self.source.is_absent() {
                    return self.lose(true);
                }
                continue;
            }
            match self.source.take() {
                Ok(true) => rearm = self.interrupt(),
                Ok(false) => {}
                Err(_) => {
                    let absent = self.source.is_absent();
                    return self.lose(absent);
                }
            }
            if rearm {
                wait = UNCLAIMED_PAUSE;
            }
        }
    }

    /// Whether it was told to stop, and whether the source is readable. Without `source` only the first is waited for.
    fn poll(&self, wait: Duration, source: bool) -> io::Result<(bool, bool)> {
        let mut polled = vec![PollFd::new(&self.stop, PollFlags::IN)];
        let fd = self.source.fd().filter(|_| source);
        polled.extend(fd.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        let wait = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        match poll(&mut polled, Some(&wait)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let seen = |at: usize| polled.get(at).is_some_and(|polled| !polled.revents().is_empty());
        Ok((seen(0), seen(1)))
    }

    /// One interrupt; whether the line is to be let go after a pause only.
    fn interrupt(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut line = lock(&shared.line);
        // Nobody wants it: the line stays masked.
        let Some(line) = line.as_mut() else { return false };
        let ours = line.acknowledge.as_mut().is_none_or(|acknowledge| acknowledge());
        if ours {
            self.unclaimed = 0;
            line.signal.iter().for_each(signal);
        } else {
            self.unclaimed = self.unclaimed.saturating_add(1);
        }
        if line.acknowledge.is_none() {
            return false;
        }
        if self.unclaimed > MAX_UNCLAIMED {
            if self.unclaimed == MAX_UNCLAIMED + 1 {
                tracing::warn!("interrupts that nobody claims: the line is slowed down");
            }
            return true;
        }
        self.let_go();
        false
    }

    /// Lets the line assert again, if somebody still wants it.
    fn rearm(&mut self) {
        let shared = Arc::clone(&self.shared);
        if lock(&shared.line).is_some() {
            self.let_go();
        }
    }

    /// With the lock on the line held. A function that does not let itself be told is on its way out, which the next look shows.
    fn let_go(&mut self) {
        if let Err(error) = self.source.rearm() {
            tracing::debug!(%error, "INTx was not let go");
        }
    }

    fn lose(&self, absent: bool) {
        self.shared.absent.store(absent, Ordering::Release);
        self.shared.lost.store(true, Ordering::Release);
        signal(&self.event);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::time::Instant;

    use super::*;

    /// What behaves as `/dev/uioN` does: an eventfd is read where the kernel's counter would be.
    struct Fake {
        interrupt: Arc<OwnedFd>,
        state: Arc<FakeState>,
    }

    #[derive(Default)]
    struct FakeState {
        rearmed: AtomicU32,
        given_up: AtomicBool,
        absent: AtomicBool,
    }

    impl Source for Fake {
        fn fd(&self) -> Option<BorrowedFd<'_>> {
            Some(self.interrupt.as_fd())
        }

        fn take(&mut self) -> io::Result<bool> {
            if self.state.given_up.load(Ordering::SeqCst) {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            Ok(rustix::io::read(&*self.interrupt, &mut [0; 8]).is_ok())
        }

        fn rearm(&mut self) -> io::Result<()> {
            self.state.rearmed.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }

        fn is_absent(&mut self) -> bool {
            self.state.absent.load(Ordering::SeqCst)
        }
    }

    struct Set {
        interrupt: Arc<OwnedFd>,
        state: Arc<FakeState>,
        watch: Watch,
    }

    fn set() -> Set {
        let (interrupt, state) = (Arc::new(event().unwrap()), Arc::new(FakeState::default()));
        let source = Fake { interrupt: Arc::clone(&interrupt), state: Arc::clone(&state) };
        let mut watch = Watch::asleep(Arc::new(event().unwrap())).unwrap();
        watch.run("test", source).unwrap();
        Set { interrupt, state, watch }
    }

    fn readable(fd: impl AsFd, within: Duration) -> bool {
        let wait = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: i64::from(within.subsec_nanos()) };
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&wait)).unwrap() == 1
    }

    fn until(what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < deadline, "never: {what}");
            std::thread::yield_now();
        }
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn an_interrupt_is_acknowledged_then_signalled_and_then_let_go() {
        let set = set();
        let (mine, state) = (event().unwrap(), Arc::clone(&set.state));
        let signal_to = rustix::io::dup(&mine).unwrap();
        let acknowledge = move || {
            assert_eq!(state.rearmed.load(Ordering::SeqCst), 0, "let go before its reason was gone");
            true
        };
        *set.watch.line() = Some(Line { acknowledge: Some(Box::new(acknowledge)), signal: vec![signal_to] });
        signal(&*set.interrupt);
        assert!(readable(&mine, LONG));
        until("let go", || set.state.rearmed.load(Ordering::SeqCst) == 1);
        assert!(!set.watch.is_lost());
    }

    #[test]
    fn an_interrupt_of_somebody_else_on_the_line_is_let_go_and_signals_nobody() {
        let set = set();
        let mine = event().unwrap();
        let signal_to = rustix::io::dup(&mine).unwrap();
        *set.watch.line() = Some(Line { acknowledge: Some(Box::new(|| false)), signal: vec![signal_to] });
        signal(&*set.interrupt);
        until("let go", || set.state.rearmed.load(Ordering::SeqCst) == 1);
        assert!(!readable(&mine, Duration::ZERO));
    }

    #[test]
    fn a_line_that_nobody_wants_stays_masked() {
        let set = set();
        signal(&*set.interrupt);
        until("taken", || !readable(&*set.interrupt, Duration::ZERO));
        assert!(set.watch.stop());
        assert_eq!(set.state.rearmed.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_line_that_only_the_driver_can_acknowledge_stays_masked_after_it_was_signalled() {
        let set = set();
        let mine = event().unwrap();
        let signal_to = rustix::io::dup(&mine).unwrap();
        *set.watch.line() = Some(Line { acknowledge: None, signal: vec![signal_to] });
        signal(&*set.interrupt);
        assert!(readable(&mine, LONG));
        assert!(set.watch.stop());
        assert_eq!(set.state.rearmed.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_storm_of_interrupts_that_nobody_claims_is_slowed_down() {
        let set = set();
        *set.watch.line() = Some(Line { acknowledge: Some(Box::new(|| false)), signal: Vec::new() });
        let storm = Instant::now();
        until("the storm", || {
            signal(&*set.interrupt);
            set.state.rearmed.load(Ordering::SeqCst) > MAX_UNCLAIMED + 10
        });
        assert!(storm.elapsed() >= 10 * UNCLAIMED_PAUSE, "{:?}", storm.elapsed());
        assert!(set.watch.stop(), "it still ends in time");
    }

    #[test]
    fn a_function_that_the_kernel_gave_up_is_lost_and_its_event_stays_readable() {
        let set = set();
        set.state.given_up.store(true, Ordering::SeqCst);
        signal(&*set.interrupt);
        assert!(readable(set.watch.event(), LONG));
        assert!(readable(set.watch.event(), Duration::ZERO));
        assert!(set.watch.is_lost() && !set.watch.is_absent());
        assert!(set.watch.stop());
    }

    #[test]
    fn a_function_that_was_pulled_out_is_noticed_though_nobody_says_so() {
        let set = set();
        set.state.absent.store(true, Ordering::SeqCst);
        assert!(readable(set.watch.event(), LONG));
        assert!(set.watch.is_lost() && set.watch.is_absent());
    }

    #[test]
    fn what_comes_while_nobody_watches_is_taken_by_the_next_thread_on_the_same_event() {
        let mut set = set();
        assert!(set.watch.stop());
        signal(&*set.interrupt);
        set.watch.run("again", Fake { interrupt: Arc::clone(&set.interrupt), state: Arc::clone(&set.state) }).unwrap();
        until("taken", || !readable(&*set.interrupt, Duration::ZERO));
        set.state.given_up.store(true, Ordering::SeqCst);
        signal(&*set.interrupt);
        assert!(readable(set.watch.event(), LONG) && set.watch.is_lost());
        assert!(set.watch.stop());
    }

    #[test]
    fn one_that_is_asleep_takes_nothing_and_notices_nothing() {
        let set = set();
        set.state.absent.store(true, Ordering::SeqCst);
        let asleep = Watch::asleep(Arc::new(event().unwrap())).unwrap();
        assert!(!asleep.is_lost() && !readable(asleep.event(), Duration::ZERO));
        assert!(asleep.stop(), "there is nothing to wait for");
    }

    #[test]
    fn the_thread_ends_when_it_is_told_and_lets_its_source_go() {
        let set = set();
        assert!(set.watch.stop());
        assert!(set.watch.stop(), "twice");
        assert_eq!(Arc::strong_count(&set.state), 1);
        assert!(!set.watch.is_lost());
    }
}
