//! The control lane: whose device it is, what is negotiated, which queues are set up, how many pairs the device is told to use, and what it can do.

use cofferdam_sdk::{
    Attachment, DriverError, LaneSetup, LiveDevice, NetProperties, Offloads, Posting, QueueOwner, QueuePlan,
    VirtioDevice, VirtioDriver, log,
};

use crate::config::Config;
use crate::lane::VirtioNetLane;
use crate::state::LaneState;
use crate::{
    DEVICE_TYPE, HEADER_BYTES, LINK_HEADER_BYTES, MAX_PAIRS, MAX_RECEIVED_BYTES, MAX_SEGMENTED_BYTES, feature,
};

/// Entries of a receive queue that are asked for: what comes in half a millisecond at a million packets per second.
const MAX_RECEIVE_ENTRIES: u16 = 512;
/// Entries of a transmit queue that are asked for.
const MAX_TRANSMIT_ENTRIES: u16 = 1024;
/// Descriptors of a packet that is sent: header and payload.
const MIN_TRANSMIT_ENTRIES: u16 = 2;
/// Entries of the control queue that are asked for: one command at a time, three buffers at most.
const CONTROL_ENTRIES: u16 = 64;
/// Descriptors of a command: what the device reads and what it writes (section 5.1.6.5).
const MIN_CONTROL_ENTRIES: u16 = 2;
/// Bytes of all buffers that are kept on one receive queue, where they are large.
const POSTED_BYTES: u32 = 4 << 20;
/// What buffers are a multiple of, in bytes. Also the least: a packet of Ethernet takes 1,526 with the header (section 5.1.6.3.1).
const BUFFER_UNIT_BYTES: u32 = 2048;
/// Each buffer where a packet may be joined segments: 17 of them hold the longest.
const JOINED_BUFFER_BYTES: u32 = 4096;
/// Longest buffer that can be planned.
const MAX_BUFFER_BYTES: u32 = 65_536;
/// The tag of a VLAN, which an MTU does not count.
const VLAN_TAG_BYTES: u32 = 4;

/// VIRTIO_NET_CTRL_MQ (section 5.1.6.5.5).
const CTRL_MQ: u8 = 4;
/// VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
const CTRL_MQ_VQ_PAIRS_SET: u8 = 0;
/// VIRTIO_NET_OK (section 5.1.6.5).
const ACK_OK: u8 = 0;

/// The control lane of the driver.
#[derive(Debug)]
pub struct VirtioNet {
    features: u64,
    config: Config,
    /// Pairs that were planned, at least 1.
    planned: u16,
    /// Pairs that the device was told to use and agreed to; 1 before, and where it did not (section 5.1.5).
    in_use: u16,
}

impl VirtioDriver for VirtioNet {
    type Lane = VirtioNetLane;
    type Properties = NetProperties;

    fn attach(device: &mut dyn VirtioDevice) -> Result<(Self, Attachment), DriverError> {
        match device.device_type() {
            Some(DEVICE_TYPE) => Self::claim(device),
            Some(other) => Err(DriverError::NotMine(format!("device id {other}; virtio-net is {DEVICE_TYPE}"))),
            None => {
                // The transport cannot tell, so whatever does not fit means that the device is of another kind.
                strange_offer(device.offered_features()).map_or(Ok(()), |why| Err(not_mine(&why)))?;
                Self::claim(device).map_err(|error| match error {
                    DriverError::Device(text) => not_mine(&text),
                    other => other,
                })
            }
        }
    }

    fn properties(&self) -> NetProperties {
        NetProperties {
            mac: self.config.mac,
            mtu: self.config.mtu,
            link_up: self.config.link_up,
            pairs: self.in_use,
            max_packet_bytes: max_packet_bytes(self.features, self.config.mtu),
            offloads: offloads(self.features),
        }
    }

    fn config_changed(&mut self, device: &mut dyn VirtioDevice) -> Result<(), DriverError> {
        let now = Config::read(device, self.features)?;
        if now.mtu != self.config.mtu {
            // Lanes and buffers were made for the other one.
            return Err(DriverError::Device(format!(
                "mtu was {} and is {} under a running driver (virtio 1.2, section 5.1.4)",
                self.config.mtu, now.mtu
            )));
        }
        // Of the rest only the status changes while a device runs.
        self.config.link_up = now.link_up;
        Ok(())
    }

    fn start(setup: &LaneSetup) -> Result<VirtioNetLane, DriverError> {
        VirtioNetLane::new(setup)
    }

    /// Tells the device how many pairs to use: until then it is one (section 5.1.6.5.5). A device that does not agree, or does not answer, is used with one pair, which
    /// every device serves; [`NetProperties::pairs`] says how many it became.
    fn live(&mut self, device: &mut dyn LiveDevice) -> Result<(), DriverError> {
        self.in_use = 1;
        if self.planned == 1 {
            return Ok(());
        }
        let [low, high] = self.planned.to_le_bytes();
        match device.command(&[CTRL_MQ, CTRL_MQ_VQ_PAIRS_SET, low, high], 1).as_deref() {
            Ok([ACK_OK]) => self.in_use = self.planned,
            Ok(other) => {
                log::warn(&format!("the device refused {} pairs with {other:?}: one is used", self.planned));
            }
            Err(error) => log::warn(&format!("{} pairs could not be asked for, one is used: {error}", self.planned)),
        }
        Ok(())
    }
}

impl VirtioNet {
    fn claim(device: &mut dyn VirtioDevice) -> Result<(Self, Attachment), DriverError> {
        let features = choose_features(device.offered_features());
        device.negotiate(features)?;
        // A backend of vhost-user may leave configuration space to its front end, as DPDK's does (it offers STATUS and MQ all the same): then nobody fills the fields in, and where
        // the control queue is, is not known either.
        let mut known = features;
        if device.device_type().is_none() && device.read_config(0, 1).is_err() {
            known &= !(feature::MAC | feature::STATUS | feature::MQ | feature::MTU | feature::CTRL_VQ);
        }
        let config = Config::read(device, known)?;
        let (queues, planned) = plan_queues(device, known, &config)?;
        let state = LaneState { mtu: config.mtu }.encode();
        Ok((Self { features: known, config, planned, in_use: 1 }, Attachment { features, queues, state }))
    }
}

/// What to accept of what is on offer. A bit is not accepted without those that it requires (section 5.1.3.1), whatever the device offers.
pub(crate) fn choose_features(offered: u64) -> u64 {
    let mut features = offered & feature::WANTED;
    for (bit, dependents) in DEPENDENTS {
        if features & bit == 0 {
            features &= !dependents;
        }
    }
    if features & feature::MRG_RXBUF == 0 {
        // Joined segments would need buffers of 65,562 bytes (section 5.1.6.3.1), and none is longer than 65,536.
        features &= !feature::GUEST_TSO;
    }
    features
}

/// Bits that this driver accepts only with another, which stands first (section 5.1.3.1).
const DEPENDENTS: [(u64, u64); 3] =
    [(feature::CSUM, feature::HOST_TSO), (feature::GUEST_CSUM, feature::GUEST_TSO), (feature::CTRL_VQ, feature::MQ)];

/// Bits that tell another kind of device where they come without the first. Those that require CTRL_VQ are not among them: a backend of vhost-user may leave the control queue
/// to its front end. Nor is ECN, which requires segmentation: DPDK's backend offers HOST_ECN with its segmentation switched off, as it is unless asked for.
const TOLD_BY: [(u64, u64); 2] = [
    (feature::CSUM, feature::HOST_TSO | feature::HOST_UFO),
    (feature::GUEST_CSUM, feature::GUEST_TSO | feature::GUEST_UFO),
];

/// Why an offer is not that of a network device, if it is not: for transports that do not tell what a device is. Most bits mean something else elsewhere, but a network
/// device offers none without what it requires (section 2.2.2), and each that is known has one of the three bits below.
fn strange_offer(offered: u64) -> Option<String> {
    let strange = offered & !feature::OF_A_NET_DEVICE;
    if strange != 0 {
        return Some(format!("it offers features {strange:#x}"));
    }
    for (needed, dependents) in TOLD_BY {
        if offered & needed == 0 && offered & dependents != 0 {
            return Some(format!("it offers {:#x} and not {needed:#x}, which that requires", offered & dependents));
        }
    }
    let telling = feature::MRG_RXBUF | feature::STATUS | feature::CTRL_VQ;
    (offered & telling == 0).then(|| format!("it offers none of {telling:#x}"))
}

/// What was negotiated, in the words of the service.
pub(crate) fn offloads(features: u64) -> Offloads {
    let has = |bit: u64| features & bit != 0;
    Offloads {
        transmit_checksum: has(feature::CSUM),
        receive_checksum: has(feature::GUEST_CSUM),
        transmit_tcp4: has(feature::HOST_TSO4),
        transmit_tcp6: has(feature::HOST_TSO6),
        receive_tcp4: has(feature::GUEST_TSO4),
        receive_tcp6: has(feature::GUEST_TSO6),
    }
}

/// Largest packet that a lane takes, in bytes.
pub(crate) fn max_packet_bytes(features: u64, mtu: u16) -> u32 {
    if features & feature::HOST_TSO != 0 { MAX_SEGMENTED_BYTES } else { u32::from(mtu) + LINK_HEADER_BYTES }
}

/// As many pairs as device, operator and this driver allow, and the control queue. How many pairs there are.
fn plan_queues(
    device: &dyn VirtioDevice,
    features: u64,
    config: &Config,
) -> Result<(Vec<QueuePlan>, u16), DriverError> {
    let control = control_queue(device, features, config);
    let mut wanted = config.pairs.min(MAX_PAIRS).min(device.max_queues() / 2).min(device.max_lanes());
    if wanted == 0 {
        return Err(DriverError::Host("no pair of queues was allowed".into()));
    }
    if wanted > 1 && control.is_none() {
        log::warn("there is no control queue to switch on more than one pair of queues with: one is used");
        wanted = 1;
    }
    let mut queues = Vec::with_capacity(2 * usize::from(wanted) + 1);
    let mut planned = 0;
    while planned < wanted {
        let (receive, transmit) = (2 * planned, 2 * planned + 1);
        let receive_entries = entries(device, receive, MAX_RECEIVE_ENTRIES);
        let transmit_entries = entries(device, transmit, MAX_TRANSMIT_ENTRIES);
        if receive_entries == 0 || transmit_entries < MIN_TRANSMIT_ENTRIES {
            if planned == 0 {
                return Err(DriverError::Device(format!(
                    "queues 0 and 1 have {receive_entries} and {transmit_entries} entries (virtio 1.2, section 5.1.2)"
                )));
            }
            // The device has fewer queues than it says: use those that exist.
            log::warn(&format!("pair {planned} of {wanted} does not exist or is too small"));
            break;
        }
        let posting = posting(features, config.mtu, receive_entries)?;
        queues.push(QueuePlan::posted(receive, receive_entries, QueueOwner::Set(planned), posting));
        // The device writes nothing into what it sends.
        queues.push(QueuePlan::requests(transmit, transmit_entries, Some(Vec::new()), planned));
        planned += 1;
    }
    queues.extend(control);
    Ok((queues, planned))
}

/// The control queue, behind all pairs that the device has, used or not (section 5.1.2). None where there is none, or where it is not allowed.
fn control_queue(device: &dyn VirtioDevice, features: u64, config: &Config) -> Option<QueuePlan> {
    if features & feature::CTRL_VQ == 0 {
        return None;
    }
    let index = u16::try_from(2 * u32::from(config.pairs)).ok().filter(|index| *index < device.max_queues())?;
    let size = entries(device, index, CONTROL_ENTRIES);
    let plan = QueuePlan { index, size, ordinary_response: None, owner: QueueOwner::Control, posting: None };
    (size >= MIN_CONTROL_ENTRIES).then_some(plan)
}

/// Entries to ask for: a power of two, at most `most`; 0 where there is no queue.
fn entries(device: &dyn VirtioDevice, queue: u16, most: u16) -> u16 {
    match device.max_queue_size(queue) {
        0 => 0,
        max => 1 << max.min(most).ilog2(),
    }
}

/// The buffers of a receive queue: together they hold at least one packet of the largest kind (sections 5.1.4.2 and 5.1.6.3.1).
fn posting(features: u64, mtu: u16, entries: u16) -> Result<Posting, DriverError> {
    let (packet, least) = match features & feature::GUEST_TSO {
        0 => (u32::from(mtu) + LINK_HEADER_BYTES + VLAN_TAG_BYTES, BUFFER_UNIT_BYTES),
        _ => (MAX_RECEIVED_BYTES, JOINED_BUFFER_BYTES),
    };
    let whole = packet + HEADER_BYTES;
    let one = if features & feature::MRG_RXBUF != 0 { whole.div_ceil(u32::from(entries)) } else { whole };
    let buffer_bytes = one.max(least).next_multiple_of(BUFFER_UNIT_BYTES);
    if buffer_bytes > MAX_BUFFER_BYTES {
        return Err(DriverError::Unsupported(format!(
            "packets of {packet} bytes in a receive queue of {entries} entries: a buffer would have {buffer_bytes} bytes"
        )));
    }
    let buffers = u32::from(entries).min(POSTED_BYTES / buffer_bytes) as u16;
    Ok(Posting { buffer_bytes, buffers, head_bytes: HEADER_BYTES as u8 })
}

fn not_mine(why: &str) -> DriverError {
    DriverError::NotMine(format!("this does not look like virtio-net: {why}"))
}
