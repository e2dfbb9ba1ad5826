//! The ports with real drivers and the sim's devices, in process.

mod fifo;
mod pty;
mod support;
