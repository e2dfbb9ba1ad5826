//! An independent reader of chain and answer words: it shares no code with the writers, only the contract's constants.

use std::collections::BTreeMap;

use crate::words::{
    KIND_HEADER_OUT, KIND_PAYLOAD_IN, KIND_PAYLOAD_OUT, KIND_STATUS_IN, MAX_HEADER_BYTES, MAX_SEGMENTS,
    MAX_STATUS_BYTES, Operation, QUEUE_REFUSED, Request, Status,
};

/// One segment of a chain that held against the contract.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Bytes that the device reads.
    HeaderOut(Vec<u8>),
    /// Payload that the device reads.
    PayloadOut {
        /// Bytes into the request's payload.
        offset: u32,
        /// Bytes.
        length: u32,
    },
    /// Payload that the device writes.
    PayloadIn {
        /// Bytes into the request's payload.
        offset: u32,
        /// Bytes.
        length: u32,
    },
    /// Bytes that the device writes and the driver gets by value.
    StatusIn {
        /// Bytes.
        length: u32,
    },
}

/// A chain that held against the contract.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedChain {
    /// The queue to publish it on.
    pub queue: u16,
    /// Its segments, as the device sees them.
    pub segments: Vec<Segment>,
}

impl CheckedChain {
    /// Bytes that the device may write.
    #[must_use]
    pub fn writable_bytes(&self) -> u32 {
        let bytes = |segment: &Segment| match segment {
            Segment::PayloadIn { length, .. } | Segment::StatusIn { length } => *length,
            _ => 0,
        };
        self.segments.iter().map(bytes).sum()
    }
}

/// What a driver made of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// To be published.
    Chain(CheckedChain),
    /// Answered at once.
    Refused(Status),
}

/// Reads `words` as the chains of `requests` on a lane that serves `queues`.
///
/// # Errors
/// The first breach of `wit/block.wit`, in a sentence.
pub fn check_chains(requests: &[Request], words: &[u32], queues: &[u16]) -> Result<BTreeMap<u32, Outcome>, String> {
    let wanted: BTreeMap<u32, &Request> = requests.iter().map(|request| (request.token, request)).collect();
    let mut outcomes = BTreeMap::new();
    let mut words = words.iter().copied();
    while let Some(token) = words.next() {
        let request = wanted.get(&token).ok_or_else(|| format!("token {token} was not given"))?;
        let head = words.next().ok_or("a chain without its second word")?;
        let (queue, segments, status) = (head & 0xffff, head >> 16 & 0xff, head >> 24);
        let outcome = if queue == QUEUE_REFUSED {
            match Status::from_code(status) {
                Some(status) if status != Status::Ok && segments == 0 => Outcome::Refused(status),
                _ => return Err(format!("token {token}: a refusal with {segments} segments and status {status}")),
            }
        } else {
            if !queues.contains(&(queue as u16)) {
                return Err(format!("token {token}: queue {queue} is not the lane's"));
            }
            if status != 0 || segments == 0 || segments > MAX_SEGMENTS {
                return Err(format!("token {token}: {segments} segments, status {status}"));
            }
            let segments = (0..segments).map(|_| segment(&mut words)).collect::<Result<Vec<_>, _>>()?;
            check_segments(request, &segments).map_err(|breach| format!("token {token}: {breach}"))?;
            Outcome::Chain(CheckedChain { queue: queue as u16, segments })
        };
        if outcomes.insert(token, outcome).is_some() {
            return Err(format!("token {token} twice"));
        }
    }
    match wanted.keys().find(|token| !outcomes.contains_key(token)) {
        Some(token) => Err(format!("token {token} is missing")),
        None => Ok(outcomes),
    }
}

fn segment(words: &mut impl Iterator<Item = u32>) -> Result<Segment, String> {
    let mut next = || words.next().ok_or("words end inside a segment");
    let word = next()?;
    let (kind, length) = (word & 0xf, word >> 4);
    if length == 0 {
        return Err("an empty segment".into());
    }
    Ok(match kind {
        KIND_HEADER_OUT => {
            let mut bytes = Vec::new();
            for _ in 0..length.div_ceil(4) {
                bytes.extend(next()?.to_le_bytes());
            }
            if bytes.drain(length as usize..).any(|padding| padding != 0) {
                return Err("padding that is not zero".into());
            }
            Segment::HeaderOut(bytes)
        }
        KIND_PAYLOAD_OUT => Segment::PayloadOut { offset: next()?, length },
        KIND_PAYLOAD_IN => Segment::PayloadIn { offset: next()?, length },
        KIND_STATUS_IN => Segment::StatusIn { length },
        other => return Err(format!("segment kind {other}")),
    })
}

fn check_segments(request: &Request, segments: &[Segment]) -> Result<(), String> {
    let (mut header, mut status, mut writable) = (0, 0, false);
    let mut covered: Vec<(u64, u64)> = Vec::new();
    for segment in segments {
        let is_writable = matches!(segment, Segment::PayloadIn { .. } | Segment::StatusIn { .. });
        if writable && !is_writable {
            return Err("device-readable after device-writable".into());
        }
        writable |= is_writable;
        match *segment {
            Segment::HeaderOut(ref bytes) => header += bytes.len(),
            Segment::StatusIn { length } => status += length,
            Segment::PayloadOut { offset, length } | Segment::PayloadIn { offset, length } => {
                let direction = match request.operation {
                    Operation::Write | Operation::Send | Operation::Transmit => Some(false),
                    Operation::Read | Operation::GetId | Operation::Fill => Some(true),
                    _ => None,
                };
                if direction != Some(is_writable) {
                    return Err("payload against its direction".into());
                }
                let (start, end) = (u64::from(offset), u64::from(offset) + u64::from(length));
                if end > request.length {
                    return Err(format!("payload {start}..{end} of {}", request.length));
                }
                if covered.iter().any(|&(s, e)| start < e && s < end) {
                    return Err("payload segments overlap".into());
                }
                covered.push((start, end));
            }
        }
    }
    let covered: u64 = covered.iter().map(|(start, end)| end - start).sum();
    let has_payload = !matches!(
        request.operation,
        Operation::Flush | Operation::Discard | Operation::WriteZeroes | Operation::Other(_)
    );
    if has_payload && covered != request.length {
        return Err(format!("{covered} of {} payload bytes are covered", request.length));
    }
    if header > MAX_HEADER_BYTES || status > MAX_STATUS_BYTES {
        return Err(format!("{header} header and {status} status bytes"));
    }
    Ok(())
}

/// The response words of one response: what the device used, and its status bytes.
#[must_use]
pub fn response_words(token: u32, written: u32, status: &[u8]) -> Vec<u32> {
    let mut words = vec![token, written, status.len() as u32];
    for piece in status.chunks(4) {
        let mut word = [0; 4];
        word[..piece.len()].copy_from_slice(piece);
        words.push(u32::from_le_bytes(word));
    }
    words
}

/// Reads `words` as the answers to the responses `tokens`.
///
/// # Errors
/// The first breach of `wit/block.wit`, in a sentence.
pub fn check_answers(tokens: &[u32], words: &[u32]) -> Result<BTreeMap<u32, Status>, String> {
    let mut answers = BTreeMap::new();
    for pair in words.chunks(2) {
        let &[token, code] = pair else { return Err("half an answer".into()) };
        if !tokens.contains(&token) {
            return Err(format!("token {token} had no response"));
        }
        let status = Status::from_code(code).ok_or_else(|| format!("token {token}: status {code}"))?;
        if answers.insert(token, status).is_some() {
            return Err(format!("token {token} twice"));
        }
    }
    match tokens.iter().find(|token| !answers.contains_key(token)) {
        Some(token) => Err(format!("token {token} is missing")),
        None => Ok(answers),
    }
}
