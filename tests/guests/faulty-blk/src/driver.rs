//! The driver around `cofferdam-virtio-blk`, with a hook at every point.

use cofferdam_sdk::{
    Answers, Attachment, BlockProperties, ChainWriter, DriverError, ExportedState, Lane, LaneSetup, Operation,
    Requests, Responses, VirtioDevice, VirtioDriver,
};
use cofferdam_virtio_blk::{VirtioBlk, VirtioBlkLane};

use crate::faults::Faults;
use crate::orders::{Kind, Point};

/// Bytes of [`Attachment::state`] before those of the driver inside: the seed.
const SEED_BYTES: usize = 2;
/// One in so many configuration changes breaks the control lane down.
const CHANGE_ONE_IN: u64 = 2;
/// One in so many control lanes breaks down in `attach`. Four in a row fail the binding.
const ATTACH_ONE_IN: u64 = 16;

/// The control lane.
pub struct Faulty {
    inner: VirtioBlk,
    faults: Faults,
}

impl VirtioDriver for Faulty {
    type Lane = FaultyLane;
    type Properties = BlockProperties;

    fn attach(device: &mut dyn VirtioDevice) -> Result<(Self, Attachment), DriverError> {
        let mut faults = Faults::new(0);
        if let Some(kind) = faults.in_control(ATTACH_ONE_IN) {
            break_down(kind);
        }
        let (inner, mut attachment) = VirtioBlk::attach(device)?;
        if faults.judges() {
            attachment.queues.iter_mut().for_each(|queue| queue.ordinary_response = None);
        }
        let sectors = inner.properties().capacity_bytes / 512;
        attachment.state.splice(..0, (sectors as u16).to_le_bytes());
        Ok((Self { inner, faults }, attachment))
    }

    fn properties(&self) -> BlockProperties {
        self.inner.properties()
    }

    fn config_changed(&mut self, device: &mut dyn VirtioDevice) -> Result<(), DriverError> {
        if let Some(kind) = self.faults.in_control(CHANGE_ONE_IN) {
            break_down(kind);
        }
        self.inner.config_changed(device)
    }

    fn suspend(&self) -> ExportedState {
        self.inner.suspend()
    }

    fn start(setup: &LaneSetup) -> Result<FaultyLane, DriverError> {
        let (seed, state) = setup
            .state
            .split_first_chunk::<SEED_BYTES>()
            .ok_or_else(|| DriverError::Host("a state that is not this driver's".into()))?;
        let mut faults = Faults::new(u64::from(u16::from_le_bytes(*seed)));
        if let Some(kind) = faults.at_start() {
            break_down(kind);
        }
        let inner = VirtioBlk::start(&LaneSetup { state: state.to_vec(), ..setup.clone() })?;
        Ok(FaultyLane { inner, faults })
    }
}

/// A data lane.
pub struct FaultyLane {
    inner: VirtioBlkLane,
    faults: Faults,
}

impl FaultyLane {
    /// Breaks down here if it is time to; whether it is the answer that is to break the contract.
    fn point(&mut self, point: Point) -> bool {
        match self.faults.at(point) {
            None => false,
            Some(Kind::Words) => true,
            Some(kind) => break_down(kind),
        }
    }
}

impl Lane for FaultyLane {
    fn submit(&mut self, mut requests: Requests<'_>, chains: &mut ChainWriter<'_>) {
        let given = requests.clone();
        if let Some(first) = requests.next() {
            self.faults.begin(first.token);
        }
        let mut spoiled = self.point(Point::Before);
        self.inner.submit(given.clone(), chains);
        if given.clone().any(|request| request.operation == Operation::Flush) {
            spoiled |= self.point(Point::Flush);
        }
        spoiled |= self.point(Point::After);
        if spoiled {
            chains.words_mut().pop();
        }
    }

    fn complete(&mut self, responses: Responses<'_>, answers: &mut Answers<'_>) {
        let mut spoiled = self.point(Point::Judge);
        self.inner.complete(responses, answers);
        spoiled |= self.point(Point::Judged);
        if spoiled {
            answers.words_mut().pop();
        }
    }
}

fn break_down(kind: Kind) -> ! {
    match kind {
        Kind::Trap | Kind::Words => panic!("this driver breaks down as it was ordered to"),
        Kind::Loop => loop {
            std::hint::black_box(());
        },
        Kind::Memory => {
            let mut eaten = Vec::new();
            loop {
                eaten.push(vec![1_u8; 1 << 20]);
                std::hint::black_box(&eaten);
            }
        }
    }
}
