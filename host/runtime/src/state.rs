//! What the host keeps beside one guest: the data of its store.

use crate::capability::device::DeviceCapability;
use crate::capability::function::FunctionState;
use crate::capability::live::LiveCapability;
use crate::capability::log::LogSink;
use crate::capability::wasi::WasiState;
use crate::limits::Meter;
use crate::watch::Watch;

/// Everything that an import of a lane can reach. Nothing in here belongs to another lane, except the driver's log rate.
pub(crate) struct LaneState {
    pub(crate) watch: Watch,
    pub(crate) meter: Meter,
    pub(crate) log: LogSink,
    /// The device, during `attach` and `config-changed` of a control lane; else nothing.
    pub(crate) device: Option<Box<dyn DeviceCapability>>,
    /// The device, during calls of a control lane with queues of its own; else nothing.
    pub(crate) live: Option<Box<dyn LiveCapability>>,
    /// What a driver that programs its device itself holds of it.
    pub(crate) function: FunctionState,
    /// Present if anything of WASI was granted.
    pub(crate) wasi: Option<Box<WasiState>>,
}
