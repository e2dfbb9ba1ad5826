//! Request words: host to driver, three `u64` per request.

/// Words of one request.
pub const WORDS_PER_REQUEST: usize = 3;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Device to payload.
    Read,
    /// Payload to device.
    Write,
    /// Make every write that was acknowledged before durable.
    Flush,
    /// The range's contents are no longer needed.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes,
    /// Read the device's 20-byte identity.
    GetId,
    /// Entropy: random bytes to payload.
    Fill,
    /// Stream: payload to a port.
    Send,
    /// Net: payload is a packet.
    Transmit,
    /// A code this SDK does not know; a driver refuses it as unsupported.
    Other(u8),
}

impl Operation {
    /// The operation of a code of the WIT.
    #[must_use]
    pub const fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Flush,
            3 => Self::Discard,
            4 => Self::WriteZeroes,
            5 => Self::GetId,
            6 => Self::Fill,
            7 => Self::Send,
            8 => Self::Transmit,
            other => Self::Other(other),
        }
    }

    /// The code that crosses.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Flush => 2,
            Self::Discard => 3,
            Self::WriteZeroes => 4,
            Self::GetId => 5,
            Self::Fill => 6,
            Self::Send => 7,
            Self::Transmit => 8,
            Self::Other(code) => code,
        }
    }
}

/// One request. The host has checked it against the driver's properties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Names the request until it is answered.
    pub token: u32,
    /// What to do.
    pub operation: Operation,
    /// Modifiers, by the service.
    pub flags: u8,
    /// What the service says: an offset in bytes on the medium, a port, where the checksum goes.
    pub argument: u64,
    /// Length in bytes of the payload or of the range; 0 for flush, 20 for get-id.
    pub length: u64,
}

impl Request {
    /// Block, write-zeroes only: the range may be deallocated.
    #[must_use]
    pub fn may_unmap(&self) -> bool {
        self.flags & 1 != 0
    }

    /// Block: byte offset on the medium; 0 for flush and get-id.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.argument
    }

    /// Reads the three words of a request.
    #[must_use]
    pub fn decode(words: [u64; WORDS_PER_REQUEST]) -> Self {
        let [head, argument, length] = words;
        Self {
            token: head as u32,
            operation: Operation::from_code((head >> 32) as u8),
            flags: (head >> 40) as u8,
            argument,
            length,
        }
    }

    /// The three words of this request.
    #[must_use]
    pub fn encode(&self) -> [u64; WORDS_PER_REQUEST] {
        let head = u64::from(self.token) | u64::from(self.operation.code()) << 32 | u64::from(self.flags) << 40;
        [head, self.argument, self.length]
    }
}

/// The requests of one `submit`, in the order in which the host admitted them.
#[derive(Clone, Debug)]
pub struct Requests<'a> {
    words: core::slice::ChunksExact<'a, u64>,
}

impl<'a> Requests<'a> {
    /// Views `words` as requests; a trailing part that is no whole request is ignored (the host writes none).
    #[must_use]
    pub fn new(words: &'a [u64]) -> Self {
        Self { words: words.chunks_exact(WORDS_PER_REQUEST) }
    }
}

impl Iterator for Requests<'_> {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        let words = self.words.next()?;
        Some(Request::decode([words[0], words[1], words[2]]))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.words.size_hint()
    }
}

impl ExactSizeIterator for Requests<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_its_words() {
        for code in 0..=9 {
            let request = Request {
                token: 0xdead_beef,
                operation: Operation::from_code(code),
                flags: code,
                argument: 1 << 41,
                length: 4096,
            };
            assert_eq!(Request::decode(request.encode()), request);
        }
    }

    #[test]
    fn the_bits_are_those_of_the_contract() {
        let words =
            Request { token: 7, operation: Operation::WriteZeroes, flags: 1, argument: 512, length: 1024 }.encode();
        assert_eq!(words, [7 | 4 << 32 | 1 << 40, 512, 1024]);
    }
}
