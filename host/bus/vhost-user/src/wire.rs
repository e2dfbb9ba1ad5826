//! One vhost-user message and its answer, under a time limit.
//!
//! The request codes and message layouts are those of rust-vmm's `vhost` crate. Its `Frontend` is not used, because it cannot be bounded:
//! its send and receive loops take `EAGAIN` for "try again", so a socket time-out makes them spin for ever; an answer that is shorter
//! than expected (qemu's way of refusing `GET_CONFIG`) makes them wait for the rest; and it hides who sent an answer, which [`Peer`] needs.
//!
//! A connection that failed once is out of step and never used again: it is shut down, so that the backend notices too.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use cofferdam_device::TransportError;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_passcred, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix,
    SocketFlags, SocketType, connect, recv, sendmsg, shutdown, socket_with,
};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE, VhostUserHeaderFlag};

use crate::credentials::receive;
use crate::error::ConnectError;
use crate::peer::{Peer, wait};

/// How long a backend may take to accept a connection, to take a message and to answer it, each.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// Descriptors that one message may carry (vhost-user, "Ancillary data": 8 memory regions).
pub(crate) const MAX_FDS: usize = 8;

/// Bytes of a message header: request, flags, payload size, 32 bits each, in the machine's byte order.
pub(crate) const HEADER_BYTES: usize = 12;

/// Protocol version in the low bits of the flags.
pub(crate) const VERSION: u32 = 1;

/// What the connection is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    /// In use.
    Open,
    /// The peer closed it, or its process ended.
    ClosedByPeer,
    /// It was shut down from here for this reason; what the backend does now is not known.
    ShutDown(String),
}

/// A connection to a backend.
pub(crate) struct Wire {
    socket: OwnedFd,
    link: Link,
    peer: Peer,
    /// `VHOST_USER_PROTOCOL_F_REPLY_ACK` is negotiated: every message is answered.
    acks: bool,
    /// The question whose answer is awaited.
    pending: Option<FrontendReq>,
    /// What has come of that answer so far, and from whom.
    inbox: Vec<u8>,
    senders: [Option<i32>; 2],
}

/// The moment [`ANSWER_LIMIT`] from now.
pub(crate) fn limit() -> Instant {
    Instant::now() + ANSWER_LIMIT
}

impl Wire {
    /// The connection.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Connects to the socket at `path`, within [`ANSWER_LIMIT`].
    pub(crate) fn connect(path: &Path) -> Result<Self, ConnectError> {
        let failed = |what| move |errno| ConnectError::from_errno(path, what, errno);
        let address = SocketAddrUnix::new(path).map_err(failed("address"))?;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(failed("socket"))?;
        // Before anything can arrive: `credentials::receive` depends on it.
        set_socket_passcred(&socket, true).map_err(failed("set SO_PASSCRED"))?;
        // A full accept queue blocks a connect; the send time-out bounds that. Everything later waits with `poll`.
        set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_LIMIT)).map_err(failed("set SO_SNDTIMEO"))?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed("connect")(errno)),
            }
        }
        Ok(Wire {
            socket,
            link: Link::Open,
            peer: Peer::Unseen,
            acks: false,
            pending: None,
            inbox: Vec::new(),
            senders: [None; 2],
        })
    }

    /// A connection that another process has made, on which no question is open.
    pub(crate) fn adopt(socket: OwnedFd, peer: Peer, acks: bool) -> Self {
        Wire { socket, link: Link::Open, peer, acks, pending: None, inbox: Vec::new(), senders: [None; 2] }
    }

    /// In use, and no question is open.
    pub(crate) fn is_idle(&self) -> bool {
        self.link == Link::Open && self.pending.is_none() && self.inbox.is_empty()
    }

    /// From now on every message asks for an acknowledgement (`REPLY_ACK` is negotiated).
    pub(crate) fn expect_acks(&mut self) {
        self.acks = true;
    }

    /// Whether messages are acknowledged, so that their refusal is seen.
    pub(crate) fn has_acks(&self) -> bool {
        self.acks
    }

    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Asks a question and returns the payload of its answer. A time-out ends the connection.
    pub(crate) fn ask(&mut self, request: FrontendReq, body: &[u8], until: Instant) -> Result<Vec<u8>, TransportError> {
        self.begin(request, body, until)?;
        let answer = self.finish(until);
        self.end_when_late(answer)
    }

    /// Sends a message that is answered only with an acknowledgement, if at all.
    ///
    /// # Errors
    /// `Refused` when the backend acknowledged with a failure; the connection stays good then.
    pub(crate) fn tell(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<(), TransportError> {
        if !self.acks {
            return self.exchange(|wire| wire.send(request, VERSION, body, fds, until));
        }
        let flags = VERSION | VhostUserHeaderFlag::NEED_REPLY.bits();
        self.exchange(|wire| wire.send(request, flags, body, fds, until))?;
        self.pending = Some(request);
        let answer = self.finish(until);
        match number(request, &self.end_when_late(answer)?)? {
            0 => Ok(()),
            status => Err(TransportError::Refused(format!("{request:?} failed in the backend (status {status})"))),
        }
    }

    /// Asks a question whose answer [`Wire::finish`] takes. Nothing else can be sent until then.
    pub(crate) fn begin(&mut self, request: FrontendReq, body: &[u8], until: Instant) -> Result<(), TransportError> {
        self.exchange(|wire| wire.send(request, VERSION, body, &[], until))?;
        self.pending = Some(request);
        Ok(())
    }

    /// As [`Wire::begin`], for a message that carries descriptors and is answered with an acknowledgement. Only where messages are acknowledged.
    pub(crate) fn begin_acknowledged(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<(), TransportError> {
        let flags = VERSION | VhostUserHeaderFlag::NEED_REPLY.bits();
        self.exchange(|wire| wire.send(request, flags, body, fds, until))?;
        self.pending = Some(request);
        Ok(())
    }

    /// Takes the answer to the question that was begun, waiting until `until` at most.
    ///
    /// # Errors
    /// After `Timeout`, and only then, the question stays open and this may be called again.
    pub(crate) fn finish(&mut self, until: Instant) -> Result<Vec<u8>, TransportError> {
        let Some(request) = self.pending.take() else {
            return Err(TransportError::Invalid("no question is open".to_owned()));
        };
        let answer = self.exchange(|wire| match wire.answer(request, until) {
            // Not for `exchange` to end.
            Err(TransportError::Timeout) => Ok(None),
            answer => answer.map(Some),
        })?;
        if answer.is_none() {
            self.pending = Some(request);
        }
        answer.ok_or(TransportError::Timeout)
    }

    fn end_when_late<T>(&mut self, answer: Result<T, TransportError>) -> Result<T, TransportError> {
        if matches!(answer, Err(TransportError::Timeout)) {
            self.shut_down("a message was not answered in time");
        }
        answer
    }

    /// Whether the connection is gone. Never blocks. A message that nobody asked for counts as gone: the two sides are out of step,
    /// and left alone it would make the socket readable for ever.
    pub(crate) fn is_lost(&mut self) -> bool {
        if self.link == Link::Open {
            match recv(&self.socket, &mut [0u8; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                Ok((_, 1..)) if self.pending.is_some() => {}
                Ok((_, 1..)) => self.shut_down("the backend sent a message that nobody asked for"),
                Ok((_, 0)) | Err(_) => self.link = Link::ClosedByPeer,
            }
        }
        self.link != Link::Open || self.peer.is_gone()
    }

    /// Ends the connection from this side.
    pub(crate) fn shut_down(&mut self, reason: &str) {
        // It fails only when the peer was faster.
        let _ = shutdown(&self.socket, Shutdown::Both);
        if self.link == Link::Open {
            self.link = Link::ShutDown(reason.to_owned());
        }
    }

    fn exchange<T>(&mut self, run: impl FnOnce(&mut Self) -> Result<T, TransportError>) -> Result<T, TransportError> {
        if self.link != Link::Open {
            return Err(TransportError::Lost);
        }
        if self.pending.is_some() {
            return Err(TransportError::Invalid("a question is open".to_owned()));
        }
        let result = run(self);
        match &result {
            Ok(_) => {}
            Err(TransportError::Lost) => self.link = Link::ClosedByPeer,
            Err(error) => {
                let reason = error.to_string();
                self.shut_down(&reason);
            }
        }
        result
    }

    fn send(
        &self,
        request: FrontendReq,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<(), TransportError> {
        tracing::trace!(?request, bytes = body.len(), fds = fds.len(), "vhost-user message");
        let size = u32::try_from(body.len())
            .ok()
            .filter(|_| body.len() <= MAX_MSG_SIZE && fds.len() <= MAX_FDS)
            .ok_or_else(|| TransportError::Invalid(format!("{request:?} is too long")))?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        for word in [u32::from(request), flags, size] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(body);
        let mut sent = 0;
        while sent < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            // Descriptors travel with the first byte; `MAX_FDS` of them always fit.
            if sent == 0 && !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let rest = [IoSlice::new(bytes.get(sent..).unwrap_or_default())];
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.socket, &rest, &mut control, flags) {
                Ok(some) => sent += some,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, until)?,
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(TransportError::Lost),
                Err(errno) => return Err(io(request, errno)),
            }
        }
        Ok(())
    }

    /// Receives one answer. After a `Timeout` the next call goes on where this one stopped.
    fn answer(&mut self, request: FrontendReq, until: Instant) -> Result<Vec<u8>, TransportError> {
        let protocol = |what: String| Err(TransportError::Protocol(format!("answer to {request:?}: {what}")));
        self.fill(request, HEADER_BYTES, until)?;
        let word = |at: usize| {
            let word = self.inbox.get(at..at + 4).and_then(|word| word.try_into().ok());
            word.map_or(0, u32::from_ne_bytes)
        };
        let (code, flags, size) = (word(0), word(4), word(8) as usize);
        if code != u32::from(request) {
            return protocol(format!("it is one to request {code}"));
        }
        // A backend may leave NEED_REPLY as it was asked.
        let expected = VERSION | VhostUserHeaderFlag::REPLY.bits();
        if flags & !VhostUserHeaderFlag::NEED_REPLY.bits() != expected {
            return protocol(format!("flags {flags:#x}"));
        }
        if size > MAX_MSG_SIZE {
            return protocol(format!("{size} bytes, more than {MAX_MSG_SIZE}"));
        }
        self.fill(request, HEADER_BYTES + size, until)?;
        // Once per answer: the proof in `peer` counts questions, not pieces.
        let [first, last] = self.senders;
        self.peer.answered_by(first);
        if last != first {
            self.peer.answered_by(last);
        }
        let body = self.inbox.split_off(HEADER_BYTES);
        self.inbox.clear();
        Ok(body)
    }

    /// Receives until the inbox has `total` bytes.
    fn fill(&mut self, request: FrontendReq, total: usize, until: Instant) -> Result<(), TransportError> {
        while self.inbox.len() < total {
            let mut piece = [0; 512];
            let most = piece.len().min(total - self.inbox.len());
            let room = piece.get_mut(..most).unwrap_or_default();
            match receive(self.socket.as_fd(), room) {
                Ok((0, _)) => return Err(TransportError::Lost),
                Ok((bytes, from)) => {
                    if self.inbox.is_empty() {
                        self.senders = [from; 2];
                    } else if from != self.senders[0] {
                        self.senders[1] = from;
                    }
                    self.inbox.extend_from_slice(room.get(..bytes).unwrap_or_default());
                }
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) => self.wait(PollFlags::IN, until)?,
                    Some(Errno::INTR) => {}
                    Some(Errno::CONNRESET) => return Err(TransportError::Lost),
                    _ => {
                        let what = format!("{request:?}");
                        return Err(TransportError::Io { what, source: error });
                    }
                },
            }
        }
        Ok(())
    }

    fn wait(&self, what: PollFlags, until: Instant) -> Result<(), TransportError> {
        match wait(self.socket.as_fd(), what, until) {
            Ok(true) => Ok(()),
            Ok(false) => Err(TransportError::Timeout),
            Err(errno) => Err(TransportError::Io { what: "poll".to_owned(), source: errno.into() }),
        }
    }
}

/// The 64-bit number that an answer consists of.
pub(crate) fn number(request: FrontendReq, payload: &[u8]) -> Result<u64, TransportError> {
    payload
        .try_into()
        .map(u64::from_ne_bytes)
        .map_err(|_| TransportError::Protocol(format!("answer to {request:?}: {} bytes instead of 8", payload.len())))
}

fn io(request: FrontendReq, errno: Errno) -> TransportError {
    TransportError::Io { what: format!("{request:?}"), source: errno.into() }
}
