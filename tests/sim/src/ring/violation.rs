//! What drivers do wrong, by name.

use super::MAX_QUEUE_SIZE;

/// What a driver did that the specification does not allow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Ring size of zero, above [`MAX_QUEUE_SIZE`], or not a power of two (section 2.7).
    #[error("ring size {0} is not a power of two up to {MAX_QUEUE_SIZE}")]
    RingSize(u16),
    /// A part of the ring is outside the memory or unaligned (section 2.7).
    #[error("{part} at {address:#x} is outside the memory or unaligned")]
    RingAddress {
        /// Which of the three parts.
        part: &'static str,
        /// Its I/O address.
        address: u64,
    },
    /// The available index moved by more than the ring holds (section 2.7.13.2).
    #[error("available index moved from {from} to {to} in a ring of {size}")]
    AvailableIndex {
        /// Where the device was.
        from: u16,
        /// What the driver wrote.
        to: u16,
        /// Entries in the ring.
        size: u16,
    },
    /// A descriptor index is not below the table's length.
    #[error("descriptor {index} in a table of {size}")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// Entries in the table.
        size: u32,
    },
    /// A chain is longer than its table, so it is a loop (section 2.7.5).
    #[error("chain at {head} is a loop")]
    Loop {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A buffer is outside the memory.
    #[error("chain at {head} names {bytes} bytes at {address:#x}, which is outside the memory")]
    Address {
        /// First descriptor of the chain.
        head: u16,
        /// I/O address.
        address: u64,
        /// Length in bytes.
        bytes: u32,
    },
    /// A device-readable descriptor follows a device-writable one (section 2.7.4.2).
    #[error("chain at {head} has a readable descriptor after a writable one")]
    Order {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect table that was not negotiated, is nested, has flags that it must not have, or a bad length (section 2.7.5.3).
    #[error("chain at {head}: indirect table {why}")]
    Indirect {
        /// First descriptor of the chain.
        head: u16,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The same chain was made available again before it was used.
    #[error("chain at {head} is made available again while in flight")]
    InFlight {
        /// First descriptor of the chain.
        head: u16,
    },
    /// More data segments, or a longer one, than the device said it can take (section 5.2.6.1). The request is carried out all
    /// the same, and the queue goes on.
    #[error("chain at {head}: {segments} data segments, the longest of {longest_bytes} bytes, is over the limits")]
    Limits {
        /// First descriptor of the chain.
        head: u16,
        /// Data segments.
        segments: usize,
        /// Length of the longest.
        longest_bytes: u32,
    },
    /// A posted buffer is shorter than the class asks for (section 5.1.6.3.1). It is used all the same, and the queue goes on.
    #[error("buffer at {head} of {writable_bytes} bytes, less than {least_bytes}")]
    Buffer {
        /// First descriptor of the chain.
        head: u16,
        /// Bytes that the device may write.
        writable_bytes: u64,
        /// Bytes that it should have been.
        least_bytes: u64,
    },
    /// Not what its queue is for: not even a header, no byte to write an answer to, or bytes in a direction that the class
    /// does not have there.
    #[error("chain at {head} is no request: {readable_bytes} bytes to read, {writable_bytes} to write")]
    NotARequest {
        /// First descriptor of the chain.
        head: u16,
        /// Bytes that the device may read.
        readable_bytes: u64,
        /// Bytes that the device may write.
        writable_bytes: u64,
    },
}
