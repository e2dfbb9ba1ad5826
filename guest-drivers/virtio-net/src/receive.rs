//! Used buffers to packets (section 5.1.6.4).
//!
//! ```text
//! buffer   | header 12 | first piece |      | next piece    |      | last piece |
//! packet               '------------- num_buffers of them in order ------------'
//! ```
//!
//! Buffers come in batches, and a packet may begin in one batch and end in a later one. What has come of it is handed over as an arrival that goes on, since a buffer's name
//! means nothing after its call. So what is wrong with a packet is looked for in its first buffer, where it can still be dropped whole:
//!
//! | the device says | what becomes of it |
//! | --- | --- |
//! | fewer than 12 bytes; no buffers or more than 64 | that buffer is dropped; the next one begins a packet |
//! | less than a link header; a checksum outside the first buffer; segmentation or checksum work that was not negotiated | all buffers of the packet are dropped |
//! | an empty buffer later in a packet | it adds nothing |
//! | more than [`MAX_RECEIVED_BYTES`] | the packet's other buffers are dropped; if a part of it was handed over, it ends with one byte of what comes next |
//!
//! The last is how an arrival ends of which nothing is left to name: an arrival has at least one byte. Its client gets a packet that the device has spoiled, and the next
//! packet is whole.

use cofferdam_sdk::net::{FLAG_NEEDS_CHECKSUM, FLAG_VALID_CHECKSUM, SEGMENT_TCP4, SEGMENT_TCP6, SEGMENTATION_SHIFT};
use cofferdam_sdk::words::ReceivedBuffer;
use cofferdam_sdk::{Arrivals, Offloads, Piece};

use crate::lane::{CHECKSUM_BYTES, GSO_NONE, GSO_TCPV4, GSO_TCPV6, HDR_F_DATA_VALID, HDR_F_NEEDS_CSUM};
use crate::{HEADER_BYTES, LINK_HEADER_BYTES, MAX_RECEIVED_BYTES};

/// Most buffers of one packet: the most pieces of an arrival. The buffers that are planned hold the longest packet in 33.
const MAX_BUFFERS: u16 = 64;

/// The packet that is coming.
#[derive(Debug)]
pub(crate) struct Receiver {
    offloads: Offloads,
    /// Packets may span buffers.
    mergeable: bool,
    /// Buffers of this packet that have not come; 0 between packets.
    left: u16,
    /// It is handed over, not dropped.
    wanted: bool,
    /// A part of it was handed over in an earlier call.
    open: bool,
    /// A part of an earlier packet was handed over, of which nothing more can be named: it ends with the next byte that comes.
    owes_end: bool,
    flags: u8,
    argument: u64,
    /// Bytes of it so far, over all calls.
    bytes: u32,
    /// What has come of it in this call: one piece per buffer, so never more than there is room for.
    pieces: Vec<Piece>,
}

impl Receiver {
    pub(crate) fn new(offloads: Offloads, mergeable: bool) -> Self {
        Self {
            offloads,
            mergeable,
            left: 0,
            wanted: false,
            open: false,
            owes_end: false,
            flags: 0,
            argument: 0,
            bytes: 0,
            pieces: Vec::with_capacity(usize::from(MAX_BUFFERS)),
        }
    }

    /// The next used buffer.
    #[inline]
    pub(crate) fn take(&mut self, buffer: &ReceivedBuffer<'_>, arrivals: &mut Arrivals<'_>) {
        if self.owes_end && buffer.written > 0 {
            // The byte is one of a header or of a packet that is being dropped, so no piece below names it.
            arrivals.arrival(0, 0, false, &[Piece { buffer: buffer.buffer, offset: 0, length: 1 }]);
            self.owes_end = false;
        }
        if self.left == 0 {
            self.begin(buffer);
        } else {
            self.left -= 1;
            self.add(buffer.buffer, 0, buffer.written);
        }
        if self.left == 0 && self.wanted {
            self.end(arrivals);
        }
    }

    /// The call ends: what has come of a packet whose rest has not come is handed over.
    #[inline]
    pub(crate) fn pause(&mut self, arrivals: &mut Arrivals<'_>) {
        if !self.pieces.is_empty() {
            arrivals.arrival(self.flags, self.argument, true, &self.pieces);
            self.pieces.clear();
            self.open = true;
        }
    }

    /// The first buffer of a packet.
    fn begin(&mut self, buffer: &ReceivedBuffer<'_>) {
        self.wanted = false;
        let Some(header) = Header::read(buffer) else { return };
        // Without the feature the field means nothing, and a packet is one buffer.
        let buffers = if self.mergeable { header.num_buffers } else { 1 };
        if !(1..=MAX_BUFFERS).contains(&buffers) {
            return;
        }
        self.left = buffers - 1;
        let length = buffer.written - HEADER_BYTES;
        let Some((flags, argument)) = header.judge(self.offloads, length) else { return };
        (self.wanted, self.flags, self.argument, self.bytes) = (true, flags, argument, 0);
        self.add(buffer.buffer, HEADER_BYTES, length);
    }

    fn add(&mut self, buffer: u32, offset: u32, length: u32) {
        if !self.wanted || length == 0 {
            return;
        }
        self.bytes = self.bytes.saturating_add(length);
        if self.bytes > MAX_RECEIVED_BYTES {
            self.wanted = false;
            self.pieces.clear();
            self.close_without_a_piece();
            return;
        }
        self.pieces.push(Piece { buffer, offset, length });
    }

    /// All buffers of the packet have come.
    fn end(&mut self, arrivals: &mut Arrivals<'_>) {
        self.wanted = false;
        if self.pieces.is_empty() {
            self.close_without_a_piece();
        } else {
            arrivals.arrival(self.flags, self.argument, false, &self.pieces);
            self.pieces.clear();
            self.open = false;
        }
    }

    #[cold]
    fn close_without_a_piece(&mut self) {
        self.owes_end |= self.open;
        self.open = false;
    }
}

/// `struct virtio_net_hdr` as the device wrote it.
#[derive(Clone, Copy)]
struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    num_buffers: u16,
}

impl Header {
    /// None where fewer bytes were written.
    #[inline]
    fn read(buffer: &ReceivedBuffer<'_>) -> Option<Self> {
        Some(Self {
            flags: buffer.byte(0)?,
            gso_type: buffer.byte(1)?,
            hdr_len: buffer.u16(2)?,
            gso_size: buffer.u16(4)?,
            csum_start: buffer.u16(6)?,
            csum_offset: buffer.u16(8)?,
            num_buffers: buffer.u16(10)?,
        })
    }

    /// Flags and argument of the packet, whose first piece has `length` bytes; none where it is to be dropped.
    #[inline]
    fn judge(&self, offloads: Offloads, length: u32) -> Option<(u8, u64)> {
        if length < LINK_HEADER_BYTES {
            return None;
        }
        let (mut flags, mut argument) = (0, 0);
        if self.flags & HDR_F_NEEDS_CSUM != 0 {
            let end = u32::from(self.csum_start) + u32::from(self.csum_offset) + CHECKSUM_BYTES;
            if !offloads.receive_checksum || end > length {
                return None;
            }
            flags |= FLAG_NEEDS_CHECKSUM;
            argument |= u64::from(self.csum_start) | u64::from(self.csum_offset) << 16;
        }
        // Where it was not negotiated it is not believed, but no reason to drop: a backend on Linux's tap passes it on whatever was negotiated. Other flags are ignored, as
        // section 5.1.6.4.2 asks.
        if self.flags & HDR_F_DATA_VALID != 0 && offloads.receive_checksum {
            flags |= FLAG_VALID_CHECKSUM;
        }
        // ECN's bit was never negotiated, so with it the type is none of these.
        let segmentation = match self.gso_type {
            GSO_NONE => return Some((flags, argument)),
            GSO_TCPV4 if offloads.receive_tcp4 => SEGMENT_TCP4,
            GSO_TCPV6 if offloads.receive_tcp6 => SEGMENT_TCP6,
            _ => return None,
        };
        if self.gso_size == 0 {
            return None;
        }
        // `hdr_len` is a hint that nobody may rely on (section 5.1.6.4.2): kept inside what is there.
        let headers = u32::from(self.hdr_len).min(length);
        argument |= u64::from(self.gso_size) << 32 | u64::from(headers) << 48;
        Some((flags | segmentation << SEGMENTATION_SHIFT, argument))
    }
}
