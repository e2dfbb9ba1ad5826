//! What came by itself: a packet, or a piece of a stream, in buffers of the binding.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use cofferdam_device::arrivals::{Head, Piece};
use cofferdam_device::transfer;

use crate::lane::posted::Pool;

/// What arrived, in the order in which it came. Dropping or clearing it gives all of its buffers back to the device together, which costs a fraction of giving them back one by
/// one. Memory of its own is used again.
///
/// Once the binding's device is silent there is nothing in it any more, and reading is an error.
#[derive(Default)]
pub struct Arrivals {
    list: Vec<Entry>,
    /// How many of them have been let go of.
    gone: usize,
    /// Where their buffers are: one pool, but for a client that receives on several lanes.
    pools: Vec<Arc<Pool>>,
}

/// An arrival, kept.
struct Entry {
    head: Head,
    pieces: Pieces,
    /// Index of its pool.
    pool: u16,
}

/// What an arrival is made of: nearly always one piece, which then takes no memory of its own.
enum Pieces {
    One(Piece),
    Several(Box<[Piece]>),
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

impl Arrivals {
    /// Of none.
    #[must_use]
    pub fn new() -> Arrivals {
        Arrivals::default()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.list.len() - self.gone
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Each of them.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Arrival<'_>> {
        self.list[self.gone..].iter().map(|entry| Arrival {
            pool: &self.pools[usize::from(entry.pool)],
            head: entry.head,
            pieces: &entry.pieces,
        })
    }

    /// The one that came first.
    #[must_use]
    pub fn first(&self) -> Option<Arrival<'_>> {
        self.iter().next()
    }

    /// Lets go of the one that came first; false if there is none.
    pub fn pop_front(&mut self) -> bool {
        if self.len() < 2 {
            let was_there = !self.is_empty();
            self.clear();
            return was_there;
        }
        if let Some(entry) = self.list.get(self.gone) {
            self.pools[usize::from(entry.pool)].release(entry.pieces.iter());
            self.gone += 1;
        }
        // A client that always keeps one makes the list no longer for that.
        if 2 * self.gone > self.list.len() {
            self.list.drain(..std::mem::take(&mut self.gone));
        }
        true
    }

    /// Lets go of all of them.
    pub fn clear(&mut self) {
        for (number, pool) in (0..).zip(&self.pools) {
            let of_it = self.list[self.gone..].iter().filter(|entry| entry.pool == number);
            pool.release(of_it.flat_map(|entry| entry.pieces.iter()));
        }
        self.list.clear();
        self.gone = 0;
        // A pool that nothing is of may be one of a binding that has left.
        self.pools.truncate(1);
    }

    /// The number of a pool that something is added of.
    fn pool(&mut self, pool: &Arc<Pool>) -> u16 {
        if self.is_empty() && self.pools.first().is_none_or(|known| !Arc::ptr_eq(known, pool)) {
            self.pools.clear();
        }
        let known = self.pools.iter().position(|known| Arc::ptr_eq(known, pool));
        known.unwrap_or_else(|| {
            self.pools.push(Arc::clone(pool));
            self.pools.len() - 1
        }) as u16
    }

    /// Adds arrivals of one piece each.
    #[inline]
    pub(crate) fn extend<'a>(&mut self, pool: &Arc<Pool>, arrivals: impl ExactSizeIterator<Item = (Head, &'a Piece)>) {
        let pool = self.pool(pool);
        // By an iterator that knows its length: each is put together where it stays, not copied from parts that were just written.
        self.list.extend(arrivals.map(|(head, piece)| Entry { head, pieces: Pieces::One(*piece), pool }));
    }

    /// Adds one of any number of pieces.
    pub(crate) fn push(&mut self, pool: &Arc<Pool>, head: Head, pieces: Vec<Piece>) {
        let pool = self.pool(pool);
        let pieces = match pieces[..] {
            [only] => Pieces::One(only),
            _ => Pieces::Several(pieces.into()),
        };
        self.list.push(Entry { head, pieces, pool });
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.clear();
    }
}

impl std::fmt::Debug for Arrivals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// One packet or piece of a stream.
#[derive(Clone, Copy)]
pub struct Arrival<'a> {
    pool: &'a Pool,
    head: Head,
    pieces: &'a [Piece],
}

impl std::fmt::Debug for Arrival<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrival").field("head", &self.head).field("pieces", &self.pieces).finish()
    }
}

impl Arrival<'_> {
    /// What the service says of it (`wit/net.wit`).
    #[must_use]
    pub fn flags(self) -> u8 {
        self.head.flags
    }

    /// What the service says of it: of a stream the port, of a packet its checksum and segments.
    #[must_use]
    pub fn argument(self) -> u64 {
        self.head.argument
    }

    /// Bytes, at least one. 64 pieces of 65,536 bytes at the most.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "an arrival has at least one byte")]
    pub fn len(self) -> usize {
        self.pieces.iter().map(|piece| piece.length as usize).sum()
    }

    /// Appends all of it to `into`.
    ///
    /// # Errors
    /// `NotConnected` once the device is silent; nothing is appended then.
    pub fn read(self, into: &mut Vec<u8>) -> io::Result<()> {
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
    pub fn write_to(self, fd: BorrowedFd<'_>, before: &[u8], skip: usize) -> io::Result<usize> {
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
