//! The same socket in another process (see [`cofferdam_manager::Port::export`]), while it has no clients: theirs is memory that the device reaches, which stays with the process that mapped it. Who
//! comes meanwhile waits in the socket.
//!
//! Descriptors: the listening socket.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::service::{Exported, NotExportable};

/// [`Exported::kind`] of these ports.
pub const KIND: &str = "data";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PortState {
    pub(crate) address: String,
    /// Device and inode of the socket's file.
    pub(crate) file: (u64, u64),
}

pub(crate) fn because(error: impl std::fmt::Display) -> NotExportable {
    NotExportable::because(error.to_string())
}

impl PortState {
    pub(crate) fn export(&self, socket: OwnedFd) -> Result<Exported, NotExportable> {
        let state = serde_json::to_string(self).map_err(because)?;
        Ok(Exported { kind: KIND.to_owned(), state, descriptors: vec![socket] })
    }

    /// What another process exported.
    pub(crate) fn sort(exported: Exported) -> Result<(PortState, OwnedFd), DataError> {
        let Exported { kind, state, descriptors } = exported;
        let wrong = DataError::NotTakenOver;
        if kind != KIND {
            return Err(wrong(format!("a port of kind {kind:?}")));
        }
        let state = serde_json::from_str(&state).map_err(|error| wrong(error.to_string()))?;
        let [socket] = <[OwnedFd; 1]>::try_from(descriptors).map_err(|_| wrong("not one descriptor".to_owned()))?;
        Ok((state, socket))
    }
}
