//! An NBD server as a port: a binding's block service for every NBD client on this machine.
//!
//! The protocol is the NBD project's `doc/proto.md`, whose sections are cited by name: fixed newstyle negotiation,
//! simple and structured replies. No TLS (a server in "NOTLS mode"), no metadata contexts.
//!
//! ```text
//! port        the manager's view: start, address, shutdown; the accepting thread
//!   listen      sockets: Unix or loopback TCP          address, options, error
//!   worker      one thread per lane: epoll, polling, fairness, deadlines          shared
//!     connection  one client: handshake, then session
//!       handshake   options, pure                      proto    the protocol's numbers
//!       session     requests from header to answer     request  parsing and judging, pure
//!         intake      socket -> requests               wire     socket, read-ahead
//!         reads       leases and segments of reads     reply    heads, pure
//!         outbox      answers -> socket
//! handover    the same clients in another process
//! service     what is served, as traits: a binding, or a test's
//! ```
//!
//! Payload goes from the socket into the lease that the device reads, and from the lease that the device filled into
//! the socket. The one exception: payload that was read ahead with a batch of requests (at most 1,764 bytes, at the
//! first write after reads) is copied.
//!
//! # What a client can make the server hold
//! A read-ahead of 1,792 bytes, one option of 8 KiB, [`NbdOptions::max_requests_per_connection`] requests and some more
//! small replies, and [`NbdOptions::max_bytes_per_connection`] of the binding's buffers. It keeps those while it does
//! not read its answers; when another client starves for buffers, it is cut off after [`NbdOptions::stall`]. A client
//! that has not finished its handshake after ten seconds is cut off.
//!
//! # Leaving
//! A handle that is revoked is one connection's, whether it is the only one or all are: the others of its worker are
//! not touched. From then on
//! - a half-received payload gives its lease back at once, and what comes of it is thrown away;
//! - what was not admitted yet and what is new get `NBD_ESHUTDOWN` (a client that sees one should say `NBD_CMD_DISC`);
//! - what was admitted is answered as it completes, with what the device said, or with `NBD_ESHUTDOWN` if it was failed;
//! - when the device has nothing more of it, the client has 100 ms ([`options::LINGER`]) to take its answers, then the
//!   connection ends, its leases come back and its handle closes. Nothing a client does makes that longer: sending more,
//!   not reading, reading drop by drop.
//!
//! [`Port::shutdown`](service::Port::shutdown) does the same for all, stops accepting, and ends every thread inside its
//! grace, without waiting for the device any longer. A thread that is held up in a call into the binding is left behind
//! after another 400 ms, and ends when it comes back.

mod address;
mod connection;
mod error;
mod handover;
mod handshake;
mod intake;
mod listen;
pub mod options;
mod outbox;
mod port;
mod proto;
mod reads;
mod reply;
mod request;
pub mod service;
mod session;
mod shared;
mod wire;
mod worker;

pub use address::NbdAddress;
pub use error::NbdError;
pub use handover::KIND;
pub use options::NbdOptions;
pub use port::NbdPort;
pub use service::{Disk, Service};
