//! `cofferdam daemon --takeover`: a new daemon in the place of the one that serves.
//!
//! ```text
//! new: connects to SOCKET.takeover          old: listens there, one at a time
//!   hello ------------------------------->  looks whether everything can be handed over
//!   <-- refused, with every reason          or
//!   <-- manifest: what is bound, components     serves on
//!   compiles, links; prepared ----------->  holds clients, drains, exports; at most the deadline
//!   <-- gave up, serves on                  or
//!   <-- state: every descriptor                 holds on
//!   adopts, touches nothing; ready ------>  everything still there?
//!   <-- commit                              from here on it does nothing but end
//!   opens the gates, serves
//! ```
//!
//! One message commits. Until it is sent, the end of the connection (of either process, at any moment) leaves the old one serving and the new one gone. Once it is sent, it is
//! in the new one's socket, also if the old one ends at once. A new one that has waited for it too long first shuts the connection, so that it cannot be sent any more,
//! and then looks whether it was.
//!
//! With the bindings go the control socket, this socket, and the lock that says whose they are: an advisory lock belongs to the open file, which both have open.
//!
//! Who can forge what is received here: a process of the same user, or root; the socket is that user's alone, and the kernel says who is at the other end.

mod give;
mod take;
mod turns;
mod wire;

use std::os::fd::OwnedFd;
use std::time::Duration;

use cofferdam_manager::{BindingManifest, Exported, ExportedBinding};
use serde::{Deserialize, Serialize};

pub(crate) use give::{Given, Giver};
pub(crate) use take::{Taken, take};
pub(crate) use turns::Turns;
use wire::Broken;

/// Version of all these words together, and of the states within them. Another one is refused.
const VERSION: u32 = 1;
/// How long the words that nothing is waited for may take.
const PROMPT: Duration = Duration::from_secs(5);
/// How long the new daemon may take to get ready. The old one serves meanwhile.
const PREPARE: Duration = Duration::from_secs(30);

/// What the new daemon says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "says", rename_all = "kebab-case")]
enum Ask {
    /// First. A daemon of another version may say more with it.
    Hello {
        version: u32,
        /// How long clients may be held.
        deadline_ms: u64,
    },
    Prepared,
    Ready,
    /// It cannot; the other one serves on.
    Failed {
        reason: String,
    },
}

/// What the old one answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "says", rename_all = "kebab-case")]
enum Answer {
    /// It does not, and serves on.
    Refused {
        reason: String,
    },
    /// With a file for each component.
    Manifest {
        process: u32,
        bindings: Vec<BindingManifest>,
    },
    /// With the lock, the control socket and this socket, and then those of each binding.
    State {
        /// Since when clients are held, by `CLOCK_MONOTONIC`.
        held_since: Duration,
        bindings: Vec<Parcel>,
    },
    Commit,
}

/// An [`ExportedBinding`] without its descriptors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parcel {
    name: String,
    state: String,
    descriptors: usize,
    transport: Part,
    ports: Vec<Part>,
}

/// An [`Exported`] without its descriptors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    kind: String,
    state: String,
    descriptors: usize,
}

impl Part {
    fn pack(exported: Exported, into: &mut Vec<OwnedFd>) -> Part {
        let Exported { kind, state, descriptors: mut own } = exported;
        let descriptors = own.len();
        into.append(&mut own);
        Part { kind, state, descriptors }
    }

    fn unpack(self, from: &mut std::vec::IntoIter<OwnedFd>) -> Result<Exported, Broken> {
        Ok(Exported { kind: self.kind, state: self.state, descriptors: some(from, self.descriptors)? })
    }
}

impl Parcel {
    fn pack(binding: ExportedBinding, into: &mut Vec<OwnedFd>) -> Parcel {
        let ExportedBinding { name, state, descriptors: mut own, transport, ports } = binding;
        let descriptors = own.len();
        into.append(&mut own);
        let transport = Part::pack(transport, into);
        let ports = ports.into_iter().map(|port| Part::pack(port, into)).collect();
        Parcel { name, state, descriptors, transport, ports }
    }

    fn unpack(self, from: &mut std::vec::IntoIter<OwnedFd>) -> Result<ExportedBinding, Broken> {
        let descriptors = some(from, self.descriptors)?;
        let transport = self.transport.unpack(from)?;
        let ports = self.ports.into_iter().map(|port| port.unpack(from)).collect::<Result<_, _>>()?;
        Ok(ExportedBinding { name: self.name, state: self.state, descriptors, transport, ports })
    }
}

/// So many of those that are left.
fn some(from: &mut std::vec::IntoIter<OwnedFd>, count: usize) -> Result<Vec<OwnedFd>, Broken> {
    if count > from.len() {
        return Err(Broken::Garbage(format!("{count} descriptors are announced, {} are there", from.len())));
    }
    Ok(from.take(count).collect())
}

/// What every process of this machine means by the same number.
fn monotonic_now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}
