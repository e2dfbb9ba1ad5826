//! The same interface in another process (see [`cofferdam_manager::Port::export`]): it lives as long as anybody has one of its queues open, so it is handed over as they are, and neither its
//! carrier nor its routes notice.
//!
//! Workers send what they have read of the interface and wait for its answers; what they were delivered they have written at once. Packets that come meanwhile wait in the kernel's queue and
//! in the device's posted buffers.
//!
//! Descriptors: the queues, in the order of their lanes.

use std::os::fd::OwnedFd;

use cofferdam_manager::{Exported, NotExportable};
use serde::{Deserialize, Serialize};

use crate::error::TapError;

/// [`Exported::kind`] of these ports.
pub const KIND: &str = "tap";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PortState {
    pub(crate) address: String,
    pub(crate) carrier: bool,
}

pub(crate) fn because(error: impl std::fmt::Display) -> NotExportable {
    NotExportable::because(error.to_string())
}

impl PortState {
    pub(crate) fn export(&self, queues: Vec<OwnedFd>) -> Result<Exported, NotExportable> {
        let state = serde_json::to_string(self).map_err(because)?;
        Ok(Exported { kind: KIND.to_owned(), state, descriptors: queues })
    }

    /// What another process exported.
    pub(crate) fn sort(exported: Exported) -> Result<(PortState, Vec<OwnedFd>), TapError> {
        if exported.kind != KIND {
            return Err(TapError::NotTakenOver(format!("a port of kind {:?}", exported.kind)));
        }
        let state = serde_json::from_str(&exported.state).map_err(|error| TapError::NotTakenOver(error.to_string()))?;
        Ok((state, exported.descriptors))
    }
}
