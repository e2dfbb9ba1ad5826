//! Response words (host to driver) and answer words (driver to host).

use super::Status;

/// One response of the device, already checked against what its chain offered.
#[derive(Clone, Copy, Debug)]
pub struct Response<'a> {
    /// The request's token.
    pub token: u32,
    /// Bytes that the device says it wrote, at most what the chain offered. A lower bound (virtio 1.2, section 2.7.8.2).
    pub written: u32,
    /// The chain's `status-in` bytes; 0xff where the device wrote nothing.
    pub status: StatusBytes<'a>,
}

/// The bytes of a chain's `status-in` segments, in order.
#[derive(Clone, Copy, Debug)]
pub struct StatusBytes<'a> {
    words: &'a [u32],
    length: usize,
}

impl StatusBytes<'_> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether the chain had no `status-in`.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The byte at `index`.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<u8> {
        (index < self.length).then(|| self.words[index / 4].to_le_bytes()[index % 4])
    }
}

/// The responses of one `complete`.
#[derive(Clone, Debug)]
pub struct Responses<'a> {
    words: &'a [u32],
}

impl<'a> Responses<'a> {
    /// Views `words` as responses; a part that is no whole response ends the iteration (the host writes none).
    #[must_use]
    pub fn new(words: &'a [u32]) -> Self {
        Self { words }
    }
}

impl<'a> Iterator for Responses<'a> {
    type Item = Response<'a>;

    fn next(&mut self) -> Option<Response<'a>> {
        let (&[token, written, length], rest) = self.words.split_first_chunk()?;
        let length = length as usize;
        let (words, rest) = rest.split_at_checked(length.div_ceil(4))?;
        self.words = rest;
        Some(Response { token, written, status: StatusBytes { words, length } })
    }
}

/// Takes down what a driver says of its responses.
#[derive(Debug)]
pub struct Answers<'a> {
    words: &'a mut Vec<u32>,
}

impl<'a> Answers<'a> {
    /// Writes behind what is already in `words`.
    #[must_use]
    pub fn new(words: &'a mut Vec<u32>) -> Self {
        Self { words }
    }

    /// Answers the request `token`.
    pub fn answer(&mut self, token: u32, status: Status) {
        self.words.extend([token, status.code()]);
    }

    /// The words themselves, for test drivers that break the layout on purpose.
    #[doc(hidden)]
    pub fn words_mut(&mut self) -> &mut Vec<u32> {
        self.words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses_of_different_status_lengths_are_told_apart() {
        let words = [1, 513, 1, 0, 2, 6, 6, 0x0403_0201, 0x0605, 3, 0, 0];
        let seen: Vec<_> = Responses::new(&words)
            .map(|r| (r.token, r.written, (0..r.status.len()).map(|i| r.status.get(i).unwrap()).collect::<Vec<_>>()))
            .collect();
        assert_eq!(seen, [(1, 513, vec![0]), (2, 6, vec![1, 2, 3, 4, 5, 6]), (3, 0, vec![])]);
    }

    #[test]
    fn a_truncated_response_ends_the_iteration_without_a_panic() {
        for words in [&[1][..], &[1, 2], &[1, 2, 9, 0, 0]] {
            assert_eq!(Responses::new(words).count(), 0);
        }
        let words = [1, 1, 1, 0];
        let response = Responses::new(&words).next().unwrap();
        assert_eq!(response.status.get(1), None);
    }
}
