//! The port in front of a device in memory.

mod hostile;
mod leaving;
mod mock;
mod ordinary;
mod raw;
