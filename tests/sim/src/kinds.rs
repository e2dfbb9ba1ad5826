//! The words that a fault is made of: kinds of request, and lies about one.

use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_ID_RNG};

/// The kinds of request, of all classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// VIRTIO_BLK_T_IN.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_GET_ID.
    GetId,
    /// VIRTIO_BLK_T_DISCARD.
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    WriteZeroes,
    /// Any other type; answered as unsupported.
    Unknown,
    /// A frame that a driver transmits (section 5.1.6.2), or bytes that it writes to a port (section 5.3.6).
    Transmit,
    /// A frame, or bytes of a port, that the device puts into buffers that the driver posted.
    Receive,
    /// A command on the control queue (section 5.1.6.5), or a control message from the driver (section 5.3.6.2).
    Control,
    /// A control message of a console to the driver (section 5.3.6.2).
    Message,
    /// A buffer to fill with random bytes (section 5.4.6).
    Entropy,
}

impl Op {
    /// Every kind and its name in a fault specification.
    pub const NAMES: &'static [(&'static str, Self)] = &[
        ("read", Self::Read),
        ("write", Self::Write),
        ("flush", Self::Flush),
        ("get-id", Self::GetId),
        ("discard", Self::Discard),
        ("write-zeroes", Self::WriteZeroes),
        ("unknown", Self::Unknown),
        ("transmit", Self::Transmit),
        ("receive", Self::Receive),
        ("control", Self::Control),
        ("message", Self::Message),
        ("entropy", Self::Entropy),
    ];
}

/// A lie about one request. One that means nothing to the request's class is not told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// The used element names an id that the ring does not have. The request itself is never answered.
    UsedIdUnknown,
    /// The used element names a descriptor that heads no chain in flight. The request itself is never answered.
    UsedIdIdle,
    /// The request is answered twice.
    UsedIdTwice,
    /// The used length is more than the chain can take.
    LengthLong,
    /// The used length is 0, whatever was written.
    LengthZero,
    /// The used length is 1, whatever was written: less than any header.
    LengthOne,
    /// The used index is shown further along than elements were written, by more than the ring holds.
    UsedIndexJump,
    /// The used index is shown one back.
    UsedIndexBack,
    /// The status byte is left as it was.
    StatusUnwritten,
    /// The status byte is none that the specification knows.
    StatusUnknown,
    /// One bit of what was read is turned over.
    PayloadFlipped,
    /// A read is answered well and the payload left as it was.
    PayloadUnwritten,
    /// A write is answered well and forgotten.
    WriteForgotten,
    /// A flush is answered well and forgotten: what it should have made safe still dies in a power cut.
    FlushForgotten,
    /// The request is executed and never answered.
    AnswerForgotten,
    /// The answer comes without the notification that the driver asked for.
    NotificationLost,
    /// A notification comes although the driver wants none, before the answer.
    NotificationSpurious,
    /// The request's own first descriptor is overwritten before the answer (a driver must not read its own table back).
    DescriptorScribbled,
    /// The available ring's entry is overwritten before the answer.
    AvailableScribbled,
    /// Entropy: fewer bytes than asked for, at least one. The specification allows it.
    AnswerShort,
    /// Net, received: `num_buffers` 0.
    BuffersZero,
    /// Net, received: `num_buffers` one more than come.
    BuffersMore,
    /// Net, received: `num_buffers` 65535.
    BuffersHuge,
    /// Net, received: header flags that the specification does not know.
    FlagsUnknown,
    /// Net, received: a kind of segmentation that the specification does not know.
    GsoUnknown,
    /// Net, received: a segmentation that was not negotiated, with a segment size of 0.
    GsoUnasked,
    /// Net, received: a checksum that begins beyond the frame.
    ChecksumBeyond,
    /// Net, received: a header and no frame.
    FrameEmpty,
    /// Console: a control message of drawn bytes.
    MessageGarbage,
    /// Console: a control message cut short of its header.
    MessageShort,
    /// Console: a control message about a port that cannot be.
    PortUnknown,
    /// Console: a control message with an event that the specification does not know.
    EventUnknown,
}

impl Lie {
    /// The virtio device id of the class that can tell it; `None`: each. To another class it means nothing.
    pub fn class(self) -> Option<u32> {
        match self {
            Self::PayloadFlipped | Self::WriteForgotten | Self::FlushForgotten => Some(VIRTIO_ID_BLOCK),
            Self::AnswerShort => Some(VIRTIO_ID_RNG),
            Self::BuffersZero
            | Self::BuffersMore
            | Self::BuffersHuge
            | Self::FlagsUnknown
            | Self::GsoUnknown
            | Self::GsoUnasked
            | Self::ChecksumBeyond
            | Self::FrameEmpty => Some(VIRTIO_ID_NET),
            Self::MessageGarbage | Self::MessageShort | Self::PortUnknown | Self::EventUnknown => {
                Some(VIRTIO_ID_CONSOLE)
            }
            _ => None,
        }
    }

    /// Every lie and its name in a fault specification.
    pub const NAMES: &'static [(&'static str, Self)] = &[
        ("used-id-unknown", Self::UsedIdUnknown),
        ("used-id-idle", Self::UsedIdIdle),
        ("used-id-twice", Self::UsedIdTwice),
        ("length-long", Self::LengthLong),
        ("length-zero", Self::LengthZero),
        ("length-one", Self::LengthOne),
        ("used-index-jump", Self::UsedIndexJump),
        ("used-index-back", Self::UsedIndexBack),
        ("status-unwritten", Self::StatusUnwritten),
        ("status-unknown", Self::StatusUnknown),
        ("payload-flipped", Self::PayloadFlipped),
        ("payload-unwritten", Self::PayloadUnwritten),
        ("write-forgotten", Self::WriteForgotten),
        ("flush-forgotten", Self::FlushForgotten),
        ("answer-forgotten", Self::AnswerForgotten),
        ("notification-lost", Self::NotificationLost),
        ("notification-spurious", Self::NotificationSpurious),
        ("descriptor-scribbled", Self::DescriptorScribbled),
        ("available-scribbled", Self::AvailableScribbled),
        ("answer-short", Self::AnswerShort),
        ("buffers-zero", Self::BuffersZero),
        ("buffers-more", Self::BuffersMore),
        ("buffers-huge", Self::BuffersHuge),
        ("flags-unknown", Self::FlagsUnknown),
        ("gso-unknown", Self::GsoUnknown),
        ("gso-unasked", Self::GsoUnasked),
        ("checksum-beyond", Self::ChecksumBeyond),
        ("frame-empty", Self::FrameEmpty),
        ("message-garbage", Self::MessageGarbage),
        ("message-short", Self::MessageShort),
        ("port-unknown", Self::PortUnknown),
        ("event-unknown", Self::EventUnknown),
    ];
}
