//! The ports with real drivers and the sim's devices, in process.

mod fifo;
mod lies;
mod pool;
mod pty;
mod support;
