//! A data lane: one pair of queues. What is sent (section 5.1.6.2) is here, what comes in `receive`.
//!
//! ```text
//! transmit        header-out 12 | payload-out, the packet
//! ```

use cofferdam_sdk::net::{FLAG_NEEDS_CHECKSUM, SEGMENT_TCP4, SEGMENT_TCP6, SEGMENTATION_SHIFT};
use cofferdam_sdk::{
    Answers, Arrivals, ChainWriter, DriverError, Lane, LaneSetup, Offloads, Operation, Received, Request, Requests,
    Responses, Status,
};

use crate::plan;
use crate::receive::Receiver;
use crate::state::LaneState;
use crate::{HEADER_BYTES, LINK_HEADER_BYTES, MAX_SEGMENTED_BYTES, feature};

/// Flag of the header (section 5.1.6): the checksum is to be completed.
pub(crate) const HDR_F_NEEDS_CSUM: u8 = 1;
/// Flag of the header: the checksum was found valid.
pub(crate) const HDR_F_DATA_VALID: u8 = 2;
/// Kinds of segmentation in the header.
pub(crate) const GSO_NONE: u8 = 0;
/// See [`GSO_NONE`].
pub(crate) const GSO_TCPV4: u8 = 1;
/// See [`GSO_NONE`].
pub(crate) const GSO_TCPV6: u8 = 4;

/// Least bytes of the headers of IPv4 and TCP, and of IPv6 and TCP.
const TCP4_HEADER_BYTES: u16 = 40;
const TCP6_HEADER_BYTES: u16 = 60;
/// Bytes of a checksum.
pub(crate) const CHECKSUM_BYTES: u32 = 2;

/// A data lane of the driver.
#[derive(Debug)]
pub struct VirtioNetLane {
    transmit: u16,
    mtu: u16,
    offloads: Offloads,
    receiver: Receiver,
}

impl VirtioNetLane {
    pub(crate) fn new(setup: &LaneSetup) -> Result<Self, DriverError> {
        let [_, transmit] = setup.queues[..] else {
            return Err(DriverError::Host(format!("{} queues for a lane of two", setup.queues.len())));
        };
        let offloads = plan::offloads(setup.features);
        let receiver = Receiver::new(offloads, setup.features & feature::MRG_RXBUF != 0);
        Ok(Self { transmit, mtu: LaneState::decode(&setup.state)?.mtu, offloads, receiver })
    }

    /// The header of one packet and its length, or why it is not sent.
    fn header(&self, request: &Request) -> Result<([u8; HEADER_BYTES as usize], u32), Status> {
        if request.operation != Operation::Transmit {
            return Err(Status::Unsupported);
        }
        let [start, offset, segment, headers] = [0, 16, 32, 48].map(|shift| (request.argument >> shift) as u16);
        let (needs_checksum, segmentation) =
            (request.flags & FLAG_NEEDS_CHECKSUM != 0, request.flags >> SEGMENTATION_SHIFT);
        if request.flags & !(FLAG_NEEDS_CHECKSUM | 0xf << SEGMENTATION_SHIFT) != 0 {
            return Err(Status::Invalid);
        }
        let (kind, least_headers, longest) = match segmentation {
            // Whole on the wire, so not longer than that takes (section 5.1.4.2).
            0 => (GSO_NONE, 0, u32::from(self.mtu) + LINK_HEADER_BYTES),
            SEGMENT_TCP4 if self.offloads.transmit_tcp4 => (GSO_TCPV4, TCP4_HEADER_BYTES, MAX_SEGMENTED_BYTES),
            SEGMENT_TCP6 if self.offloads.transmit_tcp6 => (GSO_TCPV6, TCP6_HEADER_BYTES, MAX_SEGMENTED_BYTES),
            _ => return Err(Status::Unsupported),
        };
        let length = u32::try_from(request.length).unwrap_or(u32::MAX);
        if !(LINK_HEADER_BYTES..=longest).contains(&length) {
            return Err(Status::Invalid);
        }
        let mut header = [0; HEADER_BYTES as usize];
        if needs_checksum {
            if !self.offloads.transmit_checksum {
                return Err(Status::Unsupported);
            }
            if u32::from(start) + u32::from(offset) + CHECKSUM_BYTES > length {
                return Err(Status::Invalid);
            }
            header[0] = HDR_F_NEEDS_CSUM;
            header[6..8].copy_from_slice(&start.to_le_bytes());
            header[8..10].copy_from_slice(&offset.to_le_bytes());
        }
        if kind != GSO_NONE {
            // Each segment gets a checksum of its own (section 5.1.6.2.1), and is whole on the wire.
            let fits = (1..=self.mtu.saturating_sub(least_headers)).contains(&segment);
            let has_headers = u32::from(headers) >= LINK_HEADER_BYTES + u32::from(least_headers);
            if !needs_checksum || !fits || !has_headers || u32::from(headers) > length {
                return Err(Status::Invalid);
            }
            header[1] = kind;
            header[2..4].copy_from_slice(&headers.to_le_bytes());
            header[4..6].copy_from_slice(&segment.to_le_bytes());
        }
        // `num_buffers` stays 0 (section 5.1.6.2.1).
        Ok((header, length))
    }
}

impl Lane for VirtioNetLane {
    fn submit(&mut self, requests: Requests<'_>, chains: &mut ChainWriter<'_>) {
        for request in requests {
            let written = self.header(&request).and_then(|(header, length)| {
                let chain = chains.chain(request.token, self.transmit, |chain| {
                    chain.header_out(&header);
                    chain.payload_out(0, length);
                });
                // `header` keeps every packet inside the layout's bounds; were it wrong, the packet is refused and nothing else suffers.
                chain.map_err(|_| Status::Invalid)
            });
            if let Err(status) = written {
                chains.refuse(request.token, status);
            }
        }
    }

    /// Everything is ordinary that a device may do with a chain into which it cannot write; so this is not reached by a device that keeps to it.
    fn complete(&mut self, responses: Responses<'_>, answers: &mut Answers<'_>) {
        for response in responses {
            let ordinary = response.written == 0 && response.status.is_empty();
            answers.answer(response.token, if ordinary { Status::Ok } else { Status::DeviceFault });
        }
    }

    fn head_bytes(&self) -> u8 {
        HEADER_BYTES as u8
    }

    fn received(&mut self, buffers: Received<'_>, arrivals: &mut Arrivals<'_>) {
        for buffer in buffers {
            self.receiver.take(&buffer, arrivals);
        }
        self.receiver.pause(arrivals);
    }
}
