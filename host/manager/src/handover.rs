//! Bindings in the hands of another process: a newer daemon takes over from the one that serves (DESIGN section 10).
//!
//! ```text
//!          this process                              the other one
//! serves   Manager::obstacles, manifests  ------->   Manager::prepare: compiles, links
//!          Manager::hand_over: ports take nothing more, what was taken is answered, clients wait
//! held     every ledger is empty          ------->   Manager::adopt: memory, rings, device, driver; touches nothing
//! -------- HandOver::commit, and then nothing more -- Adopted::serve: clients go on ---------------------------
//!          or HandOver dropped: serves on            or Adopted dropped: leaves no trace
//! ```
//!
//! Until the commit this process can go on as if nothing had been, because the other one has only looked: it has neither written to a ring or to a client nor read
//! from a socket. From the commit on this process does nothing more with what it gave away: no ladder is run for it, no device quiesced, no path removed.
//!
//! What is carried is what cannot be made anew. Ledgers are empty, so a ring for requests is an index and a place, and their buffers' memory is all free; posted buffers stay with the device,
//! where they lie and under the same numbers. The driver is another instance of the same component, which adopts as after a crash.

mod adopt;
mod export;
mod recipe;

use std::os::fd::OwnedFd;

use cofferdam_device::Exported;
use cofferdam_runtime::MAX_STATE_BYTES;
use serde::{Deserialize, Serialize};

use crate::control::ControlState;
use crate::lane::LaneState;
pub use adopt::{Adopted, Prepared};
pub use export::{HandOver, HandOverError, Manifests};
pub(crate) use recipe::Recipe;

/// What another process has to know of a binding to get ready for it. Made for a wire; its words are those of one version of this crate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BindingManifest {
    /// Its name.
    pub name: String,
    /// What `ls` calls its driver.
    pub driver: String,
    /// The device's address.
    pub device: String,
    /// SHA-256 of the component, 64 hexadecimal digits.
    pub digest: String,
    recipe: Recipe,
}

/// One binding on its way to another process.
#[derive(Debug)]
pub struct ExportedBinding {
    /// Its name.
    pub name: String,
    /// Its state, for [`crate::Manager::adopt`].
    pub state: String,
    /// Rings, buffers, and of each queue its doorbell and its call descriptor.
    pub descriptors: Vec<OwnedFd>,
    /// The device, for the bus that has to adopt it.
    pub transport: Exported,
    /// The ports, for whoever knows their kinds.
    pub ports: Vec<Exported>,
}

/// [`ExportedBinding::state`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// Features that the driver negotiated.
    features: u64,
    /// The driver's hint for the next one.
    hint_version: u32,
    hint: Vec<u8>,
    lanes: Vec<LaneState>,
    /// Of a control lane with queues of its own.
    control: Option<ControlState>,
    /// How the memory's files are called.
    memory: String,
    rings: Memory,
    buffers: Memory,
    generation: u64,
    crashes: u64,
    /// Of the component that is its driver now.
    digest: String,
    /// Writes were acknowledged that no flush has covered, in a binding whose device is brought back when it is lost.
    unflushed: bool,
    /// The disk's id, if it is to be compared when its device comes back.
    id: Option<Vec<u8>>,
    /// A client has not heard yet that its writes may be lost.
    owes_flush_errors: bool,
    /// None has.
    untold: bool,
}

/// More than anything that is counted one by one comes to.
const MOST_COUNTED: u64 = 1 << 48;

impl State {
    /// Whether it can be the state of the binding `name`. What belongs to rings and memory is looked up where those are.
    fn check(&self, name: &str) -> Result<(), String> {
        let counted = [self.generation, self.crashes].into_iter().all(|count| count <= MOST_COUNTED);
        if !counted || self.generation == 0 {
            return Err(format!("generation {} after {} crashes", self.generation, self.crashes));
        }
        if self.hint.len() > MAX_STATE_BYTES {
            return Err(format!("a hint of {} bytes, the most is {MAX_STATE_BYTES}", self.hint.len()));
        }
        // What is left of the binding is looked up by it.
        let number = self.memory.strip_prefix("cofferdam-").and_then(|rest| rest.strip_suffix(name)?.strip_suffix('-'));
        match number.and_then(|number| number.parse::<u64>().ok()) {
            Some(number) if number <= MOST_COUNTED => Ok(()),
            _ => Err(format!("memory called {:?}", self.memory)),
        }
    }
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Memory {
    bytes: u64,
    iova: u64,
}
