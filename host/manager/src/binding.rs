//! One driver joined to one device.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use cofferdam_device::{DmaArena, DmaRegion};
use cofferdam_gate::Gate;
use cofferdam_runtime::{Instance, KillSwitch, Module};
use parking_lot::Mutex;

use crate::block::BlockGeometry;
use crate::certificate::Certificate;
use crate::device::SharedTransport;
use crate::error::{LaneFault, OpenError};
use crate::handle::{Handle, HandleShared, HandleSpec};
use crate::ladder::Progress;
use crate::lane::Lane;
use crate::residue::Marks;

/// Where a binding is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum BindingState {
    /// Being set up; no client can reach it.
    Loading = 0,
    /// Serves.
    Serving = 1,
    /// On the ladder; no new operation is admitted.
    Draining = 2,
    /// Over.
    Detached = 3,
}

/// Makes a binding's service reachable from outside.
pub trait Port: Send {
    /// The address as an operator writes it, `nbd:/run/disk.sock`.
    fn address(&self) -> String;

    /// Stops accepting, lets what was answered go out for at most `grace`, then severs its clients. When this returns, every thread of the port has ended, every
    /// handle is closed and every buffer is given back. Bounded by `grace` and a little.
    fn shutdown(self: Box<Self>, grace: Duration) -> PortReport;
}

/// What a port says when it has gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortReport {
    /// Connections that were open when it was told to go.
    pub connections: u64,
    /// Of those, how many had to be severed with answers unsent.
    pub severed: u64,
}

/// What the ladder takes apart. Filled by `load` step by step, so that a failure half-way leaves by the same steps.
#[derive(Default)]
pub(crate) struct Parts {
    pub(crate) transport: Option<SharedTransport>,
    pub(crate) rings: Option<Arc<DmaRegion>>,
    pub(crate) arena: Option<DmaArena>,
    pub(crate) lanes: Vec<Arc<Lane>>,
    pub(crate) control: Option<Instance>,
    pub(crate) module: Option<Module>,
    pub(crate) kills: Vec<KillSwitch>,
    pub(crate) marks: Marks,
    pub(crate) progress: Progress,
}

/// What clients reach once a load has succeeded.
pub(crate) struct Serving {
    pub(crate) lanes: Vec<Arc<Lane>>,
    pub(crate) geometry: BlockGeometry,
}

struct Handles {
    open: BTreeMap<u64, Arc<HandleShared>>,
    next: u64,
    closed: bool,
}

struct Ports {
    attached: Vec<Box<dyn Port>>,
    closed: bool,
}

/// One driver joined to one device; made by [`crate::Manager::load`].
pub struct Binding {
    name: String,
    driver: String,
    device: String,
    pub(crate) pinned: bool,
    generation: AtomicU64,
    created: Instant,
    gate: Gate,
    state: AtomicU8,
    pub(crate) fault: OnceLock<LaneFault>,
    /// The watch has a ladder under way for it.
    pub(crate) leaving: AtomicBool,
    /// Somebody asked for force while another run of the ladder was waiting.
    pub(crate) force: AtomicBool,
    pub(crate) serving: OnceLock<Serving>,
    /// Held by `load` while it builds and by the ladder while it takes apart; never on the data path.
    pub(crate) parts: Mutex<Parts>,
    handles: Mutex<Handles>,
    ports: Mutex<Ports>,
    pub(crate) certificate: OnceLock<Certificate>,
    /// Closed handles with requests in flight, and their lanes. At most as many as there are requests.
    orphans: Mutex<Vec<(Arc<HandleShared>, Arc<Lane>)>>,
}

impl std::fmt::Debug for Binding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Binding").field("name", &self.name).field("state", &self.state()).finish()
    }
}

impl Drop for Binding {
    /// Gives the gate's slot back, and with it the drain's waker, which the slot would keep for ever. Handles hold the binding, so none is left to ask; a copy of the
    /// gate goes on answering `closed` (G7).
    fn drop(&mut self) {
        self.gate.close();
        // Refused only while something is inside: then the slot stays taken.
        let _ = self.gate.retire();
    }
}

impl Binding {
    pub(crate) fn new(name: String, driver: String, device: String, pinned: bool, handle_limit: usize) -> Binding {
        let gate = if pinned { Gate::pinned() } else { Gate::new() };
        gate.limit_handles(u32::try_from(handle_limit).unwrap_or(u32::MAX));
        Binding {
            name,
            driver,
            device,
            pinned,
            generation: AtomicU64::new(1),
            created: Instant::now(),
            gate,
            state: AtomicU8::new(BindingState::Loading as u8),
            fault: OnceLock::new(),
            leaving: AtomicBool::new(false),
            force: AtomicBool::new(false),
            serving: OnceLock::new(),
            parts: Mutex::new(Parts::default()),
            handles: Mutex::new(Handles { open: BTreeMap::new(), next: 1, closed: false }),
            ports: Mutex::new(Ports { attached: Vec::new(), closed: false }),
            certificate: OnceLock::new(),
            orphans: Mutex::new(Vec::new()),
        }
    }

    /// The name it goes by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The driver's file or label.
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// The device's address.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// How many drivers this binding has had, from 1.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Since when it exists.
    pub fn age(&self) -> Duration {
        self.created.elapsed()
    }

    /// Where it is in its life.
    pub fn state(&self) -> BindingState {
        match self.state.load(Ordering::Acquire) {
            0 => BindingState::Loading,
            1 => BindingState::Serving,
            2 => BindingState::Draining,
            _ => BindingState::Detached,
        }
    }

    pub(crate) fn set_state(&self, state: BindingState) {
        self.state.store(state as u8, Ordering::Release);
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Data lanes; 0 before it serves.
    pub fn lanes(&self) -> usize {
        self.serving.get().map_or(0, |serving| serving.lanes.len())
    }

    /// What the device can do; `None` before it serves.
    pub fn geometry(&self) -> Option<&BlockGeometry> {
        self.serving.get().map(|serving| &serving.geometry)
    }

    /// The certificate, once the ladder has ended.
    pub fn certificate(&self) -> Option<&Certificate> {
        self.certificate.get()
    }

    /// Opens a handle.
    ///
    /// # Errors
    /// [`OpenError`]: the binding is going or gone, has its limit of handles, or has no such lane.
    pub fn open(self: &Arc<Self>, spec: HandleSpec) -> Result<Handle, OpenError> {
        let serving = self.serving.get().ok_or(OpenError::Revoked)?;
        let lane = serving
            .lanes
            .get(spec.lane)
            .ok_or(OpenError::NoSuchLane { asked: spec.lane, lanes: serving.lanes.len() })?;
        let mut handles = self.handles.lock();
        if handles.closed {
            return Err(OpenError::Revoked);
        }
        let id = handles.next;
        let (handle, shared) = Handle::new(Arc::clone(self), Arc::clone(lane), id, spec)?;
        handles.next += 1;
        handles.open.insert(id, shared);
        Ok(handle)
    }

    pub(crate) fn forget_handle(&self, id: u64) {
        self.handles.lock().open.remove(&id);
    }

    /// Refuses new handles and revokes those that are open; returns how many that was. Idempotent.
    pub(crate) fn revoke_handles(&self) -> u64 {
        let open: Vec<_> = {
            let mut handles = self.handles.lock();
            handles.closed = true;
            handles.open.values().cloned().collect()
        };
        let revoked = self.gate.revoke_handles() as u64;
        open.iter().for_each(|handle| handle.announce_revocation());
        revoked
    }

    /// Looks after what a closed handle has in flight, for the watching thread to reap.
    pub(crate) fn adopt_orphan(&self, handle: &Arc<HandleShared>, lane: &Arc<Lane>) {
        self.orphans.lock().push((Arc::clone(handle), Arc::clone(lane)));
    }

    /// Reaps for closed handles; whether any has something in flight still.
    pub(crate) fn reap_orphans(&self) -> bool {
        let mut orphans = self.orphans.lock();
        // Of a binding that has ended nothing is left to reap.
        let over = self.state() == BindingState::Detached;
        orphans.retain(|(handle, lane)| {
            let waits = |handle: &HandleShared| handle.in_flight.load(Ordering::Acquire) > 0;
            if !over && waits(handle) {
                lane.try_reap();
            }
            !over && waits(handle)
        });
        !orphans.is_empty()
    }

    pub(crate) fn open_handles(&self) -> Vec<Arc<HandleShared>> {
        self.handles.lock().open.values().cloned().collect()
    }

    /// Gives the binding a port to take down when it leaves.
    ///
    /// # Errors
    /// The port back, if the binding is leaving already; the caller shuts it down.
    pub fn attach_port(&self, port: Box<dyn Port>) -> Result<(), Box<dyn Port>> {
        let mut ports = self.ports.lock();
        if ports.closed {
            return Err(port);
        }
        ports.attached.push(port);
        Ok(())
    }

    /// Addresses of the ports that are attached.
    pub fn ports(&self) -> Vec<String> {
        self.ports.lock().attached.iter().map(|port| port.address()).collect()
    }

    pub(crate) fn take_ports(&self) -> Vec<Box<dyn Port>> {
        let mut ports = self.ports.lock();
        ports.closed = true;
        std::mem::take(&mut ports.attached)
    }
}
