//! The clients, each an `Engine` on a connection of its own.
//!
//! | client | what it is |
//! | --- | --- |
//! | `cofferdam` | the embedding API: manager, sandboxed driver, in-process handle |
//! | `native` | the same host code with the same driver linked natively |
//! | `blkio` | the crate blkio, libblkio's vhost-user driver |
//! | `bare` | a ring written by hand, which checks nothing but the status |
//! | `cofferdam-nbd` | a pipelined NBD client of our NBD port |
//! | `qsd-nbd` | the same client of qemu-storage-daemon's own NBD export |

pub mod bare;
pub mod blkio;
pub mod cofferdam;
pub mod native;
pub mod nbd;

use anyhow::Result;

use crate::backend::Backend;
use crate::engine::{Engine, Mode};

/// A client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub enum Client {
    /// See the module.
    Cofferdam,
    /// See the module.
    Native,
    /// See the module.
    Blkio,
    /// See the module.
    Bare,
    /// See the module.
    CofferdamNbd,
    /// See the module.
    QsdNbd,
}

impl Client {
    /// As in the JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Client::Cofferdam => "cofferdam",
            Client::Native => "native",
            Client::Blkio => "blkio",
            Client::Bare => "bare",
            Client::CofferdamNbd => "cofferdam-nbd",
            Client::QsdNbd => "qsd-nbd",
        }
    }

    /// Whether it is a client of an NBD server: three threads in a row, and its own way to wait.
    #[must_use]
    pub fn is_nbd(self) -> bool {
        matches!(self, Client::CofferdamNbd | Client::QsdNbd)
    }

    /// Whether it has this mode.
    #[must_use]
    pub fn has(self, mode: Mode) -> bool {
        match self {
            // libblkio has no mode between polling and sleeping; its default is to sleep.
            Client::Blkio => mode != Mode::Adaptive,
            // The client sleeps in recv, the server does what it does.
            Client::CofferdamNbd | Client::QsdNbd => mode == Mode::Event,
            _ => true,
        }
    }

    /// Connects. `None`: this build does not have it.
    ///
    /// # Errors
    /// When the device cannot be had.
    pub fn connect(
        self,
        host: &cofferdam::Host,
        device: &Backend,
        mode: Mode,
        queues: u16,
    ) -> Result<Option<Box<dyn Engine>>> {
        Ok(Some(match self {
            Client::Cofferdam => Box::new(cofferdam::InProcess::connect(host, device, mode, queues)?),
            Client::Native => return native::connect(host, device, mode, queues),
            Client::Blkio => Box::new(blkio::Blkio::connect(device, mode, queues)?),
            Client::Bare => Box::new(bare::Bare::connect(device, mode, queues)?),
            Client::CofferdamNbd => Box::new(cofferdam::OverNbd::connect(host, device)?),
            Client::QsdNbd => Box::new(nbd::NbdClient::connect(&device.nbd_socket(), "null0")?),
        }))
    }
}
