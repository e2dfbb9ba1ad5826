//! Heads of replies, byte for byte ("Simple reply message", "Structured reply chunk message", "Structured reply
//! types").

use crate::proto::{Errno, REPLY_FLAG_DONE, REPLY_HEAD_BYTES, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, reply_type};

/// The bytes of a reply that come before its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    bytes: [u8; REPLY_HEAD_BYTES],
    len: u8,
}

impl Head {
    /// Nothing at all: for data that goes on where the previous item's ended.
    pub(crate) const EMPTY: Head = Head { bytes: [0; REPLY_HEAD_BYTES], len: 0 };

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// A head that another process made; `None` for what is too long to be one.
    pub(crate) fn of(bytes: &[u8]) -> Option<Head> {
        let mut head = Head::EMPTY;
        head.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        head.len = u8::try_from(bytes.len()).ok()?;
        Some(head)
    }

    fn push(&mut self, field: &[u8]) {
        let at = usize::from(self.len);
        self.bytes[at..at + field.len()].copy_from_slice(field);
        self.len += field.len() as u8;
    }

    /// A simple reply; data follows it if the request was a read and `error` is `None`.
    pub(crate) fn simple(cookie: u64, error: Option<Errno>) -> Head {
        let mut head = Head::EMPTY;
        head.push(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        head.push(&error.map_or(0, |e| e as u32).to_be_bytes());
        head.push(&cookie.to_be_bytes());
        head
    }

    fn chunk(cookie: u64, done: bool, kind: u16, payload_bytes: u32) -> Head {
        let mut head = Head::EMPTY;
        head.push(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        head.push(&(if done { REPLY_FLAG_DONE } else { 0 }).to_be_bytes());
        head.push(&kind.to_be_bytes());
        head.push(&cookie.to_be_bytes());
        head.push(&payload_bytes.to_be_bytes());
        head
    }

    /// `NBD_REPLY_TYPE_NONE`: the end of a reply without data.
    pub(crate) fn none(cookie: u64) -> Head {
        Head::chunk(cookie, true, reply_type::NONE, 0)
    }

    /// `NBD_REPLY_TYPE_OFFSET_DATA`; `data_bytes` bytes of data follow it.
    pub(crate) fn offset_data(cookie: u64, done: bool, offset: u64, data_bytes: u32) -> Head {
        let mut head = Head::chunk(cookie, done, reply_type::OFFSET_DATA, data_bytes + 8);
        head.push(&offset.to_be_bytes());
        head
    }

    /// `NBD_REPLY_TYPE_ERROR` without a message; always the last chunk.
    pub(crate) fn error(cookie: u64, error: Errno) -> Head {
        let mut head = Head::chunk(cookie, true, reply_type::ERROR, 6);
        head.push(&(error as u32).to_be_bytes());
        head.push(&0u16.to_be_bytes());
        head
    }

    /// The answer to a request that carries no data back. Success may be a simple reply even when structured replies
    /// are negotiated, except for a read; an error should be structured then.
    pub(crate) fn answer(cookie: u64, error: Option<Errno>, structured: bool, read: bool) -> Head {
        match (structured, error) {
            (true, Some(error)) => Head::error(cookie, error),
            (true, None) if read => Head::none(cookie),
            _ => Head::simple(cookie, error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_what_the_specification_draws() {
        assert_eq!(
            Head::simple(0x0102_0304_0506_0708, Some(Errno::Io)).as_bytes(),
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 1, 2, 3, 4, 5, 6, 7, 8]
        );
        assert_eq!(
            Head::offset_data(9, true, 0x1000, 512).as_bytes(),
            [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 2, 8, 0, 0, 0, 0, 0, 0, 0x10, 0]
        );
        assert_eq!(Head::none(9).as_bytes(), [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0]);
        assert_eq!(
            Head::error(9, Errno::Shutdown).as_bytes(),
            [0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 6, 0, 0, 0, 108, 0, 0]
        );
    }

    #[test]
    fn a_read_never_gets_a_simple_reply_once_structured_replies_are_negotiated() {
        for error in [None, Some(Errno::Inval)] {
            assert_eq!(&Head::answer(1, error, true, true).as_bytes()[..4], &STRUCTURED_REPLY_MAGIC.to_be_bytes());
        }
    }
}
