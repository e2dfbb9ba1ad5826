//! Which disk it is: the id that it tells (virtio 1.2, section 5.2.6, `VIRTIO_BLK_T_GET_ID`), asked for while nobody else has anything on the ring.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_device::words::{self, ID_BYTES};
use cofferdam_device::{
    ChainBatch, Direction, DmaRegion, Doorbell, Expected, IoOp, Outcome, Payload, SplitQueue, Status,
};
use cofferdam_runtime::LaneDriver;

use super::Lane;

/// ASCII, padded with zeroes; a disk without one tells only zeroes, or does not do this at all.
pub(crate) type DiskId = [u8; ID_BYTES as usize];

/// No slot of a ledger has this number.
const TOKEN: u32 = u32::MAX;
/// How long a disk may take to tell it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often it is looked for meanwhile.
const LOOK: Duration = Duration::from_micros(100);

/// Where the disk writes its id: [`ID_BYTES`] bytes of memory that no client is ever given.
pub(crate) struct Place<'a> {
    pub(crate) region: &'a Arc<DmaRegion>,
    pub(crate) offset: u64,
}

/// Why it is not known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotTold {
    /// The disk may be there and slow.
    #[error("it was not told within {PATIENCE:?}")]
    Late,
    /// In a sentence.
    #[error("{0}")]
    Refused(String),
}

impl From<String> for NotTold {
    fn from(why: String) -> NotTold {
        NotTold::Refused(why)
    }
}

/// Asks for it. On error something may be left on the ring, of which a ledger knows nothing and whose answer is nobody's.
pub(crate) fn ask(
    driver: &mut dyn LaneDriver,
    ring: &mut SplitQueue,
    doorbell: &dyn Doorbell,
    place: &Place<'_>,
) -> Result<DiskId, NotTold> {
    let iova = place.region.address_of(place.offset);
    let payload = Some(Payload { iova, length: ID_BYTES, direction: Direction::In });
    let (mut request, mut chains) = (Vec::new(), Vec::new());
    words::push_request(&mut request, TOKEN, IoOp::GetId, 0, 0, u64::from(ID_BYTES));
    driver.submit(&request, &mut chains).map_err(|error| error.to_string())?;
    let mut batch = ChainBatch::new();
    let queue = ring.config().index;
    let parsed = batch.parse(&chains, &[Expected { token: TOKEN, payload }], &[queue]);
    parsed.map_err(|error| error.to_string())?;
    match batch.get(0) {
        Some(Outcome::Chain(chain)) => ring.add(&chain).map_err(|error| error.to_string())?,
        _ => return Err("its driver refuses to ask for it".to_owned().into()),
    }
    if ring.publish() {
        doorbell.ring();
    }
    let until = Instant::now() + PATIENCE;
    let used = loop {
        match ring.pop().map_err(|fault| fault.to_string())? {
            Some(used) => break used,
            None if Instant::now() >= until => return Err(NotTold::Late),
            None => std::thread::sleep(LOOK),
        }
    };
    let (mut response, mut answer, mut verdicts) = (Vec::new(), Vec::new(), Vec::new());
    words::push_response(&mut response, used.token, used.written, used.status());
    driver.complete(&response, &mut answer).map_err(|error| error.to_string())?;
    words::parse_answers(&answer, &[TOKEN], &mut verdicts).map_err(|error| error.to_string())?;
    if verdicts[..] != [(0, Status::Ok)] || used.written < ID_BYTES {
        return Err("the device does not tell it".to_owned().into());
    }
    let mut id = [0; ID_BYTES as usize];
    place.region.read_at(place.offset, &mut id).map_err(|error| error.to_string())?;
    Ok(id)
}

/// For people.
pub(crate) fn shown(id: &DiskId) -> String {
    String::from_utf8_lossy(id).trim_end_matches('\0').to_owned()
}

impl Lane {
    /// The disk's id. Of a lane that nobody has anything on yet.
    pub(crate) fn ask_id(&self, place: &Place<'_>) -> Result<DiskId, NotTold> {
        let mut lease = self.lease();
        let inside = &mut *lease;
        match (&mut inside.driver, &mut inside.ring, &inside.doorbell) {
            (Some(driver), Some(ring), Some(doorbell)) => ask(driver.as_mut(), ring, doorbell.as_ref(), place),
            _ => Err("the lane is gone".to_owned().into()),
        }
    }
}
