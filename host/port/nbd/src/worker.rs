//! One lane's thread: an epoll loop over its connections, its notify and the lane's device descriptor.
//!
//! ```text
//! events -> step each ready connection (read, submit, send) -> poll the device -> step those that got answers -> ...
//!        -> nothing left: spin for the device a little -> poll with `arm` -> sleep
//! ```
//! Sockets are edge-triggered and carry their readiness themselves, so no interest is ever changed. Nothing here blocks
//! but the sleep, which has a time-out whenever something is due. A worker with nothing to do sleeps without one.

mod parking;

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use cofferdam_manager::NotExportable;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use crate::connection::{Connection, End, Next, Turn};
use crate::error::NbdError;
use crate::handover::Parked;
use crate::options::RETRY;
use crate::service::{Completion, Disk, HandleSpec, Notify, Patience, Service};
use crate::session::Stuck;
use crate::shared::{Inbox, Shared};

/// Events taken at once.
const EVENTS: usize = 256;
/// Where discarded payload goes.
const SCRATCH_BYTES: usize = 64 * 1024;
/// Rounds of polling between two looks at the sockets while spinning.
const SPIN_ROUNDS: u32 = 32;
/// How often a starving worker wakes the others to look for stalled clients.
const RALLY: Duration = Duration::from_millis(250);

/// Keys of the descriptors that are not connections.
const KEY_INBOX: u64 = u64::MAX;
const KEY_NOTIFY: u64 = u64::MAX - 1;
const KEY_DEVICE: u64 = u64::MAX - 2;

/// See the module.
pub(crate) struct Worker<S: Service> {
    shared: Arc<Shared<S>>,
    inbox: Arc<Inbox>,
    epoll: OwnedFd,
    spec: HandleSpec,
    notify: Arc<Notify>,
    connections: Vec<Option<Connection<S>>>,
    free: Vec<usize>,
    /// Those to step, each once.
    ready: VecDeque<usize>,
    /// Those that may have something in flight.
    active: Vec<usize>,
    /// What closed connections left with the device, and how many answers each waits for. They are polled like the others:
    /// with no client left nobody else would do it, and what a dead client wrote stayed parked and its leases lent.
    orphans: Vec<(S::Disk, usize)>,
    /// Those that wait for leases, in order.
    starved: VecDeque<usize>,
    /// A lease ended, so the first of them may try.
    released: bool,
    /// This worker is counted in [`Shared::starving`].
    counted: bool,
    rallied: Instant,
    device: Option<RawFd>,
    /// When to look at deadlines next.
    due: Option<Instant>,
    stop_at: Option<Instant>,
    /// Told when everything has come to its end.
    parking: Option<SyncSender<Result<Vec<Parked>, NotExportable>>>,
    /// It has: only orders are waited for.
    parked: bool,
    /// Another process has the clients.
    forgotten: bool,
    patience: Arc<Patience>,
    completions: Vec<Completion>,
    scratch: Box<[u8]>,
}

impl<S: Service> Worker<S> {
    pub(crate) fn new(shared: Arc<Shared<S>>, lane: usize) -> Result<Worker<S>, NbdError> {
        let inbox = Arc::clone(&shared.inboxes[lane]);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(NbdError::io("epoll_create1"))?;
        let notify = Notify::new().map_err(|source| NbdError::Io { what: "eventfd", source })?;
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        for (key, notify) in [(KEY_INBOX, &inbox.wake), (KEY_NOTIFY, &notify)] {
            epoll::add(&epoll, notify.fd(), epoll::EventData::new_u64(key), edge).map_err(NbdError::io("epoll_ctl"))?;
        }
        let spec = HandleSpec {
            label: shared.address.to_string(),
            peer: String::new(),
            lane,
            notify: Some(Arc::clone(&notify)),
            ..HandleSpec::default()
        };
        let patience = Arc::new(Patience::new(shared.options.spin));
        Ok(Worker {
            shared,
            inbox,
            epoll,
            spec,
            notify,
            connections: Vec::new(),
            free: Vec::new(),
            ready: VecDeque::new(),
            active: Vec::new(),
            orphans: Vec::new(),
            starved: VecDeque::new(),
            released: false,
            counted: false,
            rallied: Instant::now(),
            device: None,
            due: None,
            stop_at: None,
            parking: None,
            parked: false,
            forgotten: false,
            patience,
            completions: Vec::with_capacity(EVENTS),
            scratch: vec![0; SCRATCH_BYTES].into_boxed_slice(),
        })
    }

    /// Runs until told to stop, then until the connections are quiet or the grace is over.
    pub(crate) fn run(mut self) {
        loop {
            if self.parked {
                self.wait_for_orders();
                if self.forgotten {
                    return;
                }
                continue;
            }
            let now = Instant::now();
            self.step_ready(now);
            let mut busy = self.reap(now, false) > 0;
            if self.due.is_some_and(|due| due <= now) {
                self.look_at_deadlines(now);
            }
            self.feed_starved(now);
            if self.stop_at.is_some() && self.may_stop(now) {
                break;
            }
            if self.parking.is_some() && self.is_still() {
                self.park();
                continue;
            }
            busy |= !self.ready.is_empty();
            busy = busy || self.spin() || self.reap(Instant::now(), true) > 0 || !self.ready.is_empty();
            if busy {
                self.wait(Some(Duration::ZERO));
                continue;
            }
            self.wait(self.due.map(|due| due.saturating_duration_since(Instant::now())));
        }
        let left: Vec<usize> = (0..self.connections.len()).filter(|&index| self.connections[index].is_some()).collect();
        for index in left {
            self.close(index, &End::Done("the port is shut down"));
        }
        self.count_starving(false);
    }

    /// Runs every connection that is ready, once.
    fn step_ready(&mut self, now: Instant) {
        for _ in 0..self.ready.len() {
            let Some(index) = self.ready.pop_front() else { return };
            if let Some(Some(connection)) = self.connections.get_mut(index) {
                connection.queued = false;
                // Who waits for leases waits for its turn there, or it would pass those before it; its answers go out
                // all the same.
                let may_lease = self.starved.is_empty();
                self.step(index, now, may_lease);
            }
        }
    }

    /// Whether the connection lives and does not starve.
    fn step(&mut self, index: usize, now: Instant, may_lease: bool) -> bool {
        let Some(Some(connection)) = self.connections.get_mut(index) else { return true };
        let mut turn = Turn {
            now,
            service: &self.shared.service,
            spec: &self.spec,
            limits: self.shared.options.limits(),
            may_lease,
            parking: self.parking.is_some(),
            scratch: &mut self.scratch,
        };
        let had_disk = connection.disk().is_some();
        let next = match connection.step(&mut turn) {
            Ok(next) => next,
            Err(end) => {
                self.close(index, &end);
                return true;
            }
        };
        let mut retry = next == Next::Starved;
        if let Some(session) = connection.session() {
            self.released |= std::mem::take(&mut session.released);
            retry |= session.stuck == Stuck::Full;
            if session.in_flight > 0 && !connection.active {
                connection.active = true;
                self.active.push(index);
            }
        }
        let due = connection.deadline().map(|(due, _)| due).into_iter().chain(retry.then(|| now + RETRY)).min();
        let entered = !had_disk && connection.disk().is_some();
        if next == Next::Again {
            self.enqueue(index);
        }
        if next == Next::Starved
            && let Some(Some(connection)) = self.connections.get_mut(index)
            && !connection.starving
        {
            connection.starving = true;
            self.starved.push_back(index);
            self.count_starving(true);
        }
        self.note(due);
        if entered {
            if self.stop_at.is_some() {
                self.refuse(index, now);
            }
            self.watch_device();
        }
        next != Next::Starved
    }

    fn enqueue(&mut self, index: usize) {
        if let Some(Some(connection)) = self.connections.get_mut(index)
            && !std::mem::replace(&mut connection.queued, true)
        {
            self.ready.push_back(index);
        }
    }

    fn note(&mut self, due: Option<Instant>) {
        self.due = self.due.into_iter().chain(due).min();
    }

    /// Polls the device for every connection with something in flight. Returns how much was found.
    fn reap(&mut self, now: Instant, arm: bool) -> usize {
        let (mut found, mut at) = (0, 0);
        while let Some(&index) = self.active.get(at) {
            let Some(connection) = self.connections.get_mut(index).and_then(Option::as_mut) else {
                self.active.swap_remove(at);
                continue;
            };
            let Some(session) = connection.session() else {
                self.active.swap_remove(at);
                continue;
            };
            found += session.disk.poll(arm, &mut self.completions);
            let answered = !self.completions.is_empty();
            for completion in self.completions.drain(..) {
                session.complete(now, completion);
            }
            self.released |= std::mem::take(&mut session.released);
            if session.in_flight == 0 {
                connection.active = false;
                self.active.swap_remove(at);
            } else {
                at += 1;
            }
            if answered {
                found = found.max(1);
                self.enqueue(index);
            }
        }
        let completions = &mut self.completions;
        self.orphans.retain_mut(|(disk, in_flight)| {
            found += disk.poll(arm, completions);
            // Their leases end here.
            let answered = completions.drain(..).count();
            self.released |= answered > 0;
            *in_flight = in_flight.saturating_sub(answered);
            *in_flight > 0
        });
        found
    }

    /// Lets those that wait for leases try, first come first served, while it works.
    fn feed_starved(&mut self, now: Instant) {
        if !std::mem::take(&mut self.released) {
            return;
        }
        while let Some(&index) = self.starved.front() {
            if !self.step(index, now, true) {
                return;
            }
            if self.starved.front() == Some(&index) {
                self.starved.pop_front();
            }
            if let Some(Some(connection)) = self.connections.get_mut(index) {
                connection.starving = false;
            }
        }
        self.count_starving(false);
    }

    fn count_starving(&mut self, starving: bool) {
        if self.counted != starving {
            self.counted = starving;
            if starving {
                self.shared.starving.fetch_add(1, Ordering::Relaxed);
                self.rallied = Instant::now();
            } else {
                self.shared.starving.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// Deadlines, stalled clients, and those that have to try again. Looks at every connection, so it runs only when
    /// something is due.
    fn look_at_deadlines(&mut self, now: Instant) {
        self.due = self.stop_at;
        self.released |= !self.starved.is_empty();
        let starving = self.shared.starving.load(Ordering::Relaxed) > 0;
        if self.counted && now.duration_since(self.rallied) >= RALLY {
            self.rallied = now;
            self.shared.wake_all();
        }
        for index in 0..self.connections.len() {
            let Some(Some(connection)) = self.connections.get_mut(index) else { continue };
            if let Some((due, end)) = connection.deadline() {
                if due <= now {
                    self.close(index, &end);
                    continue;
                }
                self.note(Some(due));
            }
            let Some(Some(connection)) = self.connections.get_mut(index) else { continue };
            let Some(session) = connection.session() else { continue };
            let retry = session.stuck == Stuck::Full;
            if starving
                && session.stalled_since().is_some_and(|since| now.duration_since(since) >= self.shared.options.stall)
            {
                self.close(index, &End::Done("stalled, while others waited for the buffers it held"));
                continue;
            }
            if retry {
                self.enqueue(index);
            }
        }
        if !self.starved.is_empty() {
            self.note(Some(now + RETRY));
        }
    }

    /// Looks for answers and at the sockets while something is in flight, for as long as that pays ([`Patience`]); true when there is something to do.
    fn spin(&mut self) -> bool {
        if self.active.is_empty() {
            return false;
        }
        let patience = Arc::clone(&self.patience);
        let start = Instant::now();
        let mut rounds = 0;
        patience.spin(Duration::MAX, || {
            rounds += 1;
            if rounds % SPIN_ROUNDS == 0 {
                self.wait(Some(Duration::ZERO));
            }
            self.reap(start, false) > 0 || !self.ready.is_empty()
        })
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut events = [const { MaybeUninit::uninit() }; EVENTS];
        // EINTR and everything else lead to another round.
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut events, timeout.as_ref()) else { return };
        let mut inbox = false;
        for event in events {
            let (key, flags) = (event.data.u64(), event.flags);
            match key {
                KEY_INBOX => inbox = true,
                KEY_NOTIFY => self.notified(),
                // The loop polls anyway.
                KEY_DEVICE => {}
                index => self.socket_event(index as usize, flags),
            }
        }
        // Last, because a new connection may take the place of one that an event of this very batch closed.
        if inbox {
            self.open_inbox();
        }
    }

    fn socket_event(&mut self, index: usize, flags: epoll::EventFlags) {
        let Some(Some(connection)) = self.connections.get_mut(index) else { return };
        // A Unix peer that closed shows as HUP at once, also while its last requests are unread: they are read first.
        let gone = flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP);
        let wire = &mut connection.wire;
        wire.gone |= gone;
        wire.hung_up |= gone || flags.contains(epoll::EventFlags::RDHUP);
        wire.readable |= wire.hung_up || flags.contains(epoll::EventFlags::IN);
        wire.writable |= flags.contains(epoll::EventFlags::OUT);
        self.enqueue(index);
    }

    /// The manager has something to say: a revocation, the end of a hold, or answers that somebody else reaped.
    fn notified(&mut self) {
        self.notify.clear();
        let now = Instant::now();
        for index in 0..self.connections.len() {
            let Some(Some(connection)) = self.connections.get_mut(index) else { continue };
            let Some(session) = connection.session() else { continue };
            let (stuck, refused) = (session.stuck != Stuck::No, session.refused_at.is_some());
            session.notice_revocation(now);
            if stuck || session.refused_at.is_some() != refused {
                self.enqueue(index);
            }
        }
        self.watch_device();
    }

    /// New connections, and the order to stop.
    fn open_inbox(&mut self) {
        self.inbox.wake.clear();
        let (arrived, stop_at, orders) = self.inbox.take();
        let now = Instant::now();
        for (socket, peer) in arrived {
            self.adopt(socket, peer, now);
        }
        for order in orders {
            self.obey(order);
        }
        if stop_at.is_some() && self.stop_at.is_none() {
            self.stop_at = stop_at;
            (self.parked, self.parking) = (false, None);
            self.note(stop_at);
            for index in 0..self.connections.len() {
                self.refuse(index, now);
            }
        }
        // A starving worker elsewhere may be asking for a look at stalled clients.
        if self.shared.starving.load(Ordering::Relaxed) > 0 {
            self.note(Some(now));
        }
    }

    fn adopt(&mut self, socket: OwnedFd, peer: String, now: Instant) {
        if let Err((index, error)) =
            self.enter(Connection::new(socket, peer, now + self.shared.options.handshake_timeout))
        {
            self.close(index, &End::Socket(error.into()));
        }
    }

    /// Takes a connection in; its place, in any case, and what was wrong with its socket.
    fn enter(&mut self, connection: Connection<S>) -> Result<(), (usize, Errno)> {
        let due = connection.deadline().map(|(due, _)| due);
        let index = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        let added = epoll::add(&self.epoll, connection.wire.socket(), epoll::EventData::new_u64(index as u64), flags);
        self.connections[index] = Some(connection);
        added.map_err(|error| (index, error))?;
        self.note(due);
        self.enqueue(index);
        Ok(())
    }

    /// Begins to turn a connection's new requests away.
    fn refuse(&mut self, index: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(index) else { return };
        let due = match connection.session() {
            Some(session) => {
                session.refuse(now);
                connection.deadline().map(|(due, _)| due)
            }
            None => Some(now),
        };
        self.note(due);
        self.enqueue(index);
    }

    fn may_stop(&mut self, now: Instant) -> bool {
        // Requests that came before the end are answered, if only with a refusal.
        self.stop_at.is_some_and(|at| at <= now)
            || self.ready.is_empty() && self.connections.iter().flatten().all(Connection::is_quiet)
    }

    /// Puts the lane's device descriptor in the epoll set. It is the lane's, so any handle's will do, and it stays when
    /// they close: edges that nobody waits for wake this thread once each, and a closed descriptor leaves the set by
    /// itself.
    fn watch_device(&mut self) {
        let Some(disk) = self.connections.iter().flatten().find_map(Connection::disk) else { return };
        let fd = disk.device_fd();
        if self.device == Some(fd.as_raw_fd()) {
            return;
        }
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        match epoll::add(&self.epoll, fd, epoll::EventData::new_u64(KEY_DEVICE), edge) {
            Ok(()) | Err(Errno::EXIST) => self.device = Some(fd.as_raw_fd()),
            Err(error) => tracing::error!(%error, "the device's descriptor cannot be watched"),
        }
    }

    /// Closes a connection: its socket, then its handle; what it has in flight is answered to nobody. Every lease it
    /// holds ends here, but for those that the device may still use: they and the handle end with the answers.
    fn close(&mut self, index: usize, end: &End) {
        let Some(connection) = self.connections.get_mut(index).and_then(Option::take) else { return };
        self.shared.closed(self.spec.lane, &connection.peer, end, !connection.is_quiet());
        if connection.starving {
            self.starved.retain(|&other| other != index);
            if self.starved.is_empty() {
                self.count_starving(false);
            }
        }
        self.ready.retain(|&other| other != index);
        self.active.retain(|&other| other != index);
        connection.wire.say_goodbye(&mut self.scratch);
        self.orphans.extend(connection.into_orphan());
        self.released = true;
        self.free.push(index);
    }
}
