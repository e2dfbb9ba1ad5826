//! A data lane: the request layouts of section 5.2.6, and what a status byte means.
//!
//! ```text
//! read, get-id    header-out 16 | payload-in ...  | status-in 1
//! write           header-out 16 | payload-out ... | status-in 1
//! flush           header-out 16 |                 | status-in 1
//! discard, zeroes header-out 16 | header-out 16 (the range) | status-in 1
//! ```
//!
//! The range is a segment of its own and not joined to the header: section 2.7.4 makes framing free, but some devices (SPDK's among them)
//! take the first descriptor for the header and nothing else.

use cofferdam_sdk::{
    Answers, ChainWriter, DriverError, Lane, LaneSetup, Operation, Request, Requests, Response, Responses, Status,
};

use crate::state::LaneState;
use crate::{ID_BYTES, SECTOR_BYTES, feature, plan};

/// Request types (section 5.2.6).
mod request_type {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// Status bytes (section 5.2.6) besides [`plan::STATUS_OK`].
const STATUS_IOERR: u8 = 1;
const STATUS_UNSUPP: u8 = 2;

/// Flag of a range: write-zeroes may deallocate it (section 5.2.6).
const RANGE_UNMAP: u32 = 1;

/// The lower half of a token tells the requests apart that are in flight on one lane (`wit/words.wit`): a place to remember something of it.
const PLACE: u32 = 0xffff;
/// What is remembered of a token that another instance submitted, or none. It may be a write's, of which a device may report too little; of a read the host itself refuses a
/// success that is short (`wit/words.wit`).
const UNKNOWN: u32 = 0;

/// A data lane of the driver.
#[derive(Debug)]
pub struct VirtioBlkLane {
    features: u64,
    limits: LaneState,
    queues: Vec<u16>,
    /// The queue of the next batch.
    next: usize,
    /// By the token's place, the token and how many bytes a successful response must at least report: the payload of a read, and nothing of a write, because the
    /// reported length may be an underestimate (section 2.7.8.2). A lane that replaced a crashed one does not have it, and takes the device's word.
    least_written: Vec<(u32, u32)>,
}

impl VirtioBlkLane {
    pub(crate) fn new(setup: &LaneSetup) -> Result<Self, DriverError> {
        if setup.queues.is_empty() {
            return Err(DriverError::Host("a lane without a queue".into()));
        }
        Ok(Self {
            features: setup.features,
            limits: LaneState::decode(&setup.state)?,
            queues: setup.queues.clone(),
            next: 0,
            least_written: Vec::new(),
        })
    }

    /// Writes the chain of one request, or says why there is none.
    fn chain(&mut self, request: &Request, queue: u16, chains: &mut ChainWriter<'_>) -> Result<(), Status> {
        let sector = self.check(request)?;
        let least_written = match request.operation {
            Operation::Read | Operation::GetId => request.length as u32,
            _ => 0,
        };
        let segments = Segments { length: request.length as u32, limit: self.limits.max_segment_bytes };
        let written = chains.chain(request.token, queue, |chain| match request.operation {
            Operation::Read => {
                chain.header_out(&header(request_type::IN, sector));
                segments.each(|offset, length| chain.payload_in(offset, length));
                chain.status_in(1);
            }
            Operation::Write => {
                chain.header_out(&header(request_type::OUT, sector));
                segments.each(|offset, length| chain.payload_out(offset, length));
                chain.status_in(1);
            }
            Operation::GetId => {
                chain.header_out(&header(request_type::GET_ID, 0));
                segments.each(|offset, length| chain.payload_in(offset, length));
                chain.status_in(1);
            }
            Operation::Flush => {
                chain.header_out(&header(request_type::FLUSH, 0));
                chain.status_in(1);
            }
            Operation::Discard => {
                chain.header_out(&header(request_type::DISCARD, 0));
                chain.header_out(&range(sector, request.length, 0));
                chain.status_in(1);
            }
            Operation::WriteZeroes => {
                let unmap = request.may_unmap() && self.limits.write_zeroes_may_unmap;
                chain.header_out(&header(request_type::WRITE_ZEROES, 0));
                chain.header_out(&range(sector, request.length, if unmap { RANGE_UNMAP } else { 0 }));
                chain.status_in(1);
            }
            _ => {}
        });
        // `check` keeps every request inside the layout's bounds; were it wrong, the request is refused and nothing else suffers.
        written.map_err(|_| Status::Invalid)?;
        let place = (request.token & PLACE) as usize;
        if place >= self.least_written.len() {
            // The host uses low places first, so this grows to what is in flight at most.
            self.least_written.resize(place + 1, (0, UNKNOWN));
        }
        self.least_written[place] = (request.token, least_written);
        Ok(())
    }

    /// Whether the device may be asked this; gives the sector. The capacity is the host's to check: it changes under a running lane.
    fn check(&self, request: &Request) -> Result<u64, Status> {
        let has = |feature: u64| self.features & feature != 0;
        let limit = match request.operation {
            Operation::Read => self.limits.max_transfer_bytes,
            Operation::GetId => ID_BYTES,
            Operation::Write if has(feature::RO) => return Err(Status::ReadOnly),
            Operation::Write => self.limits.max_transfer_bytes,
            Operation::Flush if !has(feature::FLUSH) => return Err(Status::Unsupported),
            Operation::Flush => return Ok(0),
            Operation::Discard | Operation::WriteZeroes if has(feature::RO) => return Err(Status::ReadOnly),
            Operation::Discard => self.limits.max_discard_bytes,
            Operation::WriteZeroes => self.limits.max_write_zeroes_bytes,
            _ => return Err(Status::Unsupported),
        };
        if limit == 0 {
            return Err(Status::Unsupported);
        }
        let sector = u64::from(SECTOR_BYTES);
        let whole = match request.operation {
            Operation::GetId => request.length == u64::from(ID_BYTES),
            _ => request.offset().is_multiple_of(sector) && request.length.is_multiple_of(sector),
        };
        if !whole || request.length == 0 || request.length > u64::from(limit) {
            return Err(Status::Invalid);
        }
        Ok(request.offset() / sector)
    }

    /// What an out-of-the-ordinary response means. Success with everything written never comes here, so a success here is a short one.
    fn judge(&self, response: &Response<'_>) -> Status {
        let Some(status) = response.status.get(0).filter(|_| response.status.len() == 1) else {
            return Status::DeviceFault;
        };
        match status {
            plan::STATUS_OK => {
                let known = self.least_written.get((response.token & PLACE) as usize);
                let least = known.filter(|(token, _)| *token == response.token).map_or(UNKNOWN, |(_, least)| *least);
                if response.written >= least { Status::Ok } else { Status::DeviceFault }
            }
            STATUS_IOERR => Status::Io,
            STATUS_UNSUPP => Status::Unsupported,
            // Not a status, or (0xff) the device did not write one.
            _ => Status::DeviceFault,
        }
    }
}

impl Lane for VirtioBlkLane {
    fn submit(&mut self, requests: Requests<'_>, chains: &mut ChainWriter<'_>) {
        // One queue per batch: one notification of the device, and the next batch goes to the next queue.
        let queue = self.queues[self.next];
        self.next = (self.next + 1) % self.queues.len();
        for request in requests {
            if let Err(status) = self.chain(&request, queue, chains) {
                chains.refuse(request.token, status);
            }
        }
    }

    fn complete(&mut self, responses: Responses<'_>, answers: &mut Answers<'_>) {
        for response in responses {
            answers.answer(response.token, self.judge(&response));
        }
    }
}

/// `struct virtio_blk_req`'s first 16 bytes: type, reserved, sector.
fn header(request_type: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&request_type.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// `struct virtio_blk_discard_write_zeroes`: sector, sectors, flags. `length` was checked to fit.
fn range(sector: u64, length: u64, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&((length / u64::from(SECTOR_BYTES)) as u32).to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// A payload cut to the device's longest segment.
#[derive(Clone, Copy)]
struct Segments {
    length: u32,
    limit: u32,
}

impl Segments {
    fn each(self, mut segment: impl FnMut(u32, u32)) {
        let mut offset = 0;
        while offset < self.length {
            let length = self.limit.min(self.length - offset);
            segment(offset, length);
            offset += length;
        }
    }
}
