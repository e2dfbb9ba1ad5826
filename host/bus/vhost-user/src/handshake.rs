//! The handshake: is this a vhost-user device, which process serves it, and what can it do.
//!
//! Protocol features come before virtio features (the specification allows that), because the configuration space and the number of
//! queues must be known before a driver chooses among the features.

use std::os::fd::AsFd;

use cofferdam_device::TransportError;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures, VhostUserU64, VhostUserVirtioFeatures};
use vm_memory::ByteValued;

use crate::backend_channel::BackendChannel;
use crate::device::MAX_QUEUES;
use crate::wire::{Wire, limit, number};

/// VIRTIO_F_VERSION_1 (virtio 1.2, section 6).
pub(crate) const VERSION_1: u64 = 1 << 32;

/// What the handshake learns.
pub(crate) struct Hello {
    /// Feature bits as the backend gave them, its protocol's own among them.
    pub(crate) offered: u64,
    /// Protocol features that both sides use from here on.
    pub(crate) protocol: VhostUserProtocolFeatures,
    /// From 1 to [`MAX_QUEUES`].
    pub(crate) max_queues: u16,
    /// Regions that the backend takes one by one while it runs; 0: it does not.
    pub(crate) memory_slots: u64,
    /// Where the backend says that its configuration changed, if it can.
    pub(crate) channel: Option<BackendChannel>,
}

/// Gives the backend its end of a channel. `None`: it has the feature and does not want it.
fn open_channel(wire: &mut Wire) -> Result<Option<BackendChannel>, TransportError> {
    let failed = |errno: rustix::io::Errno| TransportError::Io {
        what: "making the backend channel".to_owned(),
        source: errno.into(),
    };
    let (channel, theirs) = BackendChannel::new(wire.has_acks()).map_err(failed)?;
    match wire.tell(FrontendReq::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()], limit()) {
        Ok(()) => Ok(Some(channel)),
        Err(TransportError::Refused(why)) => {
            tracing::info!(why, "no backend channel: configuration changes are not heard of");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

impl Hello {
    /// Shakes hands. Every message has its own time limit.
    pub(crate) fn say(wire: &mut Wire) -> Result<Self, TransportError> {
        let question = |wire: &mut Wire, request| number(request, &wire.ask(request, &[], limit())?);
        let offered = question(wire, FrontendReq::GET_FEATURES)?;
        if offered & VERSION_1 == 0 {
            return Err(TransportError::Refused(format!(
                "the device is a legacy one: it does not offer VIRTIO_F_VERSION_1 (features {offered:#x})"
            )));
        }
        let mut protocol = VhostUserProtocolFeatures::empty();
        let (mut max_queues, mut memory_slots) = (1, 0);
        if offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            // Not INFLIGHT_SHMFD and RESET_DEVICE (no backend at hand has them), not BACKEND_SEND_FD (no message with a descriptor is wanted).
            let wanted = VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
            let bits = question(wire, FrontendReq::GET_PROTOCOL_FEATURES)?;
            protocol = VhostUserProtocolFeatures::from_bits_truncate(bits) & wanted;
            if !protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                // A region that is not acknowledged to be gone could never be used for anything again.
                protocol.remove(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
            }
            if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
                // It has no configuration to tell of.
                protocol.remove(VhostUserProtocolFeatures::BACKEND_REQ);
            }
            let accepted = VhostUserU64::new(protocol.bits());
            wire.tell(FrontendReq::SET_PROTOCOL_FEATURES, accepted.as_slice(), &[], limit())?;
            if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                wire.expect_acks();
            }
            if protocol.contains(VhostUserProtocolFeatures::MQ) {
                let queues = question(wire, FrontendReq::GET_QUEUE_NUM)?;
                max_queues = u16::try_from(queues).unwrap_or(MAX_QUEUES).min(MAX_QUEUES);
                if max_queues == 0 {
                    return Err(TransportError::Protocol("answer to GET_QUEUE_NUM: no queues".to_owned()));
                }
            }
        }
        if protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            memory_slots = question(wire, FrontendReq::GET_MAX_MEM_SLOTS)?;
        }
        wire.tell(FrontendReq::SET_OWNER, &[], &[], limit())?;
        // A second question at least: only then is it known which process answers (see `peer`).
        if question(wire, FrontendReq::GET_FEATURES)? != offered {
            return Err(TransportError::Protocol("GET_FEATURES is answered in two ways".to_owned()));
        }
        let channel = protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ).then(|| open_channel(wire));
        Ok(Hello { offered, protocol, max_queues, memory_slots, channel: channel.transpose()?.flatten() })
    }
}
