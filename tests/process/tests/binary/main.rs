//! The binary against real programs. Each file is about one kind of claim; each test is named by its claim.

mod clients;
mod daemon;
mod devices;
mod draining;
mod foreground;
mod guests;
mod misfits;
mod ports;
mod traffic;
mod wire;
