//! The vhost-user bus: drives a virtio device that another process serves on a Unix socket.
//!
//! This is the *front end* of the [vhost-user protocol][spec]: it shares memory (memfds) and eventfds with the *backend*
//! process, tells it where the rings are, and is a [`cofferdam_device::Transport`] for everybody above.
//!
//! ```no_run
//! use cofferdam_bus_vhost_user::VhostUser;
//! use cofferdam_device::Transport;
//!
//! let mut device = VhostUser::connect("vhost-user:/run/blk.sock")?;
//! let mut capacity = [0; 8];
//! device.read_config(0, &mut capacity)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # When is a vhost-user device silent (DESIGN L1)?
//!
//! Stopping a ring does not wait for what is in flight, and closing the connection stops nothing at once. So:
//!
//! | published, not used | backend | answer of `quiesce` |
//! | --- | --- | --- |
//! | any | process gone (pidfd) | confirmed |
//! | none | stops every ring when asked, or has closed the connection | confirmed |
//! | none | does not answer, or answers garbage, and its process runs | unconfirmed |
//! | some | process gone before the deadline | confirmed |
//! | some | process runs, or who it is cannot be known | unconfirmed |
//!
//! # Parts
//!
//! - `address`: `vhost-user:/path`. `claim`: one binding per socket, host-wide.
//! - `wire`: one message and its answer under a time limit. `credentials`: who sent an answer (the only `unsafe` here).
//! - `peer`: the backend's process and whether it is gone.
//! - `backend_channel`: what the backend says unasked.
//! - `handshake`: what is learnt before a driver is asked. `device`: the transport. `events`: its descriptors. `slots`: its memory while it runs.
//! - `adopt`: the same device, handed from one process to another.
//!
//! [spec]: https://qemu-project.gitlab.io/qemu/interop/vhost-user.html

mod address;
mod adopt;
mod backend_channel;
mod claim;
mod credentials;
mod device;
mod error;
mod events;
mod handshake;
mod peer;
mod slots;
mod wire;

pub use address::{Address, MAX_PATH_BYTES, SCHEME};
pub use adopt::KIND;
pub use device::{MAX_CONFIG_BYTES, MAX_QUEUES, MAX_REGIONS, MAX_RING_ENTRIES, VhostUser};
pub use error::ConnectError;
pub use wire::ANSWER_LIMIT;
