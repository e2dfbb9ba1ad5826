//! A device as the host sees it: types, memory, rings and the checks on them. No I/O of a bus lives here.
//!
//! Two sides are hostile: the guest that says what goes on a ring, and the device that answers. What either says is checked
//! once in this crate and carried as another type afterwards:
//!
//! | what comes in | who says it | checked by | what comes out |
//! | --- | --- | --- | --- |
//! | chain words | guest | [`ChainBatch::parse`] | [`Chain`], the only thing that [`SplitQueue::add`] takes |
//! | answer words | guest | [`words::parse_answers`] | [`Status`] per token |
//! | arrival words | guest | [`arrivals::Arrivals::parse`] | [`arrivals::Piece`]s of used buffers |
//! | used elements | device | [`SplitQueue::pop`] | [`Used`], or a [`DeviceFault`] that poisons the queue |
//!
//! - [`transport`]: what a bus gives the host for one device; [`function`]: what it gives a driver that programs the device itself.
//! - [`dma`]: memory that a device may reach; [`arena`]: leases of it; [`window`]: windows of a client's own; [`buffer`]: either of the two;
//!   [`transfer`]: socket I/O straight from and to buffers.
//! - [`queue`]: the driver side of a split virtqueue; [`chain`]: the check of a guest's chains; [`words`]: the numbers that cross.
//! - [`handover`]: what one process gives another to go on with.
//! - [`name`]: names with one holder over the whole host, for claims.
//! - [`error`]: every error, each saying who is to blame.
//!
//! `unsafe` is in `mmap` (mapping and volatile access), `transfer` (iovecs of raw memory) and `hollow` (descriptor numbers) alone.

pub mod arena;
pub mod arrivals;
pub mod buffer;
pub mod chain;
pub mod dma;
pub mod error;
pub mod function;
pub mod handover;
mod hollow;
mod mmap;
pub mod name;
pub mod queue;
mod ring;
pub mod transfer;
pub mod transport;
pub mod window;
pub mod words;

pub use arena::DmaArena;
pub use buffer::Buffer;
pub use chain::{Chain, ChainBatch, ChainBuf, Direction, Expected, Outcome, Payload};
pub use dma::{DmaRegion, FileName};
pub use error::{
    AddError, AnswerError, ArenaError, ChainError, ChainRule, DeviceFault, QueueError, RegionError, TransportError,
};
pub use function::{Confinement, Function, FunctionIds, RegisterRegion, Width};
pub use handover::{Exported, NotExportable};
pub use hollow::hollow_out;
pub use name::HeldName;
pub use queue::{MAX_STATUS_BYTES, Outstanding, QueueConfig, SplitQueue, Standing, Used};
pub use transport::{Doorbell, QueueAddresses, QueueEvents, QueueSetup, Silence, Transport};
pub use window::WindowedRegion;
pub use words::{IoOp, Status};
