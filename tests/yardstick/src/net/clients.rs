//! The clients, each on a connection of its own.
//!
//! | client | what it is |
//! | --- | --- |
//! | `cofferdam` | the embedding API: manager, sandboxed virtio-net, in-process handle |
//! | `bare` | a split ring written by hand, which checks next to nothing |
//! | `dpdk` | DPDK's net_virtio_user, split ring, in a testpmd of its own |

use anyhow::Result;

use super::job::{Job, Station};
use super::testpmd::{Counters, Testpmd};
use super::{bare, cofferdam};
use crate::clients::cofferdam::Host;
use crate::machine::Cores;

/// A client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub enum Client {
    /// See the module.
    Cofferdam,
    /// See the module.
    Bare,
    /// See the module.
    Dpdk,
}

/// A connected client.
pub enum Connected {
    /// It works in this process, on the calling thread.
    Here(Box<dyn Station>),
    /// It is a process that works by itself.
    There(Testpmd),
}

impl Client {
    /// As in the JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Client::Cofferdam => "cofferdam",
            Client::Bare => "bare",
            Client::Dpdk => "dpdk",
        }
    }

    /// Connects to `device`.
    ///
    /// # Errors
    /// When the device cannot be had.
    pub fn connect(self, host: &Host, device: &Testpmd, job: Job, cores: Cores) -> Result<Connected> {
        let socket = device.socket();
        Ok(match self {
            Client::Cofferdam => Connected::Here(cofferdam::connect(host, &socket, job)?),
            Client::Bare => Connected::Here(Box::new(bare::Bare::connect(&socket, job)?)),
            Client::Dpdk => Connected::There(Testpmd::client(&socket, job, cores)?),
        })
    }
}

/// Frames of this direction that the device has counted.
#[must_use]
pub fn moved(counters: Counters, job: Job) -> u64 {
    match job.direction {
        super::job::Direction::Send => counters.received,
        super::job::Direction::Receive => counters.sent,
    }
}
