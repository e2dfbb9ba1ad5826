//! What `ls` shows: plain data, made from counters that are read without disturbing who writes them.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use crate::binding::Binding;
use crate::handle::HandleShared;

/// Calls counted on one core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreCalls {
    /// The core.
    pub core: u32,
    /// Operations admitted on it since the start.
    pub operations: u64,
    /// Crossings into the driver made on it since the start.
    pub crossings: u64,
}

/// One open handle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandleStatus {
    /// Its number within the binding.
    pub id: u64,
    /// The port, or `in-process`; at most 256 bytes before control characters are escaped.
    pub port: String,
    /// Who is at the other end, in the port's words, bounded and escaped as `port` is.
    pub peer: String,
    /// The lane that serves it.
    pub lane: usize,
    /// Seconds since it was opened.
    pub age_seconds: u64,
    /// Requests not answered yet.
    pub in_flight: u32,
    /// Requests admitted since it was opened.
    pub requests: u64,
}

/// One binding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindingStatus {
    /// Its name.
    pub name: String,
    /// `loading`, `serving`, `recovering`, `failed`, `draining` or `detached`.
    pub state: String,
    /// Where it is exactly, a state of `docs/LIFECYCLE.md`.
    pub stage: String,
    /// Why it leaves, once it does.
    pub cause: Option<String>,
    /// The driver's file or label.
    pub driver: String,
    /// The device's address.
    pub device: String,
    /// How many drivers this binding has had.
    pub generation: u64,
    /// How often its driver broke down.
    #[serde(default)]
    pub crashes: u64,
    /// Seconds since it was made.
    pub age_seconds: u64,
    /// Whether it was loaded `--pinned`.
    pub pinned: bool,
    /// How the device is kept to the binding's memory: `host` (only the host gives it addresses), `iommu`, or `trusted` (`--trust-dma`: not at all); empty while it is loading.
    pub dma: String,
    /// What it gives: `block`, `entropy`, `stream`, `net`; empty while it is loading, and for a driver that gives no service.
    pub service: String,
    /// Data lanes.
    pub lanes: usize,
    /// Attached ports' addresses.
    pub ports: Vec<String>,
    /// Open handles.
    pub handles: Vec<HandleStatus>,
    /// Operations admitted and not answered.
    pub requests_in_flight: u64,
    /// Crossings running now.
    pub calls_running: u64,
    /// Calls per core; cores that never called are left out.
    pub calls: Vec<CoreCalls>,
    /// Size of the medium in bytes; 0 before it serves.
    pub capacity_bytes: u64,
    /// Packets, or pieces of streams, that arrived.
    pub arrivals: u64,
    /// Posted buffers that the driver made nothing of, and packets that a device had when it was lost.
    pub dropped: u64,
    /// Bytes of buffer memory that clients hold.
    pub leased_bytes: u64,
    /// That its device is waited for and how long yet, or why it is not any more (`--reconnect`); none while it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub away: Option<String>,
    /// Why it is leaving by itself, if it is.
    pub fault: Option<String>,
    /// Bytes of memory that were retired on purpose, because the device could not be shown to be silent; they stay until the process ends.
    pub retired_bytes: u64,
}

impl HandleStatus {
    fn of(handle: &HandleShared) -> HandleStatus {
        HandleStatus {
            id: handle.id,
            port: handle.label.clone(),
            peer: handle.peer.clone(),
            lane: handle.lane,
            age_seconds: handle.opened.elapsed().as_secs(),
            in_flight: handle.in_flight.load(Ordering::Relaxed),
            requests: handle.requests.load(Ordering::Relaxed),
        }
    }
}

impl Binding {
    /// Its open handles, by number. Takes no lock that is held across a call into the driver.
    pub fn handle_statuses(&self) -> Vec<HandleStatus> {
        self.open_handles().iter().map(|handle| HandleStatus::of(handle)).collect()
    }

    /// A picture of the binding now. Takes no lock that the data path takes.
    pub fn status(&self) -> BindingStatus {
        let life = self.life();
        let calls = self
            .gate()
            .stats()
            .into_iter()
            .filter(|core| core.entered > 0 || core.crossings_in > 0)
            .map(|core| CoreCalls { core: core.core, operations: core.entered, crossings: core.crossings_in })
            .collect();
        let lanes = self.serving.get().map_or(&[][..], |serving| &serving.lanes);
        let (arrivals, dropped) =
            lanes.iter().map(|lane| lane.arrivals()).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        BindingStatus {
            name: self.name().to_owned(),
            state: life.phase().to_string(),
            stage: life.state().to_string(),
            cause: life.cause().map(|cause| cause.to_string()),
            driver: self.driver().to_string(),
            device: self.device().to_owned(),
            generation: self.generation(),
            crashes: self.crash_count(),
            age_seconds: self.age().as_secs(),
            pinned: self.pinned,
            dma: self.confinement.get().map_or("", |confinement| confinement.as_str()).to_owned(),
            service: self.offer().map_or("", |offer| offer.service()).to_owned(),
            lanes: self.lanes(),
            ports: self.ports(),
            handles: self.handle_statuses(),
            requests_in_flight: self.gate().operations(),
            calls_running: self.gate().crossings(),
            calls,
            capacity_bytes: self.geometry().map_or(0, |geometry| geometry.capacity_bytes),
            arrivals,
            dropped,
            leased_bytes: self
                .serving
                .get()
                .map_or(0, |serving| serving.lanes.first().map_or(0, |lane| lane.arena().leased_bytes())),
            away: self.away_sentence(),
            fault: self.fault().map(ToString::to_string),
            retired_bytes: self.retired_bytes(),
        }
    }
}
