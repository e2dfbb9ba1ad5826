//! What came by itself: a packet, or a piece of a stream, in buffers of the binding.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use cofferdam_device::arrivals::{Head, Piece};
use cofferdam_device::transfer;

use crate::lane::posted::Pool;

/// One packet or piece of a stream. Dropping it gives its buffers back to the device. Once the binding's device is silent there is nothing in it any more, and reading is an error.
pub struct Arrival {
    pool: Arc<Pool>,
    head: Head,
    pieces: Pieces,
}

/// What an arrival is made of: nearly always one piece, which then takes no memory of its own.
pub(crate) enum Pieces {
    One(Piece),
    Several(Box<[Piece]>),
}

impl From<&[Piece]> for Pieces {
    #[inline]
    fn from(pieces: &[Piece]) -> Pieces {
        match pieces {
            [only] => Pieces::One(*only),
            _ => Pieces::Several(pieces.into()),
        }
    }
}

impl std::ops::Deref for Pieces {
    type Target = [Piece];

    #[inline]
    fn deref(&self) -> &[Piece] {
        match self {
            Pieces::One(only) => std::slice::from_ref(only),
            Pieces::Several(pieces) => pieces,
        }
    }
}

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrival").field("head", &self.head).field("pieces", &&self.pieces[..]).finish()
    }
}

impl Arrival {
    pub(crate) fn new(pool: Arc<Pool>, head: Head, pieces: Pieces) -> Arrival {
        Arrival { pool, head, pieces }
    }

    /// What the service says of it (`wit/net.wit`).
    #[must_use]
    pub fn flags(&self) -> u8 {
        self.head.flags
    }

    /// What the service says of it: of a stream the port, of a packet its checksum and segments.
    #[must_use]
    pub fn argument(&self) -> u64 {
        self.head.argument
    }

    /// Bytes, at least one. 64 pieces of 65,536 bytes at the most.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "an arrival has at least one byte")]
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.length as usize).sum()
    }

    /// Appends all of it to `into`.
    ///
    /// # Errors
    /// `NotConnected` once the device is silent; nothing is appended then.
    pub fn read(&self, into: &mut Vec<u8>) -> io::Result<()> {
        let start = into.len();
        self.pool.with(|buffers| {
            for piece in self.pieces.iter() {
                let (at, length) = (into.len(), piece.length as usize);
                into.resize(at + length, 0);
                let read =
                    buffers.get(usize::from(piece.buffer)).map(|buffer| buffer.read_at(piece.offset, &mut into[at..]));
                if !matches!(read, Some(Ok(()))) {
                    into.truncate(start);
                    return Err(io::ErrorKind::NotConnected.into());
                }
            }
            Ok(())
        })
    }

    /// Writes `before` and then all of it to `fd` but for the first `skip` bytes, in one `writev(2)`: a device of packets gets one packet. How many bytes were taken.
    ///
    /// # Errors
    /// Those of `writev(2)`, `WouldBlock` included; `NotConnected` once the device is silent.
    pub fn write_to(&self, fd: BorrowedFd<'_>, before: &[u8], skip: usize) -> io::Result<usize> {
        // While the call runs, the buffers stay: whoever takes them back waits for it (DESIGN section 5). `fd` is one that does not block.
        self.pool.with(|buffers| {
            let mut pieces = Vec::with_capacity(1 + self.pieces.len());
            pieces.push(transfer::Piece::Bytes(before));
            for piece in self.pieces.iter() {
                let Some(buffer) = buffers.get(usize::from(piece.buffer)) else {
                    return Err(io::ErrorKind::NotConnected.into());
                };
                pieces.push(transfer::Piece::Shared(buffer, piece.offset..piece.offset + piece.length));
            }
            transfer::write(fd, &pieces, skip)
        })
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.pool.release(&self.pieces);
    }
}
