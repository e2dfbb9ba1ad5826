//! A driver for virtio console devices: virtio 1.2, section 5.3.
//!
//! ```text
//! queue          0        1         2        3         2n+2     2n+3
//!                receiveq transmitq control  control   receiveq transmitq
//! of             port 0             receiveq transmitq port n (n >= 1)
//! served by      lane 0             control lane       lane n
//! there is       always             only with MULTIPORT
//! ```
//!
//! | module | about |
//! | --- | --- |
//! | `config` | configuration space, from allegation to checked (section 5.3.4) |
//! | `plan` | features, queues, and what the host asks: the control lane (sections 5.3.2, 5.3.3, 5.3.5) |
//! | `ports` | which ports there are, as the device tells it in control messages (section 5.3.6.2) |
//! | `message` | the layout of those messages |
//! | `lane` | the bytes of one port (section 5.3.6) |
//!
//! Not served: emergency write, which is for a system that has no queues yet; its feature is never accepted.

mod config;
mod lane;
mod message;
mod plan;
mod ports;

pub use lane::VirtioConsoleLane;
pub use plan::VirtioConsole;

/// The virtio device id of a console device (section 5).
pub const DEVICE_TYPE: u32 = 3;
/// Most ports that are served: with the two control queues they take the 64 queues that a plan may have.
pub const MAX_PORTS: u32 = (cofferdam_sdk::device::MAX_PLANNED_QUEUES as u32 - 2) / 2;
/// Bytes of each buffer that is posted for a port.
pub const RECEIVE_BUFFER_BYTES: u32 = 4096;
/// Largest single write in bytes.
pub const MAX_WRITE_BYTES: u32 = 65_536;

/// Feature bits (section 5.3.3).
pub mod feature {
    /// `cols` and `rows` are there.
    pub const SIZE: u64 = 1 << 0;
    /// `max_nr_ports` and the control queues are there.
    pub const MULTIPORT: u64 = 1 << 1;
    /// `emerg_wr` is there. Never accepted.
    pub const EMERG_WRITE: u64 = 1 << 2;

    /// What this driver can make use of.
    pub const WANTED: u64 = SIZE | MULTIPORT;
    /// Every device-type bit that a console device has. A device that offers another is none.
    pub const OF_A_CONSOLE: u64 = WANTED | EMERG_WRITE;
}

#[cfg(feature = "component")]
cofferdam_sdk::export_stream_driver!(VirtioConsole, devices: [cofferdam_sdk::DeviceId::virtio(DEVICE_TYPE)]);
