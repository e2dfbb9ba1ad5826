//! The port as the manager knows it: started, asked for its address, shut down.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;
use std::time::{Duration, Instant};

use cofferdam_manager::{
    Binding, Exported, Handle, HandleSpec, NetProperties, NotExportable, Notify, Offer, Parking, Port, PortReport,
    PortThreads,
};

use crate::address::TapAddress;
use crate::error::TapError;
use crate::handover::{PortState, because};
use crate::inbound::Inbound;
use crate::interface::Interface;
use crate::shared::{Counts, Shared, TapCounts};
use crate::worker::Worker;

/// How much longer than its grace a shutdown may take: a worker that is in a call into a driver comes back inside the call's deadline of 100 ms.
const OVERRUN: Duration = Duration::from_millis(400);

/// A TAP interface in front of one [`Binding`].
///
/// Dropping it without [`Port::shutdown`] shuts it down with no grace.
pub struct TapPort {
    shared: Arc<Shared>,
    /// One per worker.
    notifies: Vec<Arc<Notify>>,
    threads: PortThreads,
    /// Another process has the interface.
    forgotten: bool,
}

impl std::fmt::Debug for TapPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TapPort").field("address", &self.shared.address).finish_non_exhaustive()
    }
}

impl TapPort {
    /// Makes the interface and serves it until [`Port::shutdown`].
    ///
    /// # Errors
    /// [`TapError`]; nothing is left behind.
    pub fn start(binding: Arc<Binding>, address: &TapAddress) -> Result<TapPort, TapError> {
        let offer = binding.offer().ok_or(TapError::NotServing)?;
        let Offer::Net(net) = &*offer else { return Err(TapError::NotNet(offer.service())) };
        // Lanes beyond the pairs in use are never served by the device.
        let lanes = binding.lanes().min(usize::from(net.pairs));
        if lanes == 0 {
            return Err(TapError::NotServing);
        }
        let opened = open(&binding, address, lanes)?;
        let interface = Interface::new(address, net, lanes)?;
        let port = TapPort::serve(&binding, address, interface, opened, net, false)?;
        tracing::info!(port = %address, queues = lanes, mtu = net.mtu, link = net.link_up, "interface up");
        Ok(port)
    }

    /// The interface that another process exported. Until [`Port::resume`] nothing is read from it and nothing written, and it stays as it is if this is dropped before that.
    ///
    /// # Errors
    /// [`TapError`]: the other process can go on.
    pub fn adopt(binding: Arc<Binding>, exported: Exported) -> Result<TapPort, TapError> {
        let offer = binding.offer().ok_or(TapError::NotServing)?;
        let Offer::Net(net) = &*offer else { return Err(TapError::NotNet(offer.service())) };
        let (state, queues) = PortState::sort(exported)?;
        let address: TapAddress = state.address.parse()?;
        // How many pairs are in use is known again once the device is this process's.
        let lanes = queues.len();
        if lanes > binding.lanes() {
            return Err(TapError::NotTakenOver(format!("{lanes} queues for {} lanes", binding.lanes())));
        }
        let interface = Interface::adopt(queues, state.carrier)?;
        let opened = open(&binding, &address, lanes)?;
        TapPort::serve(&binding, &address, interface, opened, net, true)
    }

    fn serve(
        binding: &Arc<Binding>,
        address: &TapAddress,
        interface: Interface,
        opened: Vec<(Handle, Arc<Notify>)>,
        net: &NetProperties,
        adopted: bool,
    ) -> Result<TapPort, TapError> {
        let shared = Arc::new(Shared {
            binding: Arc::clone(binding),
            address: address.clone(),
            interface,
            stopping: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            counts: Counts::default(),
            parking: Parking::new(adopted),
        });
        let notifies = opened.iter().map(|(_, notify)| Arc::clone(notify)).collect();
        let threads = PortThreads::default();
        let mut port = TapPort { shared: Arc::clone(&shared), notifies, threads, forgotten: adopted };
        for (lane, (handle, notify)) in opened.into_iter().enumerate() {
            let worker = Worker::new(Arc::clone(&shared), lane, handle, notify, Inbound::new(net));
            port.threads
                .spawn(Builder::new().name(format!("tap-lane-{lane}")), move || worker.run())
                .map_err(|source| TapError::Io { what: "starting a thread", source })?;
        }
        Ok(port)
    }

    /// Packets so far.
    #[must_use]
    pub fn counts(&self) -> TapCounts {
        self.shared.counts.read()
    }

    /// Ends its threads, which stand, without a word to anybody.
    fn leave(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.parking.release(false);
        self.notifies.iter().for_each(|notify| notify.signal());
        let ended = self.threads.end(Instant::now() + OVERRUN);
        for thread in &ended.left_behind {
            tracing::error!(port = %self.shared.address, thread, "a thread of a port that was handed over has not ended");
        }
    }

    fn stop(&mut self, grace: Duration) -> PortReport {
        // The stack sees the end coming before the interface is gone.
        if let Err(error) = self.shared.interface.set_carrier(false) {
            tracing::debug!(port = %self.shared.address, %error, "the carrier could not be switched off");
        }
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.parking.release(true);
        self.notifies.iter().for_each(|notify| notify.signal());
        let ended = self.threads.end(Instant::now() + grace + OVERRUN);
        for thread in &ended.left_behind {
            tracing::error!(port = %self.shared.address, thread, "a thread of the port is held up in the binding; it is left behind, and the interface with it");
        }
        if ended.panicked > 0 {
            tracing::error!(port = %self.shared.address, threads = ended.panicked, "threads of the port had panicked");
        }
        let counts = self.counts();
        tracing::info!(port = %self.shared.address, ?counts, "interface down");
        PortReport { connections: 1, severed: 0 }
    }
}

impl Port for TapPort {
    fn address(&self) -> String {
        self.shared.address.to_string()
    }

    /// The interface is gone when this returns, unless a thread had to be left behind. Should another thread of this process fork in that moment, it goes when the child calls exec.
    fn shutdown(mut self: Box<Self>, grace: Duration) -> PortReport {
        self.stop(grace)
    }

    fn exportable(&self) -> Result<(), NotExportable> {
        match self.shared.lost.load(Ordering::Relaxed) {
            true => Err(NotExportable::because("its interface was deleted")),
            false => Ok(()),
        }
    }

    fn export(&mut self, until: Instant) -> Result<Exported, NotExportable> {
        let wake = || self.notifies.iter().for_each(|notify| notify.signal());
        let stand = self.shared.parking.gather(self.notifies.len(), until, wake);
        stand.ok_or_else(|| NotExportable::because("packets that it has read are still under way"))?;
        let (queues, carrier) = self.shared.interface.export().map_err(because)?;
        PortState { address: self.address(), carrier }.export(queues)
    }

    fn canceller(&self) -> Option<Box<dyn Fn() + Send>> {
        let shared = Arc::clone(&self.shared);
        Some(Box::new(move || shared.parking.cancel()))
    }

    fn resume(&mut self) {
        self.forgotten = false;
        self.shared.parking.release(true);
    }

    fn forget(mut self: Box<Self>) {
        self.forgotten = true;
    }
}

/// A handle that receives for each lane, and what wakes its worker.
fn open(binding: &Arc<Binding>, address: &TapAddress, lanes: usize) -> Result<Vec<(Handle, Arc<Notify>)>, TapError> {
    let one = |lane| {
        let notify = Notify::new().map_err(|source| TapError::Io { what: "eventfd", source })?;
        let spec = HandleSpec {
            label: address.to_string(),
            peer: format!("queue {lane}"),
            lane,
            receives: true,
            notify: Some(Arc::clone(&notify)),
        };
        Ok((binding.open(spec)?, notify))
    };
    (0..lanes).map(one).collect()
}

impl Drop for TapPort {
    fn drop(&mut self) {
        if self.forgotten {
            self.leave();
        } else if !self.threads.is_empty() {
            self.stop(Duration::ZERO);
        }
    }
}
