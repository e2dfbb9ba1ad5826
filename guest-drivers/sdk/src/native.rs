//! A driver without Wasm: the same calls with the same words, for the native yardstick and for tests.

use crate::driver::{Lane, LaneSetup, VirtioDriver};
use crate::error::DriverError;
use crate::words::{Answers, Arrivals, ChainWriter, Received, Requests, Responses};

/// A data lane of `D`, linked natively.
///
/// ```
/// # use cofferdam_sdk::{*, native::NativeLane, words::*};
/// # struct Refuser;
/// # impl VirtioDriver for Refuser {
/// #     type Lane = Self;
/// #     type Properties = BlockProperties;
/// #     fn attach(_: &mut dyn VirtioDevice) -> Result<(Self, Attachment), DriverError> { Err(DriverError::NotMine("all".into())) }
/// #     fn properties(&self) -> BlockProperties { unreachable!() }
/// #     fn config_changed(&mut self, _: &mut dyn VirtioDevice) -> Result<(), DriverError> { Ok(()) }
/// #     fn start(_: &LaneSetup) -> Result<Self, DriverError> { Ok(Self) }
/// # }
/// # impl Lane for Refuser {
/// #     fn submit(&mut self, requests: Requests<'_>, chains: &mut ChainWriter<'_>) {
/// #         for request in requests { chains.refuse(request.token, Status::Unsupported) }
/// #     }
/// #     fn complete(&mut self, _: Responses<'_>, _: &mut Answers<'_>) {}
/// # }
/// let mut lane = NativeLane::<Refuser>::start(&LaneSetup { features: 0, state: vec![], queues: vec![0] })?;
/// let read = Request { token: 1, operation: Operation::Read, flags: 0, argument: 0, length: 512 };
/// let mut chains = Vec::new();
/// lane.submit(&read.encode(), &mut chains);
/// assert_eq!(chains, [1, 0xffff | 2 << 24]);
/// # Ok::<(), DriverError>(())
/// ```
pub struct NativeLane<D: VirtioDriver> {
    lane: D::Lane,
}

impl<D: VirtioDriver> NativeLane<D> {
    /// Starts a lane: `driver.start` of the WIT.
    ///
    /// # Errors
    /// What the driver says of the setup.
    pub fn start(setup: &LaneSetup) -> Result<Self, DriverError> {
        Ok(Self { lane: D::start(setup)? })
    }

    /// `submit` of the WIT; `chains` is replaced.
    pub fn submit(&mut self, requests: &[u64], chains: &mut Vec<u32>) {
        chains.clear();
        self.lane.submit(Requests::new(requests), &mut ChainWriter::new(chains));
    }

    /// `complete` of the WIT; `answers` is replaced.
    pub fn complete(&mut self, responses: &[u32], answers: &mut Vec<u32>) {
        answers.clear();
        self.lane.complete(Responses::new(responses), &mut Answers::new(answers));
    }

    /// `received` of the WIT; `arrivals` is replaced.
    pub fn received(&mut self, buffers: &[u32], arrivals: &mut Vec<u32>) {
        arrivals.clear();
        let head_bytes = self.lane.head_bytes();
        self.lane.received(Received::new(buffers, head_bytes), &mut Arrivals::new(arrivals));
    }
}
