//! A TAP interface as a port: a binding's network service for this machine's own network stack.
//!
//! ```text
//! port        the manager's view: start, address, shutdown                      address, error
//!   interface   the interface: made, set up, carrier, gone    ioctl  the calls for it
//!   worker      one thread per lane: both directions, waiting, link changes     shared  counts
//!     inbound     packets of the kernel -> leased buffers -> requests
//!     header      the kernel's header <-> flags and argument, pure
//!   handover    the same interface in another process
//! ```
//!
//! # The interface
//! `tap:NAME` makes an interface of that name in the network namespace of this process, for as long as the port lives: it has the device's hardware address and MTU, is up, and has a
//! carrier while the device's link is up. Checksums and segmentation are left to the device as far as was negotiated. With several pairs of queues in use the interface has as many
//! queues, each with a thread.
//! It is not persistent, so the kernel takes it away with the last descriptor, whatever becomes of this process. An interface that exists already is never taken over.
//!
//! # What is dropped, and where
//! A network may lose packets, and so does this, rather than wait:
//!
//! | when | what becomes of packets |
//! | --- | --- |
//! | the device's ring is full, or there is no buffer | the interface is not read; the kernel's queue (`txqueuelen`) fills and drops |
//! | the kernel does not take a packet now (`EAGAIN`, `ENOBUFS`, `ENOMEM`) | dropped, counted: to wait would hold the device's buffers for a stack that is out of memory |
//! | the kernel refuses a packet (`EINVAL`: sizes in its header that cannot be; `EIO`: the interface was set down) | dropped, counted |
//! | the device or its driver refuses a packet | dropped, counted |
//! | the interface was deleted by somebody | everything, both ways; the binding serves on, and the port can be detached |
//!
//! # Memory
//! Each lane leases at most [`IN_FLIGHT`] buffers for packets of up to the MTU, and [`LARGE_IN_FLIGHT`] for packets to be segmented. What the device delivers stays in its posted buffers until the
//! kernel has copied it, at most 64 packets at a time.

mod address;
mod error;
mod handover;
mod header;
mod inbound;
mod interface;
mod ioctl;
mod port;
mod shared;
mod worker;

pub use address::TapAddress;
pub use error::TapError;
pub use handover::KIND;
pub use inbound::{IN_FLIGHT, LARGE_IN_FLIGHT};
pub use port::TapPort;
pub use shared::TapCounts;
