//! Bytes between a port of a console and a line, both ways and in order: one thread.
//!
//! ```text
//! line -> (one write at a time) -> device        device -> posted buffers -> arrivals -> line
//! ```
//!
//! While the line takes nothing, no arrival is taken: the device runs out of buffers. While the device takes nothing, the line is not read.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_manager::{
    Arrivals, Binding, Buffer, Completion, ControlError, Handle, HandleState, IoError, IoFlags, IoOp, IoRequest, Offer,
    SubmitError,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::entropy::SOON;
use crate::error::CharacterError;
use crate::handover::{Bytes, Said, StreamState};
use crate::port::Shared;

/// Bytes of one write.
const WRITE_BYTES: u32 = 16 * 1024;
/// Before the lane is tried again when others have filled it, and after the device failed a write.
const REST: Duration = Duration::from_millis(50);
/// How long what has arrived may take to go out when the port's right ends before its grace is known.
const LINGER: Duration = Duration::from_millis(100);
/// A line that has ended waits until the device has said nothing for so long.
const QUIET: Duration = Duration::from_millis(500);

/// What came of reading a line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// So many bytes.
    Bytes(usize),
    /// Nothing yet.
    Later,
    /// Nobody is at the other end; somebody may come ([`Line::comes`]).
    Away,
    /// Nothing will come any more. With `true` nobody waits for the device either.
    Ended(usize, bool),
}

/// The host's side of a stream. Nothing of it blocks.
pub(crate) trait Line: Send + 'static {
    /// Descriptors and name for the same in another process; `None` where it is this one's.
    fn export(&self) -> Option<io::Result<(Vec<OwnedFd>, PathBuf)>>;
    /// Who is there, for `handles`.
    fn peer(&self) -> String;
    /// Where bytes come from, and where they go.
    fn input(&self) -> BorrowedFd<'_>;
    /// See `input`.
    fn output(&self) -> BorrowedFd<'_>;
    /// Reads.
    fn take(&mut self, into: &mut [u8]) -> Taken;
    /// Whether somebody is at the other end at the start.
    fn is_somebody_there(&mut self) -> bool;
    /// Readable when somebody may have come.
    fn comes(&self) -> Option<BorrowedFd<'_>>;
    /// The other side's screen has another size: columns and rows.
    fn resize(&mut self, columns: u16, rows: u16);
}

/// See the module.
pub(crate) struct Stream<L> {
    binding: Arc<Binding>,
    handle: Handle,
    line: L,
    shared: Shared,
    lane: usize,
    port: u32,
    /// The offer as it was looked at last.
    offer: Option<Arc<Offer>>,
    /// The device has the port.
    plugged: bool,
    size: Option<(u16, u16)>,
    /// What the device was told of the line.
    told: Option<bool>,
    /// What had arrived for the line in the process before this one; it goes first.
    early: Vec<u8>,
    /// What has arrived for the line.
    pending: Arrivals,
    /// Bytes of `early`, or then of the first arrival, that the line has.
    skip: usize,
    /// What the process before this one had read of the line; it goes first.
    unread: Vec<u8>,
    /// The one buffer of writes, while it is not with the device.
    buffer: Option<Buffer>,
    unsent: Vec<IoRequest>,
    scratch: Box<[u8]>,
    /// Somebody is at the line's other end.
    there: bool,
    /// The line hung up; there may be bytes to read.
    hung_up: bool,
    /// It ended; whether nobody waits for the device any more.
    ended: Option<bool>,
    /// Nothing is written to the device before then.
    rests: Option<Instant>,
    last_word: Instant,
    lost: u64,
}

impl<L: Line> Stream<L> {
    pub(crate) fn new(
        binding: Arc<Binding>,
        handle: Handle,
        mut line: L,
        (lane, port): (usize, u32),
        shared: Shared,
        adopted: Option<(StreamState, Bytes)>,
    ) -> Result<Stream<L>, CharacterError> {
        let Offer::Stream(properties) = handle.offer() else { return Err(CharacterError::NotServing) };
        let bytes = properties.max_write_bytes.min(WRITE_BYTES);
        let buffer = handle.lease(bytes)?;
        // Of one that is taken over nothing is read yet.
        let there = match &adopted {
            Some((state, _)) => state.there,
            None => line.is_somebody_there(),
        };
        let (state, early) = adopted.unzip();
        let Bytes { for_line, for_device } = early.unwrap_or_default();
        Ok(Stream {
            binding,
            handle,
            line,
            shared,
            lane,
            port,
            offer: None,
            plugged: state.as_ref().is_some_and(|state| state.plugged),
            size: state.as_ref().and_then(|state| state.size),
            told: state.as_ref().and_then(|state| state.told),
            early: for_line,
            pending: Arrivals::new(),
            skip: 0,
            unread: for_device,
            buffer: Some(buffer),
            unsent: Vec::new(),
            scratch: vec![0; bytes as usize].into_boxed_slice(),
            there,
            hung_up: state.is_some_and(|state| state.hung_up),
            ended: None,
            rests: None,
            last_word: Instant::now(),
            lost: 0,
        })
    }

    /// Until the port is told to stop, its right is taken away or the line has ended.
    pub(crate) fn run(mut self) {
        let mut completions = Vec::new();
        loop {
            self.handle.notify().clear();
            self.shared.clear_stop();
            if self.shared.is_stopping() || self.handle.state() == HandleState::Revoked {
                return self.leave();
            }
            if self.shared.parking().is_wanted() {
                while self.handle.poll(true, &mut completions) > 0 {
                    completions.drain(..).for_each(|completion| self.answered(completion));
                }
                if self.handle.in_flight() > 0 {
                    self.wait_for_device();
                } else if !self.shared.parking().stand(self.export()) {
                    // The line, and what the device was told of it, are another process's.
                    return;
                }
                continue;
            }
            self.look_at_offer();
            self.tell();
            // Arming and finding nothing is what makes the sleep below safe.
            while self.handle.poll(true, &mut completions) > 0 {
                completions.drain(..).for_each(|completion| self.answered(completion));
            }
            let blocked = match self.write_out() {
                Ok(blocked) => blocked,
                Err(error) => {
                    tracing::debug!(port = self.shared.address(), %error, "the line takes nothing any more");
                    self.ended = Some(true);
                    self.pending.clear();
                    self.early = Vec::new();
                    false
                }
            };
            if !blocked && self.there && self.receive() > 0 {
                continue;
            }
            let now = Instant::now();
            if self.read_in(now) {
                continue;
            }
            let until = match self.end(now) {
                Err(()) => return,
                Ok(until) => until,
            };
            self.sleep(blocked, until);
        }
    }

    /// All there is of it. Nothing is with the device, and nothing changes.
    fn export(&self) -> io::Result<Said> {
        let theirs = || io::Error::other("its line is this process's");
        let (descriptors, terminal) = self.line.export().ok_or_else(theirs)??;
        if self.ended.is_some() {
            return Err(io::Error::other("its line has ended"));
        }
        let mut for_line = self.early.clone();
        for arrival in self.pending.iter().filter(|arrival| arrival.argument() == u64::from(self.port)) {
            arrival.read(&mut for_line)?;
        }
        for_line.drain(..self.skip.min(for_line.len()));
        let mut for_device = Vec::new();
        for request in &self.unsent {
            let mut bytes = vec![0; request.length as usize];
            let read = request.buffer.as_ref().map(|buffer| buffer.read_at(0, &mut bytes));
            read.ok_or(io::ErrorKind::NotConnected)?.map_err(|_| io::ErrorKind::NotConnected)?;
            for_device.extend(bytes);
        }
        for_device.extend_from_slice(&self.unread);
        let stream = StreamState {
            terminal,
            lane: self.lane,
            told: self.told,
            plugged: self.plugged,
            size: self.size,
            there: self.there,
            hung_up: self.hung_up,
        };
        Ok(Said { descriptors, stream: Some((stream, Bytes { for_line, for_device })) })
    }

    fn wait_for_device(&self) {
        let mut fds = [
            PollFd::from_borrowed_fd(self.shared.stop_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.handle.notify().fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.handle.device_fd(), PollFlags::IN),
        ];
        let _ = poll(&mut fds, Timespec::try_from(SOON).ok().as_ref());
    }

    fn receive(&mut self) -> usize {
        let found = self.handle.receive(true, &mut self.pending);
        if found > 0 {
            self.last_word = Instant::now();
        }
        found
    }

    /// What the device has now.
    fn look_at_offer(&mut self) {
        let offer = self.binding.offer();
        let same = match (&offer, &self.offer) {
            (Some(now), Some(before)) => Arc::ptr_eq(now, before),
            (now, before) => now.is_none() && before.is_none(),
        };
        if same {
            return;
        }
        let port = match offer.as_deref() {
            Some(Offer::Stream(stream)) => stream.ports.iter().find(|port| port.index == self.port).cloned(),
            _ => None,
        };
        self.offer = offer;
        let was = std::mem::replace(&mut self.plugged, port.is_some());
        if !self.plugged || !was {
            // A port that was plugged in again knows nothing of us.
            self.told = None;
        }
        if let Some(size) = port.and_then(|port| port.size)
            && self.size != Some(size)
        {
            self.size = Some(size);
            self.line.resize(size.0, size.1);
        }
    }

    /// Tells the device whether somebody is there, if it does not know.
    fn tell(&mut self) {
        if !self.plugged || self.told == Some(self.there) {
            return;
        }
        self.told = Some(self.there);
        match self.binding.set_open(self.port, self.there) {
            // A device without control queues has no use for it.
            Ok(()) | Err(ControlError::NoQueues | ControlError::Revoked) => {}
            Err(error) => {
                tracing::warn!(port = self.shared.address(), open = self.there, %error, "the device was not told");
            }
        }
    }

    /// Gives the line what has arrived; whether it takes nothing more now.
    fn write_out(&mut self) -> io::Result<bool> {
        if !self.there {
            // Nobody would read it: it stays where the device can see that.
            return Ok(!self.pending.is_empty() || !self.early.is_empty());
        }
        while self.skip < self.early.len() {
            match rustix::io::write(self.line.output(), &self.early[self.skip..]) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(true),
                Ok(written) => self.skip += written,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if !self.early.is_empty() {
            (self.early, self.skip) = (Vec::new(), 0);
        }
        while let Some(arrival) = self.pending.first() {
            // A lane may come to carry another port: its bytes are not this line's.
            let is_ours = arrival.argument() == u64::from(self.port);
            while is_ours && self.skip < arrival.len() {
                match arrival.write_to(self.line.output(), &[], self.skip) {
                    Ok(0) => return Ok(true),
                    Ok(written) => self.skip += written,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                    Err(error) => return Err(error),
                }
            }
            self.skip = 0;
            self.pending.pop_front();
            self.last_word = Instant::now();
        }
        Ok(false)
    }

    fn answered(&mut self, completion: Completion) {
        self.last_word = Instant::now();
        match completion.result {
            Ok(()) => self.buffer = completion.buffer,
            // The port was pulled out meanwhile: what was written waits for its return.
            Err(IoError::Invalid) if completion.buffer.is_some() && completion.user > 0 => {
                self.rests = Some(Instant::now() + REST);
                self.unsent.push(self.request(completion.user as u32, completion.buffer));
            }
            Err(error) => {
                self.buffer = completion.buffer;
                self.rests = Some(Instant::now() + REST);
                self.lost += completion.user;
                tracing::warn!(port = self.shared.address(), %error, lost = self.lost, "the device failed a write");
            }
        }
    }

    fn request(&self, length: u32, buffer: Option<Buffer>) -> IoRequest {
        let (op, offset) = (IoOp::Send, u64::from(self.port));
        IoRequest { user: u64::from(length), op, offset, length, flags: IoFlags::default(), buffer }
    }

    fn may_write(&self, now: Instant) -> bool {
        self.plugged && self.rests.is_none_or(|rests| rests <= now)
    }

    fn wants_input(&self, now: Instant) -> bool {
        self.buffer.is_some() && self.ended.is_none() && self.may_write(now) && (self.there || self.hung_up)
    }

    /// Hands what the line has to the device; whether there is reason to look again at once.
    fn read_in(&mut self, now: Instant) -> bool {
        if !self.unsent.is_empty() {
            return self.may_write(now) && self.submit(now);
        }
        if !self.unread.is_empty() {
            return self.may_write(now) && self.send_unread(now);
        }
        if !self.wants_input(now) {
            return false;
        }
        let bytes = match self.line.take(&mut self.scratch) {
            Taken::Bytes(bytes) => bytes,
            Taken::Later => {
                self.hung_up = false;
                return false;
            }
            Taken::Away => {
                (self.hung_up, self.there) = (false, false);
                return true;
            }
            Taken::Ended(bytes, at_once) => {
                self.ended = Some(at_once);
                self.last_word = now;
                bytes
            }
        };
        let Some(buffer) = self.buffer.take_if(|_| bytes > 0) else { return true };
        if buffer.write_at(0, &self.scratch[..bytes]).is_ok() {
            self.unsent.push(self.request(bytes as u32, Some(buffer)));
        }
        self.submit(now)
    }

    /// Hands the device what another process had read.
    fn send_unread(&mut self, now: Instant) -> bool {
        let Some(buffer) = self.buffer.take() else { return false };
        let bytes = self.unread.len().min(buffer.len() as usize);
        let rest = self.unread.split_off(bytes);
        let piece = std::mem::replace(&mut self.unread, rest);
        if buffer.write_at(0, &piece).is_ok() {
            self.unsent.push(self.request(bytes as u32, Some(buffer)));
        }
        self.submit(now)
    }

    fn submit(&mut self, now: Instant) -> bool {
        match self.handle.submit(&mut self.unsent) {
            Ok(()) => true,
            Err(SubmitError::Full) => {
                self.rests = Some(now + REST);
                false
            }
            // The notify says when, and whether, it goes on.
            Err(SubmitError::Held | SubmitError::Revoked | SubmitError::Inside) => false,
        }
    }

    /// `Err`: everything is over. Else when to look again at the latest.
    fn end(&mut self, now: Instant) -> Result<Option<Instant>, ()> {
        let rests = self.rests.filter(|rests| *rests > now);
        let Some(at_once) = self.ended else { return Ok(rests) };
        if self.handle.in_flight() > 0 || !self.unsent.is_empty() {
            // A device that takes nothing is not waited for by somebody who leaves.
            let late = self.last_word + QUIET;
            return if at_once && late <= now {
                Err(())
            } else {
                Ok(Some(rests.unwrap_or(now + REST).max(now + REST)))
            };
        }
        let quiet = self.last_word + QUIET;
        if at_once || (self.pending.is_empty() && self.early.is_empty() && quiet <= now) {
            Err(())
        } else {
            Ok(Some(quiet.max(now + REST)))
        }
    }

    fn sleep(&mut self, blocked: bool, until: Option<Instant>) {
        let now = Instant::now();
        let timeout = until.and_then(|until| Timespec::try_from(until.saturating_duration_since(now)).ok());
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.shared.stop_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.handle.notify().fd(), PollFlags::IN),
        ];
        if self.handle.in_flight() > 0 {
            fds.push(PollFd::from_borrowed_fd(self.handle.device_fd(), PollFlags::IN));
        }
        if let Some(arrivals) = self.handle.arrival_fd().filter(|_| !blocked && self.there) {
            fds.push(PollFd::from_borrowed_fd(arrivals, PollFlags::IN));
        }
        if blocked && self.there {
            fds.push(PollFd::from_borrowed_fd(self.line.output(), PollFlags::OUT));
        }
        if let Some(comes) = self.line.comes().filter(|_| !self.there) {
            fds.push(PollFd::from_borrowed_fd(comes, PollFlags::IN));
        }
        // A hang-up is told whether it is asked for or not, and then for ever.
        let hears = self.there && !self.hung_up && self.ended.is_none();
        if hears {
            let flags = if self.wants_input(now) { PollFlags::IN } else { PollFlags::empty() };
            fds.push(PollFd::from_borrowed_fd(self.line.input(), flags));
        }
        // EINTR leads to another look.
        let _ = poll(&mut fds, timeout.as_ref());
        let gone = PollFlags::HUP | PollFlags::ERR;
        let hung_up = hears && fds.last().is_some_and(|fd| fd.revents().intersects(gone));
        drop(fds);
        self.hung_up |= hung_up;
        if !self.there && self.ended.is_none() {
            self.there = self.line.is_somebody_there();
        }
    }

    /// What has arrived goes out as long as the grace allows; then everything closes.
    fn leave(mut self) {
        let linger = Instant::now() + LINGER;
        while matches!(self.write_out(), Ok(true)) && self.there {
            let left = self.shared.stop_at().unwrap_or(linger).saturating_duration_since(Instant::now());
            let Some(timeout) = Timespec::try_from(left).ok().filter(|_| !left.is_zero()) else { break };
            let mut fds = [PollFd::from_borrowed_fd(self.line.output(), PollFlags::OUT)];
            let _ = poll(&mut fds, Some(&timeout));
        }
        self.shared.severed(!self.pending.is_empty() || !self.early.is_empty());
        // Of a binding that serves on.
        if self.told == Some(true) {
            let _ = self.binding.set_open(self.port, false);
        }
    }
}
