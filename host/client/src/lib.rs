//! A client of a Cofferdam binding in another process: block I/O on memory that the device reads and writes in place.
//!
//! `cofferdam port attach NAME data:/run/disk.data` makes the socket. A client connects, says how much memory it wants, and is given two
//! memfds: its own region, which the device reaches, and a pair of rings. From then on a request costs a few words in shared memory, and one
//! byte over the socket when the other side sleeps.
//!
//! ```no_run
//! use std::time::Duration;
//! use cofferdam_client::{Client, Op, Options, Request};
//!
//! let mut client = Client::connect("/run/disk.data", Options::default())?;
//! let slot = client.slot(4096)?;
//! slot.write_at(0, b"hello")?;
//! client.submit(&mut vec![Request { user: 1, op: Op::Write, offset: 0, length: 4096, may_unmap: false, slot: Some(slot) }])?;
//! let mut done = Vec::new();
//! client.wait(Duration::from_secs(5), &mut done)?;
//! done.remove(0).result?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! ```text
//! client    submit, poll, wait; answers every request exactly once, also when the host is gone
//!   connect   HELLO and WELCOME          memory    the region, slots of it
//!   ring      the rings in shared memory, for both sides          mapping   the only unsafe code
//! wire      packets, entries, numbers: what a client in another language needs          error
//! ```
//!
//! # Revocation
//! The operator may take the disk away at any time. Then [`Client::submit`] answers [`Error::Revoked`], what is outstanding is answered with
//! what the device said or [`Status::Shutdown`], [`Slot::read_at`] answers [`Error::Revoked`] rather than the zeroes that stand where the data was,
//! and the socket hangs up. A host that died looks the same. Connect again to go on.

pub mod wire;

mod client;
mod connect;
mod error;
mod mapping;
mod memory;
pub mod ring;

pub use client::{Client, Completion, Request};
pub use connect::Options;
pub use error::Error;
pub use memory::Slot;
pub use wire::{Geometry, Op, Status};
