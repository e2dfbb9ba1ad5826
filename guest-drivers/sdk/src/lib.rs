//! What the author of a Cofferdam driver uses.
//!
//! A driver is an ordinary Rust type that implements [`VirtioDriver`]; [`export_block_driver!`] and its like make the component around it when the crate
//! is compiled for WebAssembly and expands to nothing otherwise. So the same crate links natively, and its unit tests run against
//! [`mock::MockDevice`] without any Wasm.
//!
//! ```text
//!            control lane (one instance)                    data lane (an instance each)
//! host ---> attach(device) -> Attachment  --- state --->   start(LaneSetup) -> Lane
//!           properties()                                   submit(Requests)    -> ChainWriter
//!           config_changed(device)                         complete(Responses) -> Answers
//! ```
//!
//! The contract itself is `wit/` (package `cofferdam:driver`); where this crate and those files disagree, the files are right.
//!
//! | module | about |
//! | --- | --- |
//! | [`device`] | the virtio device as a driver sees it |
//! | [`devices`] | which devices it is for, as metadata |
//! | [`driver`] | the traits of a driver and the records they exchange |
//! | [`block`], [`entropy`], [`stream`], [`net`] | the services: what a device can do |
//! | [`words`] | typed views of the flat words that cross the boundary |
//! | [`function`] | a device that its driver programs itself |
//! | [`log`] | the log capability |
//! | [`native`] | running a driver without Wasm |
//! | [`mock`] | a device to test drivers against, and a checker of their chains |

// The export macro of wit-bindgen names this crate by its path, also when it expands in here.
#[cfg(target_family = "wasm")]
#[allow(unused_extern_crates, reason = "used by generated code")]
extern crate self as cofferdam_sdk;

pub mod block;
pub mod device;
pub mod devices;
pub mod driver;
pub mod entropy;
mod error;
pub mod function;
pub mod log;
pub mod mock;
pub mod native;
pub mod net;
pub mod stream;
pub mod words;

mod export;
#[doc(hidden)]
#[cfg(all(target_family = "wasm", feature = "function"))]
pub mod function_glue;
#[doc(hidden)]
#[cfg(all(target_family = "wasm", not(feature = "function")))]
pub mod glue;

#[cfg(all(target_family = "wasm", feature = "function"))]
pub use function_glue::{dma, interrupt};

pub use block::BlockProperties;
pub use device::{LiveDevice, Posting, QueueOwner, QueuePlan, VirtioDevice};
pub use devices::DeviceId;
pub use driver::{Attachment, ExportedState, Lane, LaneSetup, VirtioDriver};
pub use entropy::EntropyProperties;
pub use error::{DriverError, VirtioError};
pub use net::{NetProperties, Offloads};
pub use stream::{StreamDriver, StreamPort, StreamProperties};
pub use words::{
    Answers, Arrivals, ChainWriter, ControlBuffers, Operation, Piece, Received, Request, Requests, Response, Responses,
    Status,
};
