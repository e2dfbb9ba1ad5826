//! Packets of the kernel to requests: each is read into leased memory, where the device finds it.
//!
//! How long a packet is, is known when it has been read. So one `readv(2)` is given the header, a small buffer, and the part of a large one that lies beyond the small one's length:
//!
//! ```text
//! header | small, S bytes |
//!                 large:  | - S bytes - | the rest |      only where packets may come unsegmented
//! ```
//!
//! Nearly every packet fits into the small one and is not copied. Of one that does not, the first S bytes (a page or three) are copied, and the small one is used for the next.

use std::io;
use std::os::fd::BorrowedFd;

use cofferdam_manager::transfer::{self, Space};
use cofferdam_manager::{Buffer, Completion, Handle, IoFlags, IoOp, IoRequest, LeaseError, NetProperties, SubmitError};

use crate::header::{self, HEADER_BYTES};
use crate::shared::{Counts, add};

/// Most packets of one crossing into the driver.
pub(crate) const BATCH: usize = 64;
/// Most packets of one lane that the device has not sent yet: one ring's worth.
pub const IN_FLIGHT: usize = 256;
/// Of them, most that are longer than the MTU: 64 KiB each.
pub const LARGE_IN_FLIGHT: usize = 32;

const PAGE_BYTES: u32 = 4096;
/// Link header, VLAN tag, and one byte by which a packet is seen to be too long.
const AROUND_BYTES: u32 = 14 + 4 + 1;
/// `user` of requests with a large buffer; the others have 0.
const LARGE: u64 = 1;

/// What a look at the interface came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// A batch was read, there may be more.
    More,
    /// There is nothing in it now.
    Dry,
    /// Something has to be answered first: the device's ring is full, or there is no memory.
    Full,
    /// The binding holds new work back, and says when it does no longer.
    Held,
    /// The right has ended.
    Revoked,
    /// The interface is gone.
    Lost,
}

/// One lane's.
pub(crate) struct Inbound {
    small_bytes: u32,
    /// 0 where no packet is longer than the MTU.
    large_bytes: u32,
    /// Small buffers that wait for a packet; never more than [`IN_FLIGHT`] with those in flight.
    small: Vec<Buffer>,
    large: Option<Buffer>,
    /// What was read and not admitted yet, in order.
    staged: Vec<IoRequest>,
    in_flight: usize,
    large_in_flight: usize,
    scratch: Vec<u8>,
}

impl Inbound {
    pub(crate) fn new(net: &NetProperties) -> Inbound {
        let small_bytes = (u32::from(net.mtu) + AROUND_BYTES).next_multiple_of(PAGE_BYTES);
        let longest = net.max_packet_bytes + 1;
        let large_bytes = if longest > small_bytes { longest } else { 0 };
        Inbound {
            small_bytes,
            large_bytes,
            small: Vec::new(),
            large: None,
            staged: Vec::with_capacity(BATCH),
            in_flight: 0,
            large_in_flight: 0,
            scratch: Vec::new(),
        }
    }

    /// Reads up to [`BATCH`] packets of `tap` and hands them to the device.
    pub(crate) fn look(&mut self, tap: BorrowedFd<'_>, handle: &Handle, counts: &Counts) -> Look {
        let mut look = Look::More;
        while look == Look::More && self.staged.len() < BATCH {
            look = match self.read(tap, handle, counts) {
                Ok(()) => Look::More,
                Err(look) => look,
            };
        }
        match self.submit(handle, counts) {
            Ok(()) => look,
            Err(SubmitError::Revoked | SubmitError::Inside) => Look::Revoked,
            Err(SubmitError::Full) => Look::Full,
            Err(SubmitError::Held) => Look::Held,
        }
    }

    /// Reads one packet.
    fn read(&mut self, tap: BorrowedFd<'_>, handle: &Handle, counts: &Counts) -> Result<(), Look> {
        let no_lease = |error: LeaseError| if error == LeaseError::Revoked { Look::Revoked } else { Look::Full };
        if self.in_flight + self.staged.len() >= IN_FLIGHT {
            return Err(Look::Full);
        }
        if self.small.is_empty() {
            self.small.push(handle.lease(self.small_bytes).map_err(no_lease)?);
        }
        if self.large_bytes > 0 && self.large.is_none() {
            if self.large_in_flight >= LARGE_IN_FLIGHT {
                return Err(Look::Full);
            }
            self.large = Some(handle.lease(self.large_bytes).map_err(no_lease)?);
        }
        let Some(small) = self.small.last() else { return Err(Look::Full) };
        let mut header = [0; HEADER_BYTES];
        let read = match &self.large {
            None => {
                let mut spaces = [Space::Bytes(&mut header), Space::Shared(small, 0..self.small_bytes)];
                transfer::receive(tap, &mut spaces, 0)
            }
            Some(large) => {
                let rest = Space::Shared(large, self.small_bytes..self.large_bytes);
                let mut spaces = [Space::Bytes(&mut header), Space::Shared(small, 0..self.small_bytes), rest];
                transfer::receive(tap, &mut spaces, 0)
            }
        };
        let length = match read {
            Ok(bytes) => bytes.saturating_sub(HEADER_BYTES) as u32,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(Look::Dry),
            // EBADFD: somebody deleted the interface.
            Err(_) => return Err(Look::Lost),
        };
        // A packet that fills all there is was longer.
        let fits = length > 0 && length < self.small_bytes.max(self.large_bytes);
        let Some((flags, argument)) = header::from_kernel(&header, length).filter(|_| fits) else {
            add(&counts.refused_by_device, 1);
            return Ok(());
        };
        let (user, buffer) = if length <= self.small_bytes { (0, self.small.pop()) } else { (LARGE, self.join()) };
        let Some(buffer) = buffer else {
            add(&counts.refused_by_device, 1);
            return Ok(());
        };
        self.large_in_flight += usize::from(user == LARGE);
        let (op, offset, flags) = (IoOp::Transmit, argument, IoFlags(flags));
        self.staged.push(IoRequest { user, op, offset, length, flags, buffer: Some(buffer) });
        Ok(())
    }

    /// The large buffer, with what is in the small one before what is in it.
    fn join(&mut self) -> Option<Buffer> {
        let (small, large) = (self.small.last()?, self.large.take()?);
        self.scratch.resize(self.small_bytes as usize, 0);
        small.read_at(0, &mut self.scratch).ok()?;
        large.write_at(0, &self.scratch).ok()?;
        Some(large)
    }

    fn submit(&mut self, handle: &Handle, counts: &Counts) -> Result<(), SubmitError> {
        if self.staged.is_empty() {
            return Ok(());
        }
        let before = self.staged.len();
        let result = handle.submit(&mut self.staged);
        let admitted = before - self.staged.len();
        self.in_flight += admitted;
        add(&counts.to_device, admitted as u64);
        result
    }

    /// Books what was answered.
    pub(crate) fn answered(&mut self, completions: &mut Vec<Completion>, counts: &Counts) {
        let mut refused = 0;
        for completion in completions.drain(..) {
            self.in_flight = self.in_flight.saturating_sub(1);
            refused += u64::from(completion.result.is_err());
            if completion.user == LARGE {
                self.large_in_flight = self.large_in_flight.saturating_sub(1);
            } else if let Some(buffer) = completion.buffer {
                self.small.push(buffer);
            }
        }
        add(&counts.refused_by_device, refused);
    }

    /// Whether something is with the device, so that an answer will come.
    pub(crate) fn waits(&self) -> bool {
        self.in_flight > 0
    }

    /// Hands the device what was read, and reads nothing more; whether all of it is sent and answered.
    pub(crate) fn finish(&mut self, handle: &Handle, counts: &Counts) -> bool {
        // What is refused now is tried again.
        let _ = self.submit(handle, counts);
        self.staged.is_empty() && self.in_flight == 0
    }

    /// Gives back every buffer that is not with the device.
    pub(crate) fn end(&mut self) {
        self.small = Vec::new();
        self.large = None;
        self.staged = Vec::new();
    }
}
