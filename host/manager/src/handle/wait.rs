//! Waiting in the mode that clients get by default: looking first, then sleeping.

use std::time::{Duration, Instant};

use cofferdam_gate::HandleState;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Handle;
use crate::request::Completion;

/// How long a client of a revoked handle sleeps between two looks for its last answers.
const REVOKED_SLICE: Duration = Duration::from_millis(5);

impl Handle {
    /// Waits for answers, for at most `timeout`. Returns what [`Handle::poll`] returned last; 0 after a time-out or at revocation.
    ///
    /// While something of this handle is in flight it looks for up to 50 us before it sleeps, for as long as that pays ([`crate::Patience`]): a look that found
    /// nothing before a long sleep halves the next one, down to none, and a sleep that was short brings it back. With nothing in flight, and whenever the device
    /// is slow, it sleeps at once and takes no processor time. Only when it is about to sleep does it ask the device to notify.
    pub fn wait(&self, timeout: Duration, out: &mut Vec<Completion>) -> usize {
        // Most waits under load end here: no clock is read and the device is asked for nothing.
        let mut found = self.poll(false, out);
        if found > 0 {
            return found;
        }
        // Inside a call into this driver its lane is taken: what comes is brought by others, and is not to be seen on the ring.
        let looks = self.in_flight() > 0 && !self.binding.gate().in_crossing();
        let begun = Instant::now();
        if looks {
            self.patience.spin(timeout, || {
                found = self.poll(false, out);
                found > 0 || self.state() == HandleState::Revoked
            });
            if found > 0 {
                return found;
            }
        }
        let deadline = crate::ladder::after(begun, timeout);
        let mut asleep = None;
        loop {
            let revoked = self.state() == HandleState::Revoked;
            // Before the look: whose last answer is counted has it where the look finds it.
            let over = revoked && self.in_flight() == 0;
            found = self.poll(true, out);
            // The last answer may have come by another client's look, which counts it a moment later: nobody would wake this one for nothing.
            let nothing_left = looks && found == 0 && self.in_flight() == 0;
            if nothing_left {
                return self.poll(false, out);
            }
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now);
            if found > 0 || left.is_zero() || over {
                if let (true, Some(asleep)) = (looks, asleep) {
                    self.patience.slept(now.saturating_duration_since(asleep));
                }
                return found;
            }
            asleep.get_or_insert(now);
            // Of a revoked handle the notify is readable for ever; the ladder brings the last answers, so look again soon.
            let slice = if revoked { left.min(REVOKED_SLICE) } else { left };
            let wait = Timespec { tv_sec: slice.as_secs() as i64, tv_nsec: i64::from(slice.subsec_nanos()) };
            let device = PollFd::from_borrowed_fd(self.device_fd(), PollFlags::IN);
            let notify = PollFd::from_borrowed_fd(self.shared.notify.fd(), PollFlags::IN);
            let mut fds = [device, notify];
            let watched = if revoked { &mut fds[..1] } else { &mut fds[..] };
            // EINTR and spurious returns lead to another look, bounded by the deadline.
            let _ = poll(watched, Some(&wait));
            if !revoked && !fds[1].revents().is_empty() {
                self.shared.notify.clear();
            }
        }
    }
}
