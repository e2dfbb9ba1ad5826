//! The port over real sockets, in front of a service in memory that does as it is told.

mod client;
mod handover;
mod hostile;
mod leaving;
mod listening;
mod mock;
mod real_clients;
mod revoking;
mod stalls;
mod transmission;
