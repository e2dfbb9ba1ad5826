//! A worker on its way to another process, or from one: see [`crate::handover`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};

use super::Worker;
use crate::connection::Connection;
use crate::error::NbdError;
use crate::handover::{Arrived, Order};
use crate::service::Service;
use crate::shared::Shared;

impl<S: Service> Worker<S> {
    /// A worker that waits for [`Order::Resume`], with clients of another process.
    ///
    /// # Errors
    /// [`NbdError`]; the clients hear nothing of it.
    pub(crate) fn adopting(shared: Arc<Shared<S>>, lane: usize, arrived: Vec<Arrived>) -> Result<Worker<S>, NbdError> {
        let mut worker = Worker::new(shared, lane)?;
        worker.parked = true;
        let now = Instant::now();
        for arrived in arrived {
            let shared = Arc::clone(&worker.shared);
            let connection = arrived.into_connection(&shared.service, &worker.spec, &shared.options, now)?;
            shared.open.fetch_add(1, Ordering::Relaxed);
            worker.inbox.load.fetch_add(1, Ordering::Relaxed);
            worker.enter(connection).map_err(|(_, error)| NbdError::io("epoll_ctl")(error))?;
        }
        worker.watch_device();
        Ok(worker)
    }

    pub(super) fn obey(&mut self, order: Order) {
        match order {
            Order::Park(told) => {
                self.parking = Some(told);
                // Each has a look at itself that takes nothing more in.
                (0..self.connections.len()).for_each(|index| self.enqueue(index));
            }
            Order::Resume => {
                (self.parking, self.parked) = (None, false);
                self.connections.iter_mut().flatten().for_each(|connection| connection.wire.look_again());
                (0..self.connections.len()).for_each(|index| self.enqueue(index));
                // Deadlines may have passed meanwhile.
                self.note(Some(Instant::now()));
            }
            Order::Forget => self.forgotten = true,
        }
    }

    /// Whether nothing of any client is with the device or on its way there.
    pub(super) fn is_still(&self) -> bool {
        self.orphans.is_empty() && self.ready.is_empty() && self.connections.iter().flatten().all(Connection::is_still)
    }

    pub(super) fn park(&mut self) {
        let Some(told) = self.parking.take() else { return };
        let lane = self.spec.lane;
        let parked = self.connections.iter().flatten().map(|connection| connection.export(lane)).collect();
        self.parked = true;
        // Nobody listens any more if it took too long: then the order to go on is on its way.
        let _ = told.send(parked);
    }

    /// Sockets are not looked at: what they announce meanwhile is found with the order to go on.
    pub(super) fn wait_for_orders(&mut self) {
        let mut wake = [PollFd::from_borrowed_fd(self.inbox.wake.fd(), PollFlags::IN)];
        // EINTR and everything else lead to another round.
        let _ = poll(&mut wake, None);
        self.open_inbox();
    }
}
