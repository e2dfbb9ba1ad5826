//! One lane's thread.
//!
//! ```text
//! answers -> device to kernel, up to 64 -> kernel to device, up to 64 -> ... nothing anywhere: look a little longer -> arm -> sleep
//! ```
//! Nothing here blocks but the sleep, which has a time-out only while there is no memory and nothing in flight that would bring some.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cofferdam_manager::{Arrivals, Completion, Handle, HandleState, Notify, Offer, Patience};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::header;
use crate::inbound::{BATCH, Inbound, Look};
use crate::shared::{Shared, add};

/// How often a lane that starves of what others hold looks again.
const RETRY: Duration = Duration::from_millis(2);

/// See the module.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    lane: usize,
    handle: Handle,
    /// The handle's, and what a shutdown signals.
    notify: Arc<Notify>,
    inbound: Inbound,
    look: Look,
    arrivals: Arrivals,
    completions: Vec<Completion>,
    patience: Patience,
}

impl Worker {
    pub(crate) fn new(shared: Arc<Shared>, lane: usize, handle: Handle, notify: Arc<Notify>, inbound: Inbound) -> Self {
        Worker {
            shared,
            lane,
            handle,
            notify,
            inbound,
            look: Look::More,
            arrivals: Arrivals::new(),
            completions: Vec::with_capacity(BATCH),
            patience: Patience::new(Patience::DEFAULT),
        }
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self) {
        if !self.shared.parking.is_wanted() {
            self.follow_link();
        }
        let mut moves = 0u64;
        while !self.shared.stopping.load(Ordering::Acquire) {
            if self.handle.state() == HandleState::Revoked {
                return self.leave();
            }
            if self.shared.parking.is_wanted() {
                if !self.park() {
                    return self.end();
                }
                continue;
            }
            let moved = self.round();
            moves += u64::from(moved);
            if moved {
                continue;
            }
            // While packets come and go, the next one may be near. A quiet lane sleeps at once.
            let lively = std::mem::take(&mut moves) > 1;
            if lively && self.spin() {
                continue;
            }
            if !self.arm() {
                self.sleep();
            }
        }
        self.end();
    }

    /// Brings to its end what was read of the interface, and stands until it is told what next. False: everything is another process's.
    ///
    /// What the device delivered was given to the kernel at once, so that nothing is kept of that.
    fn park(&mut self) -> bool {
        loop {
            let answered = self.reap(true);
            if self.inbound.finish(&self.handle, &self.shared.counts) {
                break;
            }
            let over = self.shared.stopping.load(Ordering::Acquire) || self.handle.state() == HandleState::Revoked;
            if over || !self.shared.parking.is_wanted() {
                return true;
            }
            if !answered {
                let mut fds = [
                    PollFd::from_borrowed_fd(self.notify.fd(), PollFlags::IN),
                    PollFd::from_borrowed_fd(self.handle.device_fd(), PollFlags::IN),
                ];
                let _ = poll(&mut fds, Timespec::try_from(RETRY).ok().as_ref());
                self.notify.clear();
            }
        }
        let goes_on = self.shared.parking.stand(());
        if goes_on {
            self.look = Look::More;
            self.notify.clear();
            self.follow_link();
        }
        goes_on
    }

    fn tap(&self) -> BorrowedFd<'_> {
        self.shared.interface.queue(self.lane)
    }

    /// One look in each direction; whether anything moved.
    fn round(&mut self) -> bool {
        let answered = self.reap(false);
        let delivered = self.deliver(false);
        let before = self.shared.counts.to_device.load(Ordering::Relaxed);
        let read = match self.look {
            Look::Lost => false,
            _ => {
                self.look =
                    self.inbound.look(self.shared.interface.queue(self.lane), &self.handle, &self.shared.counts);
                self.look == Look::More || self.shared.counts.to_device.load(Ordering::Relaxed) != before
            }
        };
        if self.look == Look::Lost && !self.shared.lost.swap(true, Ordering::Relaxed) {
            tracing::error!(port = %self.shared.address, "the interface was deleted; packets are dropped until the port is detached");
        }
        answered || delivered || read
    }

    fn reap(&mut self, arm: bool) -> bool {
        if !self.inbound.waits() {
            return false;
        }
        let found = self.handle.poll(arm, &mut self.completions);
        self.inbound.answered(&mut self.completions, &self.shared.counts);
        found > 0
    }

    /// Packets of the device to the kernel, one system call each.
    fn deliver(&mut self, arm: bool) -> bool {
        if self.handle.receive(arm, &mut self.arrivals) == 0 {
            return false;
        }
        let (mut taken, mut refused, mut no_room) = (0, 0, 0);
        for arrival in self.arrivals.iter() {
            let header = header::to_kernel(arrival.flags(), arrival.argument());
            match arrival.write_to(self.shared.interface.queue(self.lane), &header, 0) {
                Ok(_) => taken += 1,
                Err(error) if is_shortage(&error) => no_room += 1,
                Err(_) => refused += 1,
            }
        }
        self.arrivals.clear();
        let counts = &self.shared.counts;
        add(&counts.to_kernel, taken);
        add(&counts.refused_by_kernel, refused);
        add(&counts.no_room, no_room);
        true
    }

    /// Looks for as long as that has paid.
    fn spin(&mut self) -> bool {
        let patience = std::mem::replace(&mut self.patience, Patience::new(Duration::ZERO));
        let found = patience.spin(Duration::MAX, || self.round() || self.handle.state() == HandleState::Revoked);
        self.patience = patience;
        found
    }

    /// Asks to be notified; whether something was found on the way.
    fn arm(&mut self) -> bool {
        let answered = self.reap(true);
        self.deliver(true) || answered
    }

    fn sleep(&mut self) {
        let mut fds = Vec::with_capacity(4);
        fds.push(PollFd::from_borrowed_fd(self.notify.fd(), PollFlags::IN));
        fds.extend(self.handle.arrival_fd().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        if self.inbound.waits() {
            fds.push(PollFd::from_borrowed_fd(self.handle.device_fd(), PollFlags::IN));
        }
        let mut timeout = None;
        match self.look {
            Look::Dry | Look::More => fds.push(PollFd::from_borrowed_fd(self.tap(), PollFlags::IN)),
            Look::Full if !self.inbound.waits() => timeout = Timespec::try_from(RETRY).ok(),
            Look::Full | Look::Held | Look::Revoked | Look::Lost => {}
        }
        // EINTR leads to another round.
        let _ = poll(&mut fds, timeout.as_ref());
        let notified = fds.first().is_some_and(|fd| !fd.revents().is_empty());
        drop(fds);
        if notified {
            self.notify.clear();
            self.follow_link();
        }
    }

    /// The carrier is as the device's link is.
    fn follow_link(&self) {
        if self.lane != 0 || self.handle.state() == HandleState::Revoked {
            return;
        }
        if let Some(Offer::Net(net)) = self.shared.binding.offer().as_deref() {
            self.carrier(net.link_up);
        }
    }

    fn carrier(&self, on: bool) {
        if let Err(error) = self.shared.interface.set_carrier(on) {
            tracing::warn!(port = %self.shared.address, on, %error, "the carrier could not be switched");
        }
    }

    /// The right has ended: no carrier from here on, and no buffer but those that are with the device, whose answers are waited for.
    fn leave(mut self) {
        self.carrier(false);
        self.arrivals.clear();
        self.inbound.end();
        while !self.shared.stopping.load(Ordering::Acquire) && self.inbound.waits() {
            if !self.reap(true) {
                let mut fds = [
                    PollFd::from_borrowed_fd(self.notify.fd(), PollFlags::IN),
                    PollFd::from_borrowed_fd(self.handle.device_fd(), PollFlags::IN),
                ];
                // The ladder may answer for the device, and says so by the notify; the time-out is for what it does beside.
                let _ = poll(&mut fds, Timespec::try_from(10 * RETRY).ok().as_ref());
                self.notify.clear();
            }
            self.inbound.end();
        }
        self.end();
    }

    /// Nothing of the binding's is kept; the handle closes with the worker.
    fn end(mut self) {
        self.arrivals.clear();
        self.inbound.end();
    }
}

/// Whether the kernel would have taken it at another time.
fn is_shortage(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM))
}
