//! Ports of bytes: what an entropy device gives and what the ports of a console say, where any program of the machine can read and write it.
//!
//! ```text
//! address   fifo:/path  entropy-pool[,rate=N]  pty:/link/path[,port=N]  stdio[,port=N]
//! port      the manager's view: start, address, shutdown
//!   entropy   one thread: a sink asks, the device fills          sinks: fifo, pool
//!   stream    one thread: bytes both ways, in order              lines: pty, stdio
//! place     a file that the port makes at a path, and removes if it is still its own
//! handover  the same in another process
//! ioctl     the calls that rustix does not have
//! ```
//!
//! # What is held, and for whom
//! A fifo has at most four requests of 16 KiB in flight or waiting for room in the pipe. A stream has one write in flight, of what the device takes at once and at most 16 KiB, and up to 64
//! posted buffers that its reader has not taken: then nothing more is taken from the device, which runs out of buffers. Nothing else grows, and a port with nothing to do sleeps.
//!
//! # Leaving
//! The path is removed first. What had arrived goes out for as long as the grace allows; then the descriptors close: a reader of the fifo finds its end, a user of the pseudo terminal is hung up on.

mod address;
mod entropy;
mod error;
mod fifo;
mod handover;
mod ioctl;
mod place;
mod pool;
mod port;
mod pty;
mod stdio;
mod stream;

pub use address::CharacterAddress;
pub use error::CharacterError;
pub use handover::KIND;
pub use port::CharacterPort;
