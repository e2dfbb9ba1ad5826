//! A virtio-net device (virtio 1.2, section 5.1) and the peer on the other end of its wire.
//!
//! The peer puts frames onto the wire ([`SimNet::inject`]), sees those that the driver transmits ([`SimNet::sent`]), sends
//! them back, swallows them, or fills every buffer that the driver posts.

mod control;
mod header;
mod model;

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

pub use control::{Command, ControlState};
pub use header::{CHECKSUM_VALID, Frame, HEADER_BYTES, NEEDS_CHECKSUM, NetHeader};
use model::{Net, lock};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
};
pub(crate) use virtio_bindings::virtio_net::{VIRTIO_NET_F_MQ as F_MQ, VIRTIO_NET_F_MTU as F_MTU};

use crate::device::{Behaviour, SimDevice, SimError};
use crate::model::Rings;

/// What a net device offers. The default is one pair of queues and everything else that a driver may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetProfile {
    /// VIRTIO_NET_F_MAC with this address.
    pub mac: Option<[u8; 6]>,
    /// VIRTIO_NET_F_MTU with this many bytes.
    pub mtu: Option<u16>,
    /// VIRTIO_NET_F_STATUS: the link's state is in configuration space.
    pub status: bool,
    /// VIRTIO_NET_F_CSUM: the driver may leave checksums open.
    pub checksum: bool,
    /// VIRTIO_NET_F_GUEST_CSUM: the device may, too.
    pub guest_checksum: bool,
    /// VIRTIO_NET_F_HOST_TSO4 and 6: the driver may transmit unsegmented TCP. Needs `checksum`.
    pub host_tso: bool,
    /// VIRTIO_NET_F_GUEST_TSO4 and 6: the device may deliver it. Needs `guest_checksum`.
    pub guest_tso: bool,
    /// VIRTIO_NET_F_MRG_RXBUF: frames may lie over several buffers.
    pub mergeable: bool,
    /// VIRTIO_NET_F_CTRL_VQ and CTRL_RX.
    pub control: bool,
    /// Pairs of queues, 1 to 31; above 1 with VIRTIO_NET_F_MQ, which needs `control`.
    pub pairs: u16,
    /// Its rings.
    pub rings: Rings,
}

impl Default for NetProfile {
    fn default() -> Self {
        Self {
            mac: Some([0x02, 0xcf, 0xda, 0, 0, 1]),
            mtu: Some(1500),
            status: true,
            checksum: true,
            guest_checksum: true,
            host_tso: true,
            guest_tso: true,
            mergeable: true,
            control: true,
            pairs: 1,
            rings: Rings::default(),
        }
    }
}

impl NetProfile {
    fn features(&self) -> u64 {
        [
            (self.mac.is_some(), VIRTIO_NET_F_MAC),
            (self.mtu.is_some(), F_MTU),
            (self.status, VIRTIO_NET_F_STATUS),
            (self.checksum, VIRTIO_NET_F_CSUM),
            (self.guest_checksum, VIRTIO_NET_F_GUEST_CSUM),
            (self.host_tso, VIRTIO_NET_F_HOST_TSO4),
            (self.host_tso, VIRTIO_NET_F_HOST_TSO6),
            (self.guest_tso, VIRTIO_NET_F_GUEST_TSO4),
            (self.guest_tso, VIRTIO_NET_F_GUEST_TSO6),
            (self.mergeable, VIRTIO_NET_F_MRG_RXBUF),
            (self.control, VIRTIO_NET_F_CTRL_VQ),
            (self.control, VIRTIO_NET_F_CTRL_RX),
            (self.pairs > 1, F_MQ),
        ]
        .iter()
        .filter(|(offered, _)| *offered)
        .fold(self.rings.features(), |bits, (_, bit)| bits | 1 << bit)
    }

    fn config(&self, link_up: bool) -> Vec<u8> {
        let status = u16::from(link_up && self.status);
        let mut bytes = self.mac.unwrap_or_default().to_vec();
        for field in [status, self.pairs, self.mtu.unwrap_or(0)] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    fn check(&self) -> Result<(), SimError> {
        let wrong = [
            (self.pairs == 0 || self.pairs > 31, "1 to 31 pairs of queues"),
            (self.pairs > 1 && !self.control, "several pairs of queues need the control queue"),
            (self.host_tso && !self.checksum, "TSO of the host needs its checksum offload"),
            (self.guest_tso && !self.guest_checksum, "TSO of the guest needs its checksum offload"),
        ];
        wrong.iter().find(|(wrong, _)| *wrong).map_or(Ok(()), |(_, why)| Err(SimError::Profile(why)))
    }
}

/// What the peer does with what the driver transmits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Transmit {
    /// Keeps it for [`SimNet::sent`].
    Record,
    /// Sends it back on the same pair of queues. Frames that find no room are dropped.
    Echo,
    /// Swallows it, unread when no fault is scripted.
    Sink,
}

/// Counts of frames since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStats {
    /// Transmitted by the driver.
    pub transmitted: u64,
    /// Put into buffers of the driver.
    pub received: u64,
    /// Lost in either direction: no room, no link, no such pair, too long.
    pub dropped: u64,
    /// On their way to the driver now.
    pub waiting: u64,
}

/// A net device and its peer. Clones are handles of the same one.
#[derive(Clone)]
pub struct SimNet {
    device: SimDevice,
    model: Arc<Net>,
}

impl Deref for SimNet {
    type Target = SimDevice;
    fn deref(&self) -> &SimDevice {
        &self.device
    }
}

impl SimNet {
    /// A device with no driver yet, its link up.
    pub fn new(profile: NetProfile, behaviour: Behaviour) -> Result<Self, SimError> {
        profile.check()?;
        let model = Arc::new(Net::new(profile));
        Ok(Self { device: SimDevice::new(Arc::clone(&model) as _, &behaviour)?, model })
    }

    fn wake_receivers(&self) {
        // Queues of even numbers. The control queue has one, too; a look more does no harm.
        self.device.machine().wake_queues(0x5555_5555_5555_5555);
    }

    /// Puts a frame onto the wire; its header's `num_buffers` is filled in. False: it was dropped, because the link is down,
    /// the pair is not in use, or too much waits already.
    pub fn inject(&self, frame: Frame) -> bool {
        let queue = 2 * frame.pair;
        let queued = self.model.push(frame);
        if queued {
            self.device.machine().wake_queues(1 << queue);
        }
        queued
    }

    /// What the driver has transmitted since this was last asked.
    pub fn sent(&self) -> Vec<Frame> {
        lock(&self.model.sent).drain()
    }

    /// The same, once there are `frames` of them; `None` when `limit` is over before (what there is stays).
    pub fn wait_sent(&self, frames: usize, limit: Duration) -> Option<Vec<Frame>> {
        let enough = || lock(&self.model.sent).len() >= frames;
        self.device.machine().wait_for(Instant::now() + limit, enough).then(|| self.sent())
    }

    /// What happens with transmitted frames from now on.
    pub fn set_transmit(&self, transmit: Transmit) {
        self.model.set_transmit(transmit);
    }

    /// From now on every buffer that the driver posts is filled with `frame`, as fast as it can be; `None` ends that.
    pub fn set_generator(&self, frame: Option<&[u8]>) {
        self.model.set_generator(frame);
        self.wake_receivers();
    }

    /// A frame for [`SimNet::set_generator`]: `bytes` bytes (at least 14) to everyone, of a kind that is for experiments (IEEE 802, 0x88b5).
    pub fn test_frame(bytes: usize) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend_from_slice(&[0x02, 0xcf, 0xda, 0, 0, 2, 0x88, 0xb5]);
        frame.extend((frame.len()..bytes).map(|at| at as u8));
        frame
    }

    /// Takes the link down or up, and tells the driver in process that configuration space has changed. Behind a socket it is
    /// not told (the server has no channel for it): it sees it when it reads.
    pub fn set_link(&self, up: bool) {
        self.model.set_link(up);
        self.device.machine().config_changed();
        self.wake_receivers();
    }

    /// Commands of the control queue so far, the last 1,024.
    pub fn commands(&self) -> Vec<Command> {
        lock(&self.model.control).commands.iter().cloned().collect()
    }

    /// What the current driver has set through the control queue.
    pub fn control_state(&self) -> ControlState {
        lock(&self.model.control).state
    }

    /// Counts of frames.
    pub fn net_stats(&self) -> NetStats {
        let counts = &self.model.counts;
        NetStats {
            transmitted: counts.transmitted.load(Ordering::SeqCst),
            received: counts.received.load(Ordering::SeqCst),
            dropped: counts.dropped.load(Ordering::SeqCst),
            waiting: self.model.waiting() as u64,
        }
    }

    /// Waits until `done` says so of the counts, for `limit` at most. False: it never did.
    pub fn wait_net(&self, limit: Duration, done: impl Fn(&NetStats) -> bool) -> bool {
        self.device.machine().wait_for(Instant::now() + limit, || done(&self.net_stats()))
    }
}
