//! The receiving end of one connection: its socket, the bytes that were read ahead of need, and whether more is likely.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::proto::REQUEST_BYTES;
use crate::service::Buffer;
use crate::service::transfer::{Space, receive};

/// Requests that are read ahead of need at most.
const READ_AHEAD_REQUESTS: usize = 64;
/// Bytes that one connection reads ahead, as long as it sends no small writes.
pub(crate) const READ_AHEAD_BYTES: usize = READ_AHEAD_REQUESTS * REQUEST_BYTES;
/// Bytes that a connection which sends small writes reads ahead, with their payload: some thirty of 4 KiB in one system call, and about half of what a Unix socket holds.
pub(crate) const BULK_BYTES: usize = 128 * 1024;

/// Reads of what is thrown away at the end: no more than others of the same thread can spare, and with 64 KiB each what
/// a Unix socket holds by default many times over.
const GOODBYE_READS: usize = 32;

/// What a read came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Got {
    /// That many bytes, at least one.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The peer sends no more.
    End,
}

/// A non-blocking stream socket under edge-triggered readiness.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: OwnedFd,
    /// [`READ_AHEAD_BYTES`] long until the first small write, [`BULK_BYTES`] from then on.
    ahead: Vec<u8>,
    start: usize,
    end: usize,
    /// The socket may hold bytes.
    pub(crate) readable: bool,
    /// The socket may take bytes.
    pub(crate) writable: bool,
    /// The peer closed its sending side: read on until the end shows.
    pub(crate) hung_up: bool,
    /// Nothing that is sent reaches anybody.
    pub(crate) gone: bool,
}

impl Wire {
    pub(crate) fn new(socket: OwnedFd) -> Wire {
        Wire {
            socket,
            ahead: vec![0; READ_AHEAD_BYTES],
            start: 0,
            end: 0,
            readable: true,
            writable: true,
            hung_up: false,
            gone: false,
        }
    }

    /// A connection of another process, with what that one had read ahead.
    pub(crate) fn adopt(socket: OwnedFd, mut ahead: Vec<u8>, hung_up: bool) -> Wire {
        let end = ahead.len();
        ahead.resize(end.max(READ_AHEAD_BYTES), 0);
        Wire { ahead, end, hung_up, ..Wire::new(socket) }
    }

    /// More may have come, and may go, while nobody looked.
    pub(crate) fn look_again(&mut self) {
        (self.readable, self.writable) = (true, true);
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What was read ahead and not taken.
    pub(crate) fn ahead(&self) -> &[u8] {
        &self.ahead[self.start..self.end]
    }

    /// Marks `bytes` of [`Wire::ahead`] as taken.
    pub(crate) fn take(&mut self, bytes: usize) {
        self.start = (self.start + bytes).min(self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Reads ahead, up to `limit` bytes in all (bounded by [`BULK_BYTES`]); never less than one byte of room is asked for.
    pub(crate) fn fill(&mut self, limit: usize) -> io::Result<Got> {
        if self.start > 0 {
            self.ahead.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        // What came over from another process may be more than is ever read ahead here.
        let limit = limit.min(BULK_BYTES).max(self.end);
        if limit == self.end {
            return Ok(Got::Nothing);
        }
        if limit > self.ahead.len() {
            self.ahead.resize(BULK_BYTES, 0);
        }
        let asked = limit - self.end;
        let result = receive(self.socket.as_fd(), &mut [Space::Bytes(&mut self.ahead[self.end..limit])], 0);
        let got = self.judge(result, asked)?;
        if let Got::Bytes(bytes) = got {
            self.end += bytes;
        }
        Ok(got)
    }

    /// Reads payload into a lease, and with `header_follows` the head of the next request behind it, in one system
    /// call. `Bytes` counts the lease's bytes alone. Nothing may be read ahead.
    pub(crate) fn fill_lease(&mut self, buffer: &Buffer, range: Range<u32>, header_follows: bool) -> io::Result<Got> {
        debug_assert!(self.ahead().is_empty());
        let tail = if header_follows { REQUEST_BYTES } else { 0 };
        let bytes = range.len();
        let result =
            receive(self.socket.as_fd(), &mut [Space::Shared(buffer, range), Space::Bytes(&mut self.ahead[..tail])], 0);
        Ok(match self.judge(result, bytes + tail)? {
            Got::Bytes(got) => {
                self.end = got.saturating_sub(bytes);
                Got::Bytes(got.min(bytes))
            }
            other => other,
        })
    }

    /// Reads what nobody wants.
    pub(crate) fn drain(&mut self, scratch: &mut [u8]) -> io::Result<Got> {
        let asked = scratch.len();
        let result = receive(self.socket.as_fd(), &mut [Space::Bytes(scratch)], 0);
        self.judge(result, asked)
    }

    /// Ends both directions in order. What came in and was not read is thrown away first, bounded: closed over it, the
    /// kernel would tell the peer of a reset (unix(7), RFC 1122 section 4.2.2.13) in place of an end behind the last
    /// answer.
    pub(crate) fn say_goodbye(&self, scratch: &mut [u8]) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        for _ in 0..GOODBYE_READS {
            match receive(self.socket.as_fd(), &mut [Space::Bytes(scratch)], 0) {
                Ok(1..) => {}
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// With edge-triggered readiness a short read means that the socket is empty (epoll(7)), which saves the call that
    /// would say so.
    fn judge(&mut self, result: io::Result<usize>, asked: usize) -> io::Result<Got> {
        match result {
            Ok(0) => {
                self.readable = false;
                Ok(Got::End)
            }
            Ok(bytes) => {
                self.readable = bytes == asked || self.hung_up;
                Ok(Got::Bytes(bytes))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(Got::Nothing)
            }
            Err(error) => Err(error),
        }
    }
}
