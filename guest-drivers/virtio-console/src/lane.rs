//! A data lane: the bytes of one port (section 5.3.6), which have no layout at all.

use cofferdam_sdk::{
    Answers, Arrivals, ChainWriter, DriverError, Lane, LaneSetup, Operation, Piece, Received, Request, Requests,
    Responses, Status,
};

use crate::{MAX_WRITE_BYTES, feature, plan};

/// The data lane of one port.
#[derive(Debug)]
pub struct VirtioConsoleLane {
    port: u32,
    transmit: u16,
}

impl VirtioConsoleLane {
    /// The queues tell the port, so the control lane has nothing more to say.
    pub(crate) fn new(setup: &LaneSetup) -> Result<Self, DriverError> {
        let bad = || DriverError::Host(format!("queues {:?} are not those of a port", setup.queues));
        let [receive, transmit] = setup.queues[..] else { return Err(bad()) };
        let port = match receive {
            0 => 0,
            _ if setup.features & feature::MULTIPORT == 0 => return Err(bad()),
            other => (u32::from(other) / 2).saturating_sub(1),
        };
        if plan::port_queues(port) != Some((receive, transmit)) {
            return Err(bad());
        }
        Ok(Self { port, transmit })
    }

    /// The length of a write that can be sent.
    fn check(&self, request: &Request) -> Result<u32, Status> {
        if request.operation != Operation::Send {
            return Err(Status::Unsupported);
        }
        match u32::try_from(request.length) {
            Ok(length @ 1..=MAX_WRITE_BYTES) if request.argument == u64::from(self.port) => Ok(length),
            _ => Err(Status::Invalid),
        }
    }
}

impl Lane for VirtioConsoleLane {
    fn submit(&mut self, requests: Requests<'_>, chains: &mut ChainWriter<'_>) {
        for request in requests {
            let length = self.check(&request);
            let sent = length.and_then(|length| {
                let chain = chains.chain(request.token, self.transmit, |chain| chain.payload_out(0, length));
                chain.map_err(|_| Status::Invalid)
            });
            if let Err(status) = sent {
                chains.refuse(request.token, status);
            }
        }
    }

    /// A buffer that was used without a byte written is ordinary and does not come here; a device can write nothing else.
    fn complete(&mut self, responses: Responses<'_>, answers: &mut Answers<'_>) {
        for response in responses {
            let ok = response.written == 0 && response.status.is_empty();
            answers.answer(response.token, if ok { Status::Ok } else { Status::DeviceFault });
        }
    }

    fn received(&mut self, buffers: Received<'_>, arrivals: &mut Arrivals<'_>) {
        for buffer in buffers.filter(|buffer| buffer.written > 0) {
            let piece = Piece { buffer: buffer.buffer, offset: 0, length: buffer.written };
            arrivals.arrival(0, u64::from(self.port), false, &[piece]);
        }
    }
}
