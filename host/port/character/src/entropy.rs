//! From an entropy device to a sink: one thread, which asks the device only when the sink asks for something.
//!
//! ```text
//! sink wants -> fill (at most DEPTH under way or waiting) -> answered -> given, as far as the sink takes it -> wiped
//! ```

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use cofferdam_manager::{
    Buffer, Completion, Handle, HandleState, IoFlags, IoOp, IoRequest, LeaseError, Offer, SubmitError,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::error::CharacterError;
use crate::handover::Said;
use crate::port::Shared;

/// Requests under way, and answers that wait for the sink.
const DEPTH: usize = 4;
/// Before the device is asked again after it failed a request, and before what had no room is tried again.
const REST: Duration = Duration::from_millis(100);

/// While it comes to a standstill, it looks again after this.
pub(crate) const SOON: Duration = Duration::from_millis(2);

/// What a sink wants.
pub(crate) enum Demand {
    /// So many bytes, and may want more afterwards.
    Bytes(u32),
    /// Nothing before then.
    At(Instant),
    /// Nothing before its descriptor can be written to.
    Room,
}

/// Where random bytes go.
pub(crate) trait Sink: Send + 'static {
    /// Descriptors for the same in another process.
    fn export(&self) -> io::Result<Vec<OwnedFd>>;
    /// Asked whenever a request could be made.
    fn demand(&mut self, now: Instant) -> Demand;
    /// What [`Demand::Room`] and a `give` that would block wait for.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Takes bytes of the buffer, from the front of the range; never blocks.
    fn give(&mut self, buffer: &Buffer, range: Range<u32>) -> io::Result<usize>;
}

/// An answer, or what is left of it.
struct Ready {
    buffer: Buffer,
    range: Range<u32>,
}

/// See the module.
pub(crate) struct Entropy<S> {
    handle: Handle,
    sink: S,
    shared: Shared,
    most: u32,
    ready: VecDeque<Ready>,
    unsent: Vec<IoRequest>,
    /// Not asked before then.
    rests: Option<Instant>,
    failed: u64,
}

impl<S: Sink> Entropy<S> {
    pub(crate) fn new(handle: Handle, sink: S, shared: Shared) -> Result<Entropy<S>, CharacterError> {
        let Offer::Entropy(properties) = handle.offer() else { return Err(CharacterError::NotServing) };
        let most = properties.max_request_bytes;
        Ok(Entropy { handle, sink, shared, most, ready: VecDeque::new(), unsent: Vec::new(), rests: None, failed: 0 })
    }

    /// Until the port is told to stop, or its right is taken away.
    pub(crate) fn run(mut self) {
        let mut completions = Vec::new();
        loop {
            self.handle.notify().clear();
            self.shared.clear_stop();
            if self.shared.is_stopping() || self.handle.state() == HandleState::Revoked {
                return;
            }
            if self.shared.parking().is_wanted() {
                // What it has been given and nobody has read is as good as what comes: only what is with the device is waited for.
                if self.unsent.is_empty() && self.handle.in_flight() == 0 {
                    let said = self.sink.export().map(|descriptors| Said { descriptors, ..Said::default() });
                    if !self.shared.parking().stand(said) {
                        return;
                    }
                    continue;
                }
            }
            // Arming and finding nothing is what makes the sleep below safe.
            while self.handle.poll(true, &mut completions) > 0 {
                completions.drain(..).for_each(|completion| self.take(completion));
            }
            let blocked = match self.hand_out() {
                Ok(blocked) => blocked,
                Err(error) => {
                    tracing::error!(port = self.shared.address(), %error, "random bytes cannot be handed out; the port ends");
                    return;
                }
            };
            let parks = self.shared.parking().is_wanted();
            if parks && !self.unsent.is_empty() {
                let _ = self.handle.submit(&mut self.unsent);
            }
            let (room, until) = match parks {
                true => (false, Some(Instant::now() + SOON)),
                false => self.ask(Instant::now()),
            };
            if self.shared.is_stopping() {
                return;
            }
            self.sleep(blocked || room, until);
        }
    }

    fn take(&mut self, completion: Completion) {
        match (completion.result, completion.buffer) {
            (Ok(()), Some(buffer)) if completion.bytes > 0 => {
                let range = 0..completion.bytes.min(buffer.len());
                self.ready.push_back(Ready { buffer, range });
            }
            (result, _) => {
                self.failed += 1;
                self.rests = Some(Instant::now() + REST);
                // The first and then ever fewer: a device can fail without end.
                if self.failed.is_power_of_two() {
                    tracing::warn!(
                        port = self.shared.address(),
                        ?result,
                        failed = self.failed,
                        "the device gave no random bytes"
                    );
                }
            }
        }
    }

    /// Whether the sink takes nothing more now.
    fn hand_out(&mut self) -> io::Result<bool> {
        while let Some(ready) = self.ready.front_mut() {
            while !ready.range.is_empty() {
                match self.sink.give(&ready.buffer, ready.range.clone()) {
                    Ok(taken) => {
                        // What somebody has is nobody else's: the memory is lent again.
                        let _ = ready.buffer.fill(ready.range.start, taken as u32, 0);
                        ready.range.start += taken as u32;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                    Err(error) => return Err(error),
                }
            }
            self.ready.pop_front();
        }
        Ok(false)
    }

    /// Asks the device for what the sink wants; whether the sink wants room first, and when to look again at the latest.
    fn ask(&mut self, now: Instant) -> (bool, Option<Instant>) {
        if let Some(rests) = self.rests.filter(|rests| *rests > now) {
            return (false, Some(rests));
        }
        self.rests = None;
        while self.unsent.is_empty() && self.ready.len() + (self.handle.in_flight() as usize) < DEPTH {
            let length = match self.sink.demand(now) {
                Demand::Bytes(bytes) => bytes.clamp(1, self.most),
                Demand::At(at) => return (false, Some(at)),
                Demand::Room => return (true, None),
            };
            let buffer = match self.handle.lease(length) {
                Ok(buffer) => buffer,
                Err(LeaseError::Exhausted) => return (false, Some(now + REST)),
                Err(_) => return (false, None),
            };
            self.unsent.push(IoRequest {
                user: 0,
                op: IoOp::Fill,
                offset: 0,
                length,
                flags: IoFlags::default(),
                buffer: Some(buffer),
            });
            match self.handle.submit(&mut self.unsent) {
                Ok(()) | Err(SubmitError::Held | SubmitError::Revoked | SubmitError::Inside) => {}
                Err(SubmitError::Full) => return (false, Some(now + REST)),
            }
        }
        if !self.unsent.is_empty() && self.handle.submit(&mut self.unsent) == Err(SubmitError::Full) {
            return (false, Some(now + REST));
        }
        (false, None)
    }

    fn sleep(&self, wants_room: bool, until: Option<Instant>) {
        let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.shared.stop_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.handle.notify().fd(), PollFlags::IN),
        ];
        if self.handle.in_flight() > 0 {
            fds.push(PollFd::from_borrowed_fd(self.handle.device_fd(), PollFlags::IN));
        }
        if wants_room {
            fds.push(PollFd::from_borrowed_fd(self.sink.fd(), PollFlags::OUT));
        }
        // EINTR leads to another look.
        let _ = poll(&mut fds, timeout.as_ref());
    }
}
