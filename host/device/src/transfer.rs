//! Socket I/O straight from and to buffers, without a copy in this process.
//!
//! The kernel is given iovecs of raw addresses: no slice of memory that a device may change is ever made. Each function makes one system call, never
//! more; whether it blocks is the descriptor's own setting. Interrupted calls are repeated.
//!
//! A peer or a device that changes the memory meanwhile changes what is sent, and nothing else.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::buffer::Buffer;

/// Most pieces that one call carries; those after it wait for the next call, as after a short write. An arrival has up to 64, and a header goes before it: a packet goes in one call.
pub const MAX_PIECES: usize = 65;

/// One piece of what is sent.
#[derive(Clone, Debug)]
pub enum Piece<'a> {
    /// Bytes of the host: headers.
    Bytes(&'a [u8]),
    /// A range of a buffer.
    Shared(&'a Buffer, Range<u32>),
}

/// One piece of where received bytes go.
#[derive(Debug)]
pub enum Space<'a> {
    /// Memory of the host: the next header.
    Bytes(&'a mut [u8]),
    /// A range of a buffer.
    Shared(&'a Buffer, Range<u32>),
}

/// Iovecs on the stack, filled from the front.
struct Iovecs {
    entries: [MaybeUninit<libc::iovec>; MAX_PIECES],
    count: usize,
    skip: usize,
}

impl Iovecs {
    /// Leaves out the first `skip` bytes.
    fn new(skip: usize) -> Self {
        Self { entries: [const { MaybeUninit::uninit() }; MAX_PIECES], count: 0, skip }
    }

    /// Adds `len` bytes at `base`; false when full.
    fn push(&mut self, base: *mut u8, len: usize) -> bool {
        let cut = self.skip.min(len);
        self.skip -= cut;
        if cut == len {
            return true;
        }
        let Some(entry) = self.entries.get_mut(self.count) else {
            return false;
        };
        entry.write(libc::iovec { iov_base: base.wrapping_add(cut).cast(), iov_len: len - cut });
        self.count += 1;
        true
    }

    /// Adds pieces until it is full.
    fn push_pieces(&mut self, pieces: &[Piece<'_>]) -> io::Result<()> {
        for piece in pieces {
            let fits = match piece {
                Piece::Bytes(bytes) => self.push(bytes.as_ptr().cast_mut(), bytes.len()),
                Piece::Shared(buffer, range) => self.push_shared(buffer, range)?,
            };
            if !fits {
                break;
            }
        }
        Ok(())
    }

    fn push_shared(&mut self, buffer: &Buffer, range: &Range<u32>) -> io::Result<bool> {
        let (base, len) = buffer
            .host_range(range)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "range outside the buffer"))?;
        Ok(self.push(base, len))
    }
}

/// Sends the pieces in order, but for the first `skip` bytes (what an earlier call sent already), over the socket `fd`. Returns the bytes that were taken, which may be
/// fewer than were left. A peer that is gone is an error (`BrokenPipe`), never a signal.
///
/// # Errors
/// What `sendmsg(2)` says, `WouldBlock` included; `InvalidInput` when a range is outside its buffer.
pub fn send(fd: BorrowedFd<'_>, pieces: &[Piece<'_>], skip: usize) -> io::Result<usize> {
    let mut iovecs = Iovecs::new(skip);
    iovecs.push_pieces(pieces)?;
    if iovecs.count == 0 {
        return Ok(0);
    }
    // SAFETY: `msghdr` is plain old data, all zeroes is a valid empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.entries.as_mut_ptr().cast();
    message.msg_iovlen = iovecs.count as _;
    repeat(|| {
        // SAFETY: the first `count` entries are initialised and lie in `iovecs`, which outlives the call. Each is inside a slice or a buffer that is borrowed for the call. The
        // kernel only reads through the addresses; that a device may write a buffer at the same time is the kernel's copy, not an access of this program.
        unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) }
    })
}

/// Writes the pieces in order, but for the first `skip` bytes, to `fd`: a device of characters, a pipe or a file at its position; for sockets there is [`send`]. Returns the bytes that were
/// taken, which may be fewer than were left.
///
/// # Errors
/// What `writev(2)` says, `WouldBlock` included; `InvalidInput` when a range is outside its buffer. A pipe without a reader is a signal (SIGPIPE), which Rust's runtime ignores.
pub fn write(fd: BorrowedFd<'_>, pieces: &[Piece<'_>], skip: usize) -> io::Result<usize> {
    let mut iovecs = Iovecs::new(skip);
    iovecs.push_pieces(pieces)?;
    if iovecs.count == 0 {
        return Ok(0);
    }
    repeat(|| {
        // SAFETY: as in `send`: the first `count` entries are initialised, each is inside a slice or a buffer that is borrowed for the call, and the kernel only reads through them.
        unsafe { libc::writev(fd.as_raw_fd(), iovecs.entries.as_ptr().cast(), iovecs.count as libc::c_int) }
    })
}

/// Receives into the spaces in order, but for the first `skip` bytes (what an earlier call filled already). `fd` is a socket, a pipe or a file at its
/// position. Returns the bytes that came, which may be fewer than there is space; 0 is the end of the stream, or no space.
///
/// # Errors
/// What `readv(2)` says, `WouldBlock` included; `InvalidInput` when a range is outside its buffer.
pub fn receive(fd: BorrowedFd<'_>, spaces: &mut [Space<'_>], skip: usize) -> io::Result<usize> {
    let mut iovecs = Iovecs::new(skip);
    for space in spaces {
        let fits = match space {
            Space::Bytes(bytes) => iovecs.push(bytes.as_mut_ptr(), bytes.len()),
            Space::Shared(buffer, range) => iovecs.push_shared(buffer, range)?,
        };
        if !fits {
            break;
        }
    }
    if iovecs.count == 0 {
        return Ok(0);
    }
    repeat(|| {
        // SAFETY: the first `count` entries (at most 65) are initialised and lie in `iovecs`, which outlives the call. Each is inside a slice that is borrowed exclusively
        // for the call, or inside a buffer, whose memory no reference ever points to.
        unsafe { libc::readv(fd.as_raw_fd(), iovecs.entries.as_ptr().cast(), iovecs.count as libc::c_int) }
    })
}

fn repeat(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(bytes) = usize::try_from(call()) {
            return Ok(bytes);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

impl Buffer {
    /// Receives into `range` of the buffer; see [`receive`].
    ///
    /// # Errors
    /// As [`receive`].
    pub fn receive_from(&self, fd: BorrowedFd<'_>, range: Range<u32>) -> io::Result<usize> {
        receive(fd, &mut [Space::Shared(self, range)], 0)
    }

    /// Sends `range` of the buffer; see [`send`].
    ///
    /// # Errors
    /// As [`send`].
    pub fn send_to(&self, fd: BorrowedFd<'_>, range: Range<u32>) -> io::Result<usize> {
        send(fd, &[Piece::Shared(self, range)], 0)
    }
}
