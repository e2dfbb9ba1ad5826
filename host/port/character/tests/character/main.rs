//! The ports with real drivers and the sim's devices, in process.

mod fifo;
mod pool;
mod pty;
mod support;
