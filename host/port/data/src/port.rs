//! The port as the manager knows it: started, asked for its address, shut down.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::Builder;
use std::time::{Duration, Instant};

use cofferdam_client::wire::Refusal;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::address::DataAddress;
use crate::error::DataError;
use crate::handover::{PortState, because};
use crate::listen::{Arrival, Listener};
use crate::options::DataOptions;
use crate::peer::Peer;
use crate::service::{Exported, NotExportable, Notify, Parking, Port, PortReport, PortThreads, Service};
use crate::shared::{End, Shared};
use crate::socket::send;
use crate::welcome::refused;

/// How long the acceptor rests when the system has no descriptor left for a client.
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// How much longer than its grace a shutdown may take. A thread that is in a call into a driver comes back inside the call's deadline of
/// 100 ms (DESIGN section 9); one that does not within this is left behind.
const OVERRUN: Duration = Duration::from_millis(400);

/// A thread here needs little: no recursion, no buffers of its own.
const STACK_BYTES: usize = 256 * 1024;

fn thread(name: &str) -> Builder {
    Builder::new().name(name.to_owned()).stack_size(STACK_BYTES)
}

/// The clients' threads, and their notifies to tell them of the shutdown.
#[derive(Default)]
struct Clients {
    threads: PortThreads,
    notifies: Vec<Weak<Notify>>,
}

/// A data socket in front of one [`Service`]: a thread that accepts, and one for each client.
///
/// Dropping it without [`Port::shutdown`] shuts it down with no grace.
pub struct DataPort<S: Service> {
    shared: Arc<Shared<S>>,
    stop: Arc<Notify>,
    acceptor: PortThreads,
    clients: Arc<Mutex<Clients>>,
    /// Until the shutdown, here and with the acceptor.
    listener: Option<Arc<Listener>>,
    /// Where the acceptor stands while another process is to take over.
    parking: Arc<Parking<()>>,
    over: bool,
    /// Another process has the socket.
    forgotten: bool,
}

impl<S: Service> std::fmt::Debug for DataPort<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataPort").field("address", &self.shared.address).finish_non_exhaustive()
    }
}

impl<S: Service> DataPort<S> {
    /// Listens on `address` and serves `service` until [`Port::shutdown`].
    ///
    /// # Errors
    /// [`DataError`]; nothing is left behind.
    pub fn start(service: S, address: &DataAddress, options: DataOptions) -> Result<DataPort<S>, DataError> {
        if service.lanes() == 0 {
            return Err(DataError::NotServing);
        }
        let listener = Listener::bind(address)?;
        let port = DataPort::serve(service, address, options, listener, false)?;
        tracing::info!(port = %port.shared.address, binding = port.shared.service.name(), "listening");
        Ok(port)
    }

    /// The port that another process exported, which has no clients. Until [`Port::resume`] nobody is let in.
    ///
    /// # Errors
    /// [`DataError`]: the other process can go on.
    pub fn adopt(service: S, exported: Exported, options: DataOptions) -> Result<DataPort<S>, DataError> {
        if service.lanes() == 0 {
            return Err(DataError::NotServing);
        }
        let (state, socket) = PortState::sort(exported)?;
        let address: DataAddress = state.address.parse()?;
        let listener = Listener::adopt(socket, &address, state.file)?;
        DataPort::serve(service, &address, options, listener, true)
    }

    fn serve(
        service: S,
        address: &DataAddress,
        options: DataOptions,
        listener: Listener,
        adopted: bool,
    ) -> Result<DataPort<S>, DataError> {
        let shared = Arc::new(Shared::new(service, options.bounded(), address.clone()));
        let stop = Notify::new().map_err(|source| DataError::Io { what: "eventfd", source })?;
        let clients = Arc::new(Mutex::new(Clients::default()));
        let (listener, parking) = (Arc::new(listener), Arc::new(Parking::new(adopted)));
        let mut port = DataPort {
            shared: Arc::clone(&shared),
            stop: Arc::clone(&stop),
            acceptor: PortThreads::default(),
            clients: Arc::clone(&clients),
            listener: Some(Arc::clone(&listener)),
            parking: Arc::clone(&parking),
            over: false,
            forgotten: adopted,
        };
        port.acceptor
            .spawn(thread("data-accept"), move || {
                accept(&shared, &listener, &stop, &parking, &clients);
                drop(listener);
            })
            .map_err(|source| DataError::Io { what: "starting a thread", source })?;
        Ok(port)
    }

    /// Where it listens.
    #[must_use]
    pub fn listens_on(&self) -> &DataAddress {
        &self.shared.address
    }

    /// Clients that are connected now.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.shared.open.load(Ordering::Acquire)
    }

    fn stop(&mut self, grace: Duration) -> PortReport {
        self.over = true;
        self.listener = None;
        self.parking.release(true);
        let connections = self.clients() as u64;
        let at = Instant::now() + grace;
        let _ = self.shared.stop_at.set(at);
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.stop.signal();
        // Nobody is added behind the acceptor's end. It never waits for a client, so it ends at once.
        let mut ended = self.acceptor.end(at + OVERRUN);
        let mut clients = std::mem::take(&mut *self.clients.lock().unwrap_or_else(PoisonError::into_inner));
        clients.notifies.iter().filter_map(Weak::upgrade).for_each(|notify| notify.signal());
        let of_clients = clients.threads.end(at + OVERRUN);
        ended.left_behind.extend(of_clients.left_behind);
        ended.panicked += of_clients.panicked;
        if !ended.left_behind.is_empty() {
            tracing::error!(port = %self.shared.address, threads = ended.left_behind.len(), "threads of the port are held up; they are left behind");
        }
        if ended.panicked > 0 {
            tracing::error!(port = %self.shared.address, threads = ended.panicked, "threads of the port had panicked");
        }
        let severed = self.shared.severed.load(Ordering::Relaxed) + ended.left_behind.len() as u64;
        PortReport { connections, severed }
    }
}

impl<S: Service> Port for DataPort<S> {
    fn address(&self) -> String {
        self.shared.address.to_string()
    }

    fn shutdown(mut self: Box<Self>, grace: Duration) -> PortReport {
        self.stop(grace)
    }

    fn exportable(&self) -> Result<(), NotExportable> {
        match self.clients() {
            0 => Ok(()),
            count => Err(NotExportable::because(format!("its clients ({count}) share memory with the device"))),
        }
    }

    fn export(&mut self, until: Instant) -> Result<Exported, NotExportable> {
        let stands = self.parking.gather(1, until, || self.stop.signal());
        stands.ok_or_else(|| NotExportable::because("its accepting thread is held up"))?;
        // Who came before it stood.
        self.exportable()?;
        let listener = self.listener.as_ref().ok_or_else(|| NotExportable::because("it has been shut down"))?;
        let (socket, file) = listener.export().map_err(because)?;
        PortState { address: self.address(), file }.export(socket)
    }

    fn canceller(&self) -> Option<Box<dyn Fn() + Send>> {
        let parking = Arc::clone(&self.parking);
        Some(Box::new(move || parking.cancel()))
    }

    fn resume(&mut self) {
        self.set_forgotten(false);
        self.parking.release(true);
    }

    fn forget(mut self: Box<Self>) {
        self.set_forgotten(true);
    }
}

impl<S: Service> DataPort<S> {
    fn set_forgotten(&mut self, forgotten: bool) {
        self.forgotten = forgotten;
        self.listener.iter().for_each(|listener| listener.set_dormant(forgotten));
    }

    /// Ends its accepting thread, which stands, without a word to anybody.
    fn leave(&mut self) {
        self.set_forgotten(true);
        self.parking.release(false);
        self.stop.signal();
        if !self.acceptor.end(Instant::now() + OVERRUN).left_behind.is_empty() {
            tracing::error!(port = %self.shared.address, "the thread of a port that was handed over has not ended");
        }
    }
}

impl<S: Service> Drop for DataPort<S> {
    fn drop(&mut self) {
        if self.forgotten {
            self.leave();
        } else if !self.over {
            self.stop(Duration::ZERO);
        }
    }
}

/// The acceptor's thread. Its part of the listener goes when it ends, and with it the socket file.
fn accept<S: Service>(
    shared: &Arc<Shared<S>>,
    listener: &Listener,
    stop: &Notify,
    parking: &Parking<()>,
    clients: &Mutex<Clients>,
) {
    let mut rest = None;
    loop {
        stop.clear();
        if shared.stopping.load(Ordering::Acquire) {
            return;
        }
        if parking.is_wanted() {
            // Who comes meanwhile waits in the socket.
            if !parking.stand(()) {
                return;
            }
            continue;
        }
        let timeout = rest.take().and_then(|rest: Duration| Timespec::try_from(rest).ok());
        let mut fds = [
            PollFd::from_borrowed_fd(stop.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(listener.fd(), PollFlags::IN),
        ];
        let watched = if timeout.is_some() { &mut fds[..1] } else { &mut fds[..] };
        // EINTR leads to another look.
        let _ = poll(watched, timeout.as_ref());
        match listener.accept() {
            Ok(Some(arrival)) => admit(shared, arrival, &mut clients.lock().unwrap_or_else(PoisonError::into_inner)),
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

/// One place among the clients, given back when its thread has ended, however.
struct Place<S>(Arc<Shared<S>>);

impl<S> Drop for Place<S> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Gives a client its thread, or sends it away with the reason at once.
fn admit<S: Service>(shared: &Arc<Shared<S>>, arrival: Arrival, clients: &mut Clients) {
    let Arrival { socket, peer, may_speak } = arrival;
    use std::os::fd::AsFd;
    let away = |reason, text: String| {
        if let Some(suppressed) = shared.may_log() {
            tracing::warn!(port = %shared.address, peer, suppressed, text, "a client was turned away");
        }
        send(socket.as_fd(), &refused(reason, text).encode());
    };
    if !may_speak {
        return away(Refusal::NotAllowed, "the socket serves the daemon's own user and root".to_owned());
    }
    let limit = shared.options.max_clients;
    if shared.open.load(Ordering::Acquire) >= limit {
        return away(Refusal::Busy, format!("the port has its limit of {limit} clients"));
    }
    let notify = match Notify::new() {
        Ok(notify) => notify,
        Err(error) => return away(Refusal::Host, error.to_string()),
    };
    clients.notifies.retain(|notify| notify.strong_count() > 0);
    clients.notifies.push(Arc::downgrade(&notify));
    shared.open.fetch_add(1, Ordering::AcqRel);
    let place = Place(Arc::clone(shared));
    let peer = Peer { shared: Arc::clone(shared), socket, peer, notify };
    let started = clients.threads.spawn(thread("data-client"), move || {
        // After the handle and the region are gone, so that who sees a free place finds one.
        let _place = place;
        peer.run();
    });
    // Without a thread the client is hung up on.
    if let Err(error) = started {
        shared.closed("unknown", End::Done("no thread"), false);
        tracing::warn!(port = %shared.address, %error, "a client's thread could not be started");
    }
}
