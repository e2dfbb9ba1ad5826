//! The port as the manager knows it: started, asked for its address, shut down.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::thread::Builder;
use std::time::{Duration, Instant};

use cofferdam_manager::{Exported, NotExportable};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::address::NbdAddress;
use crate::error::NbdError;
use crate::handover::{self, Order, Received};
use crate::listen::Listener;
use crate::options::NbdOptions;
use crate::service::{Notify, Port, PortReport, PortThreads, Service};
use crate::shared::{Inbox, Shared};
use crate::worker::Worker;

/// How long the acceptor rests when the system has no descriptor left for a client.
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// How much longer than its grace a shutdown may take. A worker that is in a call into a driver comes back inside the
/// call's deadline of 100 ms (DESIGN section 9); one that does not within this is left behind.
const OVERRUN: Duration = Duration::from_millis(400);
/// How often an export looks whether it is called off.
const LOOK: Duration = Duration::from_millis(5);

/// An NBD server in front of one [`Service`]: a thread that accepts, and one worker thread per lane.
///
/// Dropping it without [`Port::shutdown`] shuts it down with no grace.
pub struct NbdPort<S: Service> {
    shared: Arc<Shared<S>>,
    stop: Arc<Notify>,
    threads: PortThreads,
    /// Until it stops: then the accepting thread has the last of it.
    listener: Option<Arc<Listener>>,
    /// Its workers end and leave their clients alone.
    forgotten: bool,
}

impl<S: Service> std::fmt::Debug for NbdPort<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdPort").field("address", &self.shared.address).finish_non_exhaustive()
    }
}

impl<S: Service> NbdPort<S> {
    /// Listens on `address` and serves `service` until [`Port::shutdown`].
    ///
    /// # Errors
    /// [`NbdError`]; nothing is left behind.
    pub fn start(service: S, address: &NbdAddress, options: NbdOptions) -> Result<NbdPort<S>, NbdError> {
        let lanes = service.lanes();
        if lanes == 0 || service.geometry().is_none() {
            return Err(NbdError::NotServing);
        }
        let mut port = NbdPort::new(service, Listener::bind(address)?, options, lanes)?;
        for lane in 0..lanes {
            let worker = Worker::new(Arc::clone(&port.shared), lane)?;
            port.spawn(format!("nbd-lane-{lane}"), move || worker.run())?;
        }
        port.start_accepting()?;
        tracing::info!(port = %port.shared.address, lanes, "listening");
        Ok(port)
    }

    /// The port that another process exported, with its clients. Until [`Port::resume`] they hear nothing of it, and neither do they if it is dropped before that.
    ///
    /// # Errors
    /// [`NbdError`]: the other process can go on.
    pub fn adopt(service: S, exported: Exported, options: NbdOptions) -> Result<NbdPort<S>, NbdError> {
        let lanes = service.lanes();
        if lanes == 0 || service.geometry().is_none() {
            return Err(NbdError::NotServing);
        }
        let Received { listener, connections } = Received::sort(exported)?;
        let mut of_lanes: Vec<Vec<_>> = (0..lanes).map(|_| Vec::new()).collect();
        for connection in connections {
            let lane = of_lanes.get_mut(connection.lane);
            let missing = || NbdError::NotTakenOver(format!("a client of lane {}", connection.lane));
            lane.ok_or_else(missing)?.push(connection);
        }
        let mut port = NbdPort::new(service, listener, options, lanes)?;
        port.forgotten = true;
        port.shared.door.set(true);
        // All of them before the first thread: what fails leaves nothing that would have to be told.
        let workers = of_lanes.into_iter().enumerate();
        let workers = workers.map(|(lane, arrived)| Worker::adopting(Arc::clone(&port.shared), lane, arrived));
        for (lane, worker) in workers.collect::<Result<Vec<_>, _>>()?.into_iter().enumerate() {
            port.spawn(format!("nbd-lane-{lane}"), move || worker.run())?;
        }
        port.start_accepting()?;
        Ok(port)
    }

    fn new(service: S, listener: Listener, options: NbdOptions, lanes: usize) -> Result<NbdPort<S>, NbdError> {
        let eventfd = |source| NbdError::Io { what: "eventfd", source };
        let inboxes = (0..lanes).map(|_| Inbox::new().map(Arc::new)).collect::<Result<Vec<_>, _>>().map_err(eventfd)?;
        let shared = Arc::new(Shared::new(service, options.bounded(), listener.address.clone(), inboxes));
        let stop = Notify::new().map_err(eventfd)?;
        let threads = PortThreads::default();
        Ok(NbdPort { shared, stop, threads, listener: Some(Arc::new(listener)), forgotten: false })
    }

    fn start_accepting(&mut self) -> Result<(), NbdError> {
        let (shared, stop) = (Arc::clone(&self.shared), Arc::clone(&self.stop));
        let Some(listener) = self.listener.clone() else { return Err(NbdError::NotServing) };
        // The thread's part goes when the thread ends.
        self.spawn("nbd-accept".to_owned(), move || {
            accept(&shared, &listener, &stop);
            drop(listener);
        })
    }

    /// Where it listens; with the real port where port 0 was asked for.
    #[must_use]
    pub fn listens_on(&self) -> &NbdAddress {
        &self.shared.address
    }

    /// Connections that are open now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.open.load(Ordering::Relaxed)
    }

    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> Result<(), NbdError> {
        self.threads
            .spawn(Builder::new().name(name), body)
            .map_err(|source| NbdError::Io { what: "starting a thread", source })
    }

    fn set_dormant(&self, dormant: bool) {
        self.listener.iter().for_each(|listener| listener.set_dormant(dormant));
    }

    /// Ends its threads, which are parked, without a word to anybody.
    fn leave(&mut self) {
        self.set_dormant(true);
        self.shared.inboxes.iter().for_each(|inbox| inbox.order(Order::Forget));
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.stop.signal();
        let ended = self.threads.end(Instant::now() + OVERRUN);
        for thread in &ended.left_behind {
            tracing::error!(port = %self.shared.address, thread, "a thread of a port that was handed over has not ended");
        }
    }

    fn stop(&mut self, grace: Duration) -> PortReport {
        let connections = self.shared.open.load(Ordering::Relaxed) as u64;
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.listener = None;
        self.stop.signal();
        let at = Instant::now() + grace;
        for inbox in &self.shared.inboxes {
            inbox.stop(at);
        }
        // Each thread ends by itself: the acceptor never sleeps but on `stop` and the listener, a worker knows when its
        // time is up, and one that is held up learns it when it comes back.
        let ended = self.threads.end(at + OVERRUN);
        for thread in &ended.left_behind {
            tracing::error!(port = %self.shared.address, thread, "a thread of the port is held up in the binding; it is left behind");
        }
        if ended.panicked > 0 {
            tracing::error!(port = %self.shared.address, threads = ended.panicked, "threads of the port had panicked");
        }
        // Clients of a thread that has not ended get nothing more.
        let stuck = if ended.left_behind.is_empty() { 0 } else { self.shared.open.load(Ordering::Relaxed) as u64 };
        PortReport { connections, severed: self.shared.severed.load(Ordering::Relaxed) + stuck }
    }
}

impl<S: Service> Port for NbdPort<S> {
    fn address(&self) -> String {
        self.shared.address.to_string()
    }

    fn shutdown(mut self: Box<Self>, grace: Duration) -> PortReport {
        self.stop(grace)
    }

    fn exportable(&self) -> Result<(), NotExportable> {
        Ok(())
    }

    fn export(&mut self, until: Instant) -> Result<Exported, NotExportable> {
        self.shared.door.set(true);
        self.stop.signal();
        if !self.shared.door.wait(until) {
            return Err(NotExportable::because("its accepting thread is held up"));
        }
        let (tell, told) = sync_channel(self.shared.inboxes.len());
        self.shared.inboxes.iter().for_each(|inbox| inbox.order(Order::Park(tell.clone())));
        let mut parked = Vec::new();
        let mut missing = self.shared.inboxes.len();
        while missing > 0 {
            let left = until.saturating_duration_since(Instant::now());
            match told.recv_timeout(left.min(LOOK)) {
                Ok(one) => {
                    parked.extend(one?);
                    missing -= 1;
                }
                Err(_) if self.shared.called_off.load(Ordering::Relaxed) => {
                    return Err(NotExportable::because("it was called off"));
                }
                Err(_) if left.is_zero() => {
                    return Err(NotExportable::because("requests of its clients are still under way"));
                }
                Err(_) => {}
            }
        }
        let listener = self.listener.as_ref().ok_or_else(|| NotExportable::because("it has been shut down"))?;
        handover::export(listener, parked)
    }

    fn canceller(&self) -> Option<Box<dyn Fn() + Send>> {
        let shared = Arc::clone(&self.shared);
        Some(Box::new(move || shared.called_off.store(true, Ordering::Relaxed)))
    }

    fn resume(&mut self) {
        self.forgotten = false;
        self.shared.called_off.store(false, Ordering::Relaxed);
        self.set_dormant(false);
        self.shared.inboxes.iter().for_each(|inbox| inbox.order(Order::Resume));
        self.shared.door.set(false);
        self.stop.signal();
    }

    fn forget(mut self: Box<Self>) {
        self.forgotten = true;
    }
}

impl<S: Service> Drop for NbdPort<S> {
    fn drop(&mut self) {
        if self.forgotten {
            self.leave();
        } else if !self.threads.is_empty() {
            self.stop(Duration::ZERO);
        }
    }
}

/// The acceptor's thread.
fn accept<S: Service>(shared: &Shared<S>, listener: &Listener, stop: &Notify) {
    let mut rest = None;
    while !shared.stopping.load(Ordering::Relaxed) {
        stop.clear();
        if shared.stopping.load(Ordering::Relaxed) {
            return;
        }
        if shared.door.is_shut() {
            let _ = poll(&mut [PollFd::from_borrowed_fd(stop.fd(), PollFlags::IN)], None);
            continue;
        }
        let timeout = rest.take().and_then(|rest| Timespec::try_from(rest).ok());
        let mut fds = [
            PollFd::from_borrowed_fd(stop.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(listener.fd(), PollFlags::IN),
        ];
        let watched = if timeout.is_some() { &mut fds[..1] } else { &mut fds[..] };
        // EINTR leads to another look.
        let _ = poll(watched, timeout.as_ref());
        match listener.accept() {
            Ok(Some((socket, peer))) => welcome(shared, socket, peer),
            Ok(None) => {}
            Err(error) => {
                if let Some(suppressed) = shared.may_log() {
                    tracing::warn!(port = %shared.address, %error, suppressed, "a client could not be accepted");
                }
                rest = Some(ACCEPT_REST);
            }
        }
    }
}

/// Gives a client to the lane with the fewest, or sends it away at once: better than to leave it waiting in the backlog
/// without a word.
fn welcome<S: Service>(shared: &Shared<S>, socket: OwnedFd, peer: String) {
    if shared.open.load(Ordering::Relaxed) >= shared.options.max_connections {
        if let Some(suppressed) = shared.may_log() {
            tracing::warn!(port = %shared.address, peer, suppressed, limit = shared.options.max_connections, "too many connections; one was turned away");
        }
        return;
    }
    if let Some(inbox) = shared.inboxes.iter().min_by_key(|inbox| inbox.load.load(Ordering::Relaxed)) {
        shared.open.fetch_add(1, Ordering::Relaxed);
        inbox.hand_over(socket, peer);
    }
}
