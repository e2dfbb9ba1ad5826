//! The same driver without the sandbox, under the same host code.
//!
//! The manager takes components only, so there is nothing to measure yet: it needs a seam that takes a [`cofferdam_sdk`]-style native lane. Until it has one, this
//! client says that it is not there, and the bench leaves its columns out.
//!
//! [`cofferdam_sdk`]: https://docs.rs/cofferdam-sdk

use anyhow::Result;

use super::cofferdam::Host;
use crate::backend::Backend;
use crate::engine::{Engine, Mode};

/// Connects, once the manager has a way to do so.
///
/// # Errors
/// None yet.
pub fn connect(host: &Host, device: &Backend, mode: Mode, queues: u16) -> Result<Option<Box<dyn Engine>>> {
    let _ = (host, device, mode, queues);
    Ok(None)
}
