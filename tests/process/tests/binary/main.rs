//! The binary against real programs. Each file is about one kind of claim; each test is named by its claim.

mod api;
mod attaching;
mod authoring;
mod character;
mod clients;
mod daemon;
mod devices;
mod draining;
mod events;
mod finding;
mod foreground;
mod guests;
mod handles;
mod http;
mod log;
mod machine;
mod misfits;
mod network;
mod ports;
mod recovery;
mod terminals;
mod tour;
mod traffic;
mod why;
mod wire;
mod zero_copy;
