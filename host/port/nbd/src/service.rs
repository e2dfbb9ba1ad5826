//! What this port needs of the thing it serves: [`Service`], and per connection a [`Disk`].
//!
//! Both mirror [`Binding`] and [`Handle`] of the manager, which implement them below; the worker is generic over them, so that tests
//! put a device behind it that refuses, holds, stalls or lies on command. Static dispatch: nothing is paid for it.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub(crate) use cofferdam_manager::transfer;
pub use cofferdam_manager::{
    Binding, BlockGeometry, Buffer, Completion, Handle, HandleSpec, HandleState, IoError, IoFlags, IoOp, IoRequest,
    LeaseError, Notify, OpenError, Patience, Port, PortReport, PortThreads, SubmitError,
};

/// One client's right to operate; see [`Handle`] for what each call promises.
pub trait Disk: Send {
    /// See [`Handle::geometry`].
    fn geometry(&self) -> &BlockGeometry;
    /// See [`Handle::lease`].
    ///
    /// # Errors
    /// As [`Handle::lease`].
    fn lease(&self, bytes: u32) -> Result<Buffer, LeaseError>;
    /// See [`Handle::submit`].
    ///
    /// # Errors
    /// As [`Handle::submit`].
    fn submit(&self, requests: &mut Vec<IoRequest>) -> Result<(), SubmitError>;
    /// See [`Handle::poll`].
    fn poll(&self, arm: bool, out: &mut Vec<Completion>) -> usize;
    /// See [`Handle::device_fd`].
    fn device_fd(&self) -> BorrowedFd<'_>;
    /// See [`Handle::state`].
    fn state(&self) -> HandleState;
}

/// What a port serves.
pub trait Service: Send + Sync + 'static {
    /// What a connection holds.
    type Disk: Disk + 'static;
    /// The export's name; the empty name reaches it too.
    fn name(&self) -> &str;
    /// A line for people.
    fn description(&self) -> String;
    /// Data lanes, at least 1 while it serves.
    fn lanes(&self) -> usize;
    /// `None` when it does not serve.
    fn geometry(&self) -> Option<BlockGeometry>;
    /// See [`Binding::open`].
    ///
    /// # Errors
    /// As [`Binding::open`].
    fn open(&self, spec: HandleSpec) -> Result<Self::Disk, OpenError>;
}

impl Disk for Handle {
    fn geometry(&self) -> &BlockGeometry {
        Handle::geometry(self)
    }

    fn lease(&self, bytes: u32) -> Result<Buffer, LeaseError> {
        Handle::lease(self, bytes)
    }

    fn submit(&self, requests: &mut Vec<IoRequest>) -> Result<(), SubmitError> {
        Handle::submit(self, requests)
    }

    fn poll(&self, arm: bool, out: &mut Vec<Completion>) -> usize {
        Handle::poll(self, arm, out)
    }

    fn device_fd(&self) -> BorrowedFd<'_> {
        Handle::device_fd(self)
    }

    fn state(&self) -> HandleState {
        Handle::state(self)
    }
}

impl Service for Arc<Binding> {
    type Disk = Handle;

    fn name(&self) -> &str {
        Binding::name(self)
    }

    fn description(&self) -> String {
        format!("{} driven by {}", self.device(), self.driver())
    }

    fn lanes(&self) -> usize {
        Binding::lanes(self)
    }

    fn geometry(&self) -> Option<BlockGeometry> {
        Binding::geometry(self)
    }

    fn open(&self, spec: HandleSpec) -> Result<Handle, OpenError> {
        Binding::open(self, spec)
    }
}
