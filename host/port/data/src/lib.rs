//! The data socket as a port: zero-copy I/O for clients in other processes (DESIGN section 7, "Mapped memory for clients").
//!
//! A client is given a region of its own that the device reaches, and two rings; `cofferdam_client::wire` has the protocol, the README why it is
//! like this. Everything that comes over the socket or stands in the rings is as hostile as a guest's words: each entry is copied once and then judged, an index
//! that no honest client can write ends that client, and no client can make the host wait, grow or spend more on it than one thread's share of time.
//!
//! ```text
//! port        the manager's view: start, address, shutdown; the accepting thread
//!   listen      the socket and its file, who may connect          address, options, error, shared
//!   peer        one thread per client: hello, then serve, then the end          welcome  socket
//!     session     the rings' host side, without any socket: take, submit, answer
//! handover    the same socket in another process, while there are no clients
//! service     what is served, as traits: a binding, or a test's
//! ```
//!
//! # Threads
//! One per client, because the binding's bound of mapped handles is small (16), and because then the kernel's scheduler is what is fair between clients: one that
//! spins its indices, floods its socket or sends descriptors whose closing blocks keeps its own thread busy and nobody else's.
//!
//! # What a client can make the host hold
//! Its region (counted and bounded by the binding), the rings (at most [`rings_bytes`](cofferdam_client::ring::rings_bytes) of [`ENTRIES_MAX`](cofferdam_client::wire::ENTRIES_MAX)), a thread, an eventfd, the
//! socket, and at most a ring's size of requests in flight. Packets that are not read wait in the socket's own bounded buffer. A client that does not take its answers
//! is not read any further once the complete ring is full.
//!
//! # Leaving
//! At revocation what is new is answered with `Shutdown`, what was admitted is answered as it completes, then comes `REVOKED`, and the client has 100 ms
//! ([`options::LINGER`]) to take its answers before the rings' pages go and the socket is closed. `Port::shutdown` does the same for all within its grace, and
//! waits no longer for the device. A client that hangs up leaves at once; what it had in flight is answered to nobody.

mod address;
mod error;
mod handover;
mod listen;
pub mod options;
mod peer;
mod port;
pub mod service;
mod session;
mod shared;
mod socket;
mod welcome;

pub use address::DataAddress;
pub use error::DataError;
pub use handover::KIND;
pub use options::DataOptions;
pub use port::DataPort;
pub use service::{Disk, Region, Service};
