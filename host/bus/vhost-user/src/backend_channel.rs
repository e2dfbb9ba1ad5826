//! The backend channel: a socket pair by which the backend speaks first (vhost-user, `VHOST_USER_SET_BACKEND_REQ_FD`).
//!
//! One message is listened to, `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`. It carries nothing: that it came is all there is to know, however often. Others belong to features that
//! are not negotiated here; they are refused if an answer is asked for, and forgotten. Who can forge this: the backend, all of it, at any rate. So
//!
//! - a message is put together in a buffer of its largest size, and one that is larger ends the channel;
//! - a look takes [`LOOK_MESSAGES`] at the most. What is left stays in the socket, where the kernel bounds it and the sender is the one who waits, until a timer has the next
//!   look taken;
//! - nothing is ever waited for: an answer that finds no room ends the channel;
//! - descriptors that come along are closed by the kernel (see `credentials`).
//!
//! The end of the channel is not the end of the device: it serves on, and its changes are not heard of.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use vhost::vhost_user::message::{BackendReq, VhostUserHeaderFlag};

use crate::credentials::receive;
use crate::wire::{HEADER_BYTES, VERSION};

/// Messages that one look takes.
const LOOK_MESSAGES: usize = 64;
/// How long the socket is left alone after a look that took so many: at most 640 messages in a second.
const REST: Duration = Duration::from_millis(100);
/// Largest payload; that of the protocol's own messages on this channel is smaller.
const MAX_BODY_BYTES: usize = 256;

/// This side's end.
#[derive(Debug)]
pub(crate) struct BackendChannel {
    /// `None` once it has ended.
    socket: Option<OwnedFd>,
    /// Readable when a rest is over.
    timer: OwnedFd,
    /// Until when nothing is read.
    rests_until: Option<Instant>,
    /// `VHOST_USER_PROTOCOL_F_REPLY_ACK` is negotiated: messages may ask for an answer.
    acks: bool,
    inbox: [u8; HEADER_BYTES + MAX_BODY_BYTES],
    filled: usize,
    changed: bool,
}

/// What is wrong with a message or with the socket: the channel ends.
struct Over(&'static str);

impl BackendChannel {
    /// A channel and the backend's end of it.
    pub(crate) fn new(acks: bool) -> rustix::io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // Before the backend has its end: `credentials::receive` depends on it.
        set_socket_passcred(&ours, true)?;
        let timer =
            rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let inbox = [0; HEADER_BYTES + MAX_BODY_BYTES];
        Ok((Self { socket: Some(ours), timer, rests_until: None, acks, inbox, filled: 0, changed: false }, theirs))
    }

    /// A channel that another process has made and in which it has read `inbox` of a message that is not whole yet. `changed`: it had not passed on what it had heard.
    ///
    /// # Errors
    /// No timer is to be had, or there is more of a message than one can have.
    pub(crate) fn adopt(socket: OwnedFd, acks: bool, inbox: &[u8], changed: bool) -> rustix::io::Result<Self> {
        let timer =
            rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let mut bytes = [0; HEADER_BYTES + MAX_BODY_BYTES];
        bytes.get_mut(..inbox.len()).ok_or(Errno::INVAL)?.copy_from_slice(inbox);
        Ok(Self { socket: Some(socket), timer, rests_until: None, acks, inbox: bytes, filled: inbox.len(), changed })
    }

    /// What was read of a message that is not whole yet, and whether a change waits to be passed on.
    pub(crate) fn pending(&self) -> (&[u8], bool) {
        (self.inbox.get(..self.filled).unwrap_or_default(), self.changed)
    }

    /// What becomes readable when there is something to look at.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.socket.iter().chain([&self.timer]).map(AsFd::as_fd)
    }

    /// The socket, for whoever looks up what is left open.
    pub(crate) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Whether a change was announced, up to the last look and since this was last asked.
    pub(crate) fn take_change(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Takes what has come. Never blocks.
    pub(crate) fn look(&mut self) {
        if self.rests_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        if self.rests_until.take().is_some() {
            // Disarmed by having expired; it stays readable until it is read.
            let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        }
        for _ in 0..LOOK_MESSAGES {
            match self.next() {
                Ok(true) => {}
                Ok(false) => return,
                Err(Over(why)) => {
                    tracing::warn!(why, "the backend channel has ended: configuration changes are not heard of");
                    self.socket = None;
                    return;
                }
            }
        }
        self.rest();
    }

    fn rest(&mut self) {
        let wait = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec { tv_sec: 0, tv_nsec: i64::from(REST.subsec_nanos()) },
        };
        // It cannot fail with such a value; if it did, the next message would be looked at with what comes after it.
        if rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &wait).is_ok() {
            self.rests_until = Some(Instant::now() + REST);
        }
    }

    /// Takes one message; `false`: it is not all there.
    fn next(&mut self) -> Result<bool, Over> {
        if !self.fill(HEADER_BYTES)? {
            return Ok(false);
        }
        let word = |at: usize| {
            let word = self.inbox.get(at..at + 4).and_then(|word| word.try_into().ok());
            word.map_or(0, u32::from_ne_bytes)
        };
        let (request, flags, size) = (word(0), word(4), word(8) as usize);
        let asks = flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0;
        if flags & !VhostUserHeaderFlag::NEED_REPLY.bits() != VERSION {
            return Err(Over("a message is not of version 1, or an answer"));
        }
        if size > MAX_BODY_BYTES {
            return Err(Over("a message is too long"));
        }
        if !self.fill(HEADER_BYTES + size)? {
            return Ok(false);
        }
        self.filled = 0;
        let known = request == u32::from(BackendReq::CONFIG_CHANGE_MSG) && size == 0;
        self.changed |= known;
        if asks && self.acks {
            self.answer(request, u64::from(!known))?;
        }
        Ok(true)
    }

    /// Receives until the inbox has `total` bytes; `false`: they are not there yet.
    fn fill(&mut self, total: usize) -> Result<bool, Over> {
        let Some(socket) = &self.socket else { return Ok(false) };
        while self.filled < total {
            let Some(room) = self.inbox.get_mut(self.filled..total) else { return Ok(false) };
            match receive(socket.as_fd(), room) {
                Ok((0, _)) => return Err(Over("the backend closed it")),
                Ok((bytes, _)) => self.filled += bytes,
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) => return Ok(false),
                    Some(Errno::INTR) => {}
                    _ => return Err(Over("it cannot be read")),
                },
            }
        }
        Ok(true)
    }

    fn answer(&self, request: u32, status: u64) -> Result<(), Over> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let mut bytes = [0; HEADER_BYTES + 8];
        for (place, word) in bytes.chunks_exact_mut(4).zip([request, VERSION | VhostUserHeaderFlag::REPLY.bits(), 8]) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes[HEADER_BYTES..].copy_from_slice(&status.to_ne_bytes());
        match send(socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            _ => Err(Over("the backend does not take the answers that it asks for")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    const CONFIG_CHANGE: u32 = 2;
    const NEED_REPLY: u32 = 8;

    fn channel(acks: bool) -> (BackendChannel, UnixStream) {
        let (channel, theirs) = BackendChannel::new(acks).unwrap();
        (channel, theirs.into())
    }

    fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
        let words = [request, flags, body.len() as u32];
        words.iter().flat_map(|word| word.to_ne_bytes()).chain(body.iter().copied()).collect()
    }

    fn changed(channel: &mut BackendChannel) -> bool {
        channel.look();
        channel.take_change()
    }

    #[test]
    fn a_change_is_told_once_however_often_it_was_announced() {
        let (mut ours, mut theirs) = channel(false);
        assert!(!changed(&mut ours));
        for _ in 0..3 {
            theirs.write_all(&message(CONFIG_CHANGE, 1, &[])).unwrap();
        }
        assert!(changed(&mut ours));
        assert!(!changed(&mut ours));
    }

    #[test]
    fn a_message_that_comes_in_pieces_is_told_when_it_is_whole() {
        let (mut ours, mut theirs) = channel(false);
        for (at, byte) in message(CONFIG_CHANGE, 1, &[]).iter().enumerate() {
            assert!(!changed(&mut ours), "after {at} bytes");
            theirs.write_all(&[*byte]).unwrap();
        }
        assert!(changed(&mut ours));
    }

    #[test]
    fn an_answer_is_given_where_it_is_asked_for_and_only_where_it_was_negotiated() {
        let (mut ours, mut theirs) = channel(true);
        theirs.write_all(&message(CONFIG_CHANGE, 1 | NEED_REPLY, &[])).unwrap();
        theirs.write_all(&message(3, 1 | NEED_REPLY, &[7; 32])).unwrap();
        theirs.write_all(&message(CONFIG_CHANGE, 1, &[])).unwrap();
        assert!(changed(&mut ours));
        let mut answers = [0; 40];
        theirs.read_exact(&mut answers).unwrap();
        assert_eq!(answers[..20], message(CONFIG_CHANGE, 5, &0u64.to_ne_bytes()));
        assert_eq!(answers[20..], message(3, 5, &1u64.to_ne_bytes()), "what was not negotiated is refused");
        theirs.set_nonblocking(true).unwrap();
        assert!(theirs.read(&mut answers).is_err(), "nobody asked for a third");

        let (mut ours, mut theirs) = channel(false);
        theirs.write_all(&message(CONFIG_CHANGE, 1 | NEED_REPLY, &[])).unwrap();
        assert!(changed(&mut ours));
        theirs.set_nonblocking(true).unwrap();
        assert!(theirs.read(&mut answers).is_err());
    }

    #[test]
    fn garbage_and_the_backends_end_close_the_channel_and_nothing_else() {
        let wrong = [vec![0; 12], vec![0xff; 300], message(CONFIG_CHANGE, 5, &[]), message(4, 1, &[0; 257])];
        for bytes in wrong {
            let (mut ours, mut theirs) = channel(true);
            theirs.write_all(&bytes).unwrap();
            assert!(!changed(&mut ours));
            assert!(ours.socket().is_none(), "{bytes:?}");
            let mut rest = [0];
            // What was not read of it makes this end a reset.
            assert!(!matches!(theirs.read(&mut rest), Ok(1..)));
            assert!(!changed(&mut ours));
        }
        let (mut ours, theirs) = channel(true);
        drop(theirs);
        assert!(!changed(&mut ours) && ours.socket().is_none());
    }

    #[test]
    fn a_flood_is_left_in_the_socket_and_taken_at_a_bounded_rate() {
        let (mut ours, mut theirs) = channel(false);
        theirs.set_nonblocking(true).unwrap();
        let whole = message(CONFIG_CHANGE, 1, &[]);
        let mut flood = || (0..).take_while(|_| theirs.write(&whole).is_ok_and(|sent| sent == whole.len())).count();
        let fits = flood();
        assert!(fits > LOOK_MESSAGES, "{fits} fit");
        assert!(changed(&mut ours));
        let since = Instant::now();
        assert!(flood() <= LOOK_MESSAGES, "a look takes no more");
        while Instant::now() < since + REST / 2 {
            assert!(!changed(&mut ours), "it rests");
        }
        let mut timer = [rustix::event::PollFd::new(&ours.timer, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut timer, Some(&limit)), Ok(1), "somebody has to look again");
        assert!(changed(&mut ours), "what was left is not forgotten");
    }

    #[test]
    fn a_backend_that_asks_for_answers_and_takes_none_is_not_waited_for() {
        let (mut ours, mut theirs) = channel(true);
        theirs.set_nonblocking(true).unwrap();
        let whole = message(CONFIG_CHANGE, 1 | NEED_REPLY, &[]);
        let until = Instant::now() + Duration::from_secs(20);
        while ours.socket().is_some() {
            assert!(Instant::now() < until, "it is still open");
            let _ = theirs.write(&whole);
            ours.rests_until = None;
            ours.look();
        }
    }
}
