//! A driver of a virtio device: the control lane ([`VirtioDriver`]) and its data lanes ([`Lane`]). What it serves is said by its properties.

use crate::device::{LiveDevice, QueuePlan, VirtioDevice};
use crate::error::DriverError;
use crate::words::{Answers, Arrivals, ChainWriter, ControlBuffers, Received, Requests, Responses};

/// The control lane of a driver, and the way to make its data lanes.
///
/// One instance of the component is the control lane; it attaches and then only answers for properties, configuration changes and queues of its own. Every
/// data lane is an instance of its own and shares nothing with it but the bytes of [`Attachment::state`].
pub trait VirtioDriver: Sized + 'static {
    /// What serves requests.
    type Lane: Lane;
    /// What the device can do, in the words of the driver's service: [`BlockProperties`](crate::BlockProperties), [`EntropyProperties`](crate::EntropyProperties),
    /// [`StreamProperties`](crate::StreamProperties) or [`NetProperties`](crate::NetProperties).
    type Properties;

    /// Decides whether the device is one of this driver's, negotiates features and plans queues. Called once.
    ///
    /// # Errors
    /// [`DriverError::NotMine`] lets the host ask another driver; the others end the load with their text.
    fn attach(device: &mut dyn VirtioDevice) -> Result<(Self, Attachment), DriverError>;

    /// What the device can do; asked after [`attach`](Self::attach) and after everything below that changes `self`.
    fn properties(&self) -> Self::Properties;

    /// Configuration space may have changed; the host asks for the properties again afterwards.
    ///
    /// # Errors
    /// When the device now says what it must not; the host then gives the device up.
    fn config_changed(&mut self, device: &mut dyn VirtioDevice) -> Result<(), DriverError>;

    /// Another control lane, perhaps of another version, is about to take this one's place: what it might like to know. Nothing is over yet: if the other one refuses, this one
    /// is called again.
    fn suspend(&self) -> ExportedState {
        ExportedState::default()
    }

    /// Takes over a device that runs. It offers what was negotiated and nothing else, and the queues that it runs with have to be planned again. `state` is a hint: a driver
    /// that does not understand it attaches as if it were not there.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    fn resume(device: &mut dyn VirtioDevice, state: &ExportedState) -> Result<(Self, Attachment), DriverError> {
        let _ = state;
        Self::attach(device)
    }

    /// Starts a data lane. An instance that replaces a crashed one is started with the same words, and its lane may then be asked to
    /// `complete` requests that its predecessor submitted.
    ///
    /// # Errors
    /// When the setup is not one that this driver's `attach` could have made.
    fn start(setup: &LaneSetup) -> Result<Self::Lane, DriverError>;

    /// DRIVER_OK was set. For a driver that planned queues for its control lane.
    ///
    /// # Errors
    /// Ends the load.
    fn live(&mut self, device: &mut dyn LiveDevice) -> Result<(), DriverError> {
        let _ = device;
        Ok(())
    }

    /// The device used buffers of the control lane's posted queue.
    ///
    /// # Errors
    /// When the device says what it must not; the host then gives the device up.
    fn control_events(&mut self, device: &mut dyn LiveDevice, buffers: ControlBuffers<'_>) -> Result<(), DriverError> {
        let _ = (device, buffers);
        Ok(())
    }
}

/// One data lane: turns requests into descriptor chains, judges responses, and says what used buffers mean. Never called from two threads, never re-entered.
///
/// All of it is the hot path: no allocation, no logging and no formatting per request.
pub trait Lane: 'static {
    /// For every request exactly one chain or one refusal, in any order. 1 to 64 requests.
    fn submit(&mut self, requests: Requests<'_>, chains: &mut ChainWriter<'_>);

    /// For every response exactly one answer. Only responses that were not the ordinary one of their queue come here. 1 to 64 responses.
    fn complete(&mut self, responses: Responses<'_>, answers: &mut Answers<'_>);

    /// Bytes at the head of each used buffer that [`Lane::received`] sees, as the queue was planned.
    fn head_bytes(&self) -> u8 {
        0
    }

    /// What 1 to 64 used buffers of the lane's posted queue mean. What no arrival names is dropped.
    fn received(&mut self, buffers: Received<'_>, arrivals: &mut Arrivals<'_>) {
        let _ = (buffers, arrivals);
    }
}

/// What the driver made of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Feature bits that were negotiated, as given to [`VirtioDevice::negotiate`].
    pub features: u64,
    /// The queues to set up: 1 to 64, indices not repeated.
    pub queues: Vec<QueuePlan>,
    /// What the data lanes need to know, in the driver's own encoding: at most 4,096 bytes.
    pub state: Vec<u8>,
}

/// What one control lane leaves to the next in an upgrade.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportedState {
    /// The driver's own number for what the bytes mean; 0 for nothing.
    pub version: u32,
    /// At most 4,096 bytes.
    pub bytes: Vec<u8>,
}

/// What a data lane is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneSetup {
    /// Negotiated device-type feature bits.
    pub features: u64,
    /// [`Attachment::state`], unchanged.
    pub state: Vec<u8>,
    /// The queues of this lane's set in the order of the plan: one or two.
    pub queues: Vec<u16>,
}
