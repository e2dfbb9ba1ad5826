//! Whole batches of chains answered in one go, with no record and no fault: for benches.

use super::{Ring, Violation};

impl Ring {
    /// Takes up to `limit` chains, answers each with the length that `each` makes of it, and makes the answers visible in one
    /// go. Returns how many there were.
    #[inline]
    fn each(
        &mut self,
        limit: u16,
        mut each: impl FnMut(&Self, u16) -> Result<u32, Violation>,
    ) -> Result<u16, Violation> {
        let mut count = 0;
        let outcome = loop {
            if count == limit {
                break Ok(());
            }
            let head = match self.take() {
                Ok(Some(head)) => head,
                Ok(None) => break Ok(()),
                Err(violation) => break Err(violation),
            };
            match each(self, head) {
                Ok(written) => self.put(u32::from(head), written),
                Err(violation) => break Err(violation),
            }
            count += 1;
        };
        self.publish();
        outcome.map(|()| count)
    }

    /// Answers up to `limit` available chains with status 0, without a look at header or payload, and makes the answers
    /// visible in one go. Returns how many there were. A chain of exactly 21 writable bytes is a get-id (no payload of
    /// whole sectors has that length) and gets `id`.
    pub fn answer_all(&mut self, limit: u16, id: &[u8; 20]) -> Result<u16, Violation> {
        self.each(limit, |ring, head| {
            let mut total = 0u64;
            let mut last = None;
            let mut first = None;
            ring.walk(head, |segment, writable| {
                if writable && segment.bytes > 0 {
                    total += u64::from(segment.bytes);
                    first = first.or(Some(segment));
                    last = Some(segment);
                }
            })?;
            let Some(last) = last else {
                return Err(Violation::NotARequest { head, readable_bytes: 0, writable_bytes: 0 });
            };
            if total == 21
                && let Some(first) = first
            {
                let bytes = (first.bytes as usize).min(id.len());
                let _ = ring.memory.write(first.address, &id[..bytes]);
            }
            // The walk checked the segment, so this cannot miss.
            let _ = ring.memory.write(last.address + u64::from(last.bytes) - 1, &[0]);
            Ok(total as u32)
        })
    }

    /// Takes up to `limit` chains and gives them back unread.
    pub fn swallow_all(&mut self, limit: u16) -> Result<u16, Violation> {
        self.each(limit, |ring, head| ring.walk(head, |_, _| {}).map(|()| 0))
    }

    /// Puts `bytes` into each of up to `limit` chains, or as much of them as fits.
    pub fn fill_all(&mut self, limit: u16, bytes: &[u8]) -> Result<u16, Violation> {
        self.each(limit, |ring, head| {
            let mut rest = bytes;
            ring.walk(head, |segment, writable| {
                if writable && !rest.is_empty() {
                    let (now, later) = rest.split_at((segment.bytes as usize).min(rest.len()));
                    // The walk checked the segment, so this cannot miss.
                    let _ = ring.memory.write(segment.address, now);
                    rest = later;
                }
            })?;
            Ok((bytes.len() - rest.len()) as u32)
        })
    }
}
