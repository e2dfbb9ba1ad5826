//! Replies on their way to one client: heads, and data straight from the leases that hold it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use crate::reply::Head;
use crate::service::Buffer;
use crate::service::transfer::{self, MAX_PIECES, Piece};

/// One stretch of the reply stream. The lease ends when its last byte was taken by the socket (DESIGN section 5).
#[derive(Debug)]
struct Item {
    head: Head,
    data: Option<Buffer>,
    data_bytes: u32,
}

impl Item {
    fn bytes(&self) -> usize {
        self.head.as_bytes().len() + self.data_bytes as usize
    }
}

/// The queue of what is to be sent on one connection. Bounded by its user, who stops making replies while it is long.
#[derive(Debug)]
pub(crate) struct Outbox {
    items: VecDeque<Item>,
    /// Bytes of the first item that are gone already.
    sent: usize,
    held_bytes: u64,
    /// When it last became non-empty.
    pub(crate) since: Instant,
    /// When it last made progress, or became non-empty.
    pub(crate) moved: Instant,
}

/// What a flush came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flushed {
    /// Bytes of leases that ended.
    pub(crate) released_bytes: u64,
    /// The socket takes no more for now.
    pub(crate) blocked: bool,
}

impl Outbox {
    pub(crate) fn new(now: Instant) -> Outbox {
        Outbox { items: VecDeque::new(), sent: 0, held_bytes: 0, since: now, moved: now }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    /// Bytes of leases that wait here for the client.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    pub(crate) fn push(&mut self, now: Instant, head: Head, data: Option<(Buffer, u32)>) {
        if self.items.is_empty() {
            (self.since, self.moved) = (now, now);
        }
        let (data, data_bytes) = data.map_or((None, 0), |(buffer, bytes)| (Some(buffer), bytes));
        self.held_bytes += data.as_ref().map_or(0, |buffer| u64::from(buffer.len()));
        self.items.push_back(Item { head, data, data_bytes });
    }

    /// Throws everything away, because nobody will read it. Returns the bytes of leases that ended.
    pub(crate) fn clear(&mut self) -> u64 {
        self.items.clear();
        self.sent = 0;
        std::mem::take(&mut self.held_bytes)
    }

    /// Everything that is to be sent, as it would go out.
    ///
    /// # Errors
    /// The memory was taken away.
    pub(crate) fn unsent(&self) -> Result<Vec<u8>, cofferdam_manager::RegionError> {
        let mut bytes = Vec::new();
        for item in &self.items {
            bytes.extend_from_slice(item.head.as_bytes());
            if let Some(buffer) = &item.data {
                let at = bytes.len();
                bytes.resize(at + item.data_bytes as usize, 0);
                buffer.read_at(0, &mut bytes[at..])?;
            }
        }
        // Of the first item some may be gone already.
        bytes.drain(..self.sent.min(bytes.len()));
        Ok(bytes)
    }

    /// Hands the socket as much as it takes, many replies in one system call.
    ///
    /// # Errors
    /// The socket's, after which the connection is dead.
    pub(crate) fn flush(&mut self, now: Instant, socket: BorrowedFd<'_>) -> io::Result<Flushed> {
        let mut flushed = Flushed { released_bytes: 0, blocked: false };
        while !self.items.is_empty() {
            let mut pieces: [Piece<'_>; MAX_PIECES] = std::array::from_fn(|_| Piece::Bytes(&[]));
            let (mut count, mut offered) = (0, 0);
            for item in &self.items {
                if count + 2 > MAX_PIECES {
                    break;
                }
                pieces[count] = Piece::Bytes(item.head.as_bytes());
                count += 1;
                if let Some(buffer) = &item.data {
                    pieces[count] = Piece::Shared(buffer, 0..item.data_bytes);
                    count += 1;
                }
                offered += item.bytes();
            }
            match transfer::send(socket, &pieces[..count], self.sent) {
                Ok(taken) => {
                    self.moved = now;
                    let partial = taken < offered - self.sent;
                    self.advance(taken, &mut flushed);
                    // A short count means a full socket: the next call would only say so.
                    if partial {
                        flushed.blocked = true;
                        return Ok(flushed);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    flushed.blocked = true;
                    return Ok(flushed);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(flushed)
    }

    fn advance(&mut self, taken: usize, flushed: &mut Flushed) {
        self.sent += taken;
        while let Some(first) = self.items.front() {
            let bytes = first.bytes();
            if self.sent < bytes {
                break;
            }
            self.sent -= bytes;
            let lease_bytes = first.data.as_ref().map_or(0, |buffer| u64::from(buffer.len()));
            self.held_bytes -= lease_bytes;
            flushed.released_bytes += lease_bytes;
            self.items.pop_front();
        }
    }
}
