//! One client's thread: hello, serve, end.
//!
//! ```text
//! hello   poll(2) on socket and notify, until a hello, a hang-up or the time limit
//! serve   turns while there is traffic -> spin a little -> arm, one more turn -> poll(2) on socket, notify and device
//! end     answers are out -> REVOKED -> the client takes them or 100 ms pass -> rings' pages gone, handle closed, socket closed
//!         The 100 ms begin when nothing of the client is in flight, and nothing that it does makes them longer.
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cofferdam_client::wire::{Hello, PACKET_MAX_BYTES, Refusal, TAG_REVOKED, TAG_VIOLATION, TAG_WAKE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::options::{LINGER, RETRY};
use crate::service::{Disk, Notify, Patience, Service};
use crate::session::{Session, Violation};
use crate::shared::{End, Shared};
use crate::socket::{Received, receive, send};
use crate::welcome::{Admitted, refused, welcome};

/// Packets read at once: more wait in the socket.
const PACKETS: u32 = 16;
/// Turns with traffic between two looks at the socket, so that a client which hung up is noticed though its rings go on.
const TURNS_PER_LOOK: u32 = 1024;

/// See the module.
pub(crate) struct Peer<S: Service> {
    pub(crate) shared: Arc<Shared<S>>,
    pub(crate) socket: OwnedFd,
    pub(crate) peer: String,
    /// Signalled by the manager (revocation, end of a hold, answers that others reaped) and by the port's shutdown.
    pub(crate) notify: Arc<Notify>,
}

/// The time of a client that was revoked and of which nothing is in flight.
#[derive(Default)]
struct Over {
    /// Since when that is so.
    since: Option<Instant>,
}

impl Over {
    /// Whether it is enough: its rings are at rest, or it keeps them moving, which is answered but gains it no more than [`LINGER`].
    fn may_end(&mut self, moved: bool, now: Instant) -> bool {
        !moved || now.duration_since(*self.since.get_or_insert(now)) >= LINGER
    }
}

impl<S: Service> Peer<S> {
    /// The thread's body.
    pub(crate) fn run(self) {
        let (end, unfinished) = match self.hello() {
            Ok(hello) => match welcome(&self.shared, self.socket.as_fd(), &self.peer, &self.notify, hello) {
                Ok(Admitted { mut session, rings }) => {
                    let mut over = Over::default();
                    let end = match self.serve(&mut session, &mut over) {
                        Ok(end) => self.farewell(&mut session, &over).unwrap_or(end),
                        Err(Violation(why)) => {
                            session.refuse();
                            send(self.socket.as_fd(), &[TAG_VIOLATION]);
                            End::Garbage(why)
                        }
                    };
                    // The handle first: its memory goes as soon as nothing of it is in flight.
                    let unfinished = !session.is_quiet() || session.is_refused() && !session.is_drained();
                    drop(session);
                    drop(rings);
                    (end, unfinished)
                }
                Err(refusal) => {
                    send(self.socket.as_fd(), &refusal.encode());
                    (End::Done("refused"), false)
                }
            },
            Err(end) => {
                if end != End::Done("hung up") {
                    send(self.socket.as_fd(), &refused(Refusal::Malformed, "no hello").encode());
                }
                (end, false)
            }
        };
        self.shared.closed(&self.peer, end, unfinished);
    }

    /// Waits for the hello. It may come a moment after the connection, not much later.
    fn hello(&self) -> Result<Hello, End> {
        let deadline = Instant::now() + self.shared.options.hello_timeout;
        loop {
            let mut packet = [0; PACKET_MAX_BYTES];
            match receive(self.socket.as_fd(), &mut packet) {
                Received::Packet(packet) => return Hello::decode(packet).ok_or(End::Garbage("no hello")),
                Received::TooLong => return Err(End::Garbage("a packet that is too long")),
                Received::Gone => return Err(End::Done("hung up")),
                Received::Nothing => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(End::Garbage("it said nothing"));
            }
            if self.shared.stopping.load(Ordering::Acquire) {
                return Err(End::Done("the port is shut down"));
            }
            self.sleep(None, Some(left));
        }
    }

    /// Until it is over: revoked and quiet, hung up, or cut off by the shutdown.
    fn serve(&self, session: &mut Session<S::Disk>, over: &mut Over) -> Result<End, Violation> {
        let patience = Patience::new(self.shared.options.spin);
        let mut turns: u32 = 0;
        loop {
            if self.shared.stopping.load(Ordering::Acquire) {
                session.refuse();
                if self.past_grace() {
                    return Ok(End::Done("the port is shut down"));
                }
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(TURNS_PER_LOOK)
                && let Some(end) = self.read_packets()?
            {
                return Ok(end);
            }
            let moved = self.turn(session, false)?;
            if session.is_refused() && session.is_quiet() && over.may_end(moved, Instant::now()) {
                return Ok(End::Done("revoked"));
            }
            if moved {
                continue;
            }
            if self.spin(session, &patience)? {
                continue;
            }
            // Partner: the client stores its tail or head, then looks for what this side sleeps. The manager and the device have `arm` and the notify.
            self.notify.clear();
            let what = session.sleeps_for();
            session.restate();
            session.arm(what);
            let busy = self.turn(session, true)? || session.sleeps_for() != what;
            let stopping = self.shared.stopping.load(Ordering::Acquire);
            let quiet = session.is_refused() && session.is_quiet();
            if !(busy || quiet || stopping && !session.is_refused()) {
                let retry = session.full.then_some(RETRY);
                let grace = self.shared.stop_at.get().map(|at| at.saturating_duration_since(Instant::now()));
                let device = session.waits_for_device().then(|| session.disk.device_fd());
                self.sleep(device, retry.into_iter().chain(grace).min());
            }
            session.disarm();
            if let Some(end) = self.read_packets()? {
                return Ok(end);
            }
        }
    }

    /// One turn, and the wake that it asks for. Whether something moved.
    fn turn(&self, session: &mut Session<S::Disk>, arm: bool) -> Result<bool, Violation> {
        let turn = session.turn(arm)?;
        if turn.wake {
            // A full socket has wakes in it that the client has not read.
            send(self.socket.as_fd(), &[TAG_WAKE]);
        }
        Ok(turn.moved)
    }

    /// Turns for as long as that pays ([`Patience`]); whether one moved something. The clock of that is the client's as well as the device's: a client that
    /// submits nothing for long is slept for, and then neither costs anything.
    fn spin(&self, session: &mut Session<S::Disk>, patience: &Patience) -> Result<bool, Violation> {
        let mut last = Ok(false);
        let moved = patience.spin(Duration::MAX, || {
            last = self.turn(session, false);
            !matches!(last, Ok(false))
        });
        last.map(|_| moved)
    }

    /// Says that it is over, and lets the client take its answers. Nothing of it is in flight, unless the grace is over.
    fn farewell(&self, session: &mut Session<S::Disk>, over: &Over) -> Option<End> {
        if !session.is_refused() {
            return None;
        }
        let deadline = over.since.unwrap_or_else(Instant::now) + LINGER;
        let deadline = self.shared.stop_at.get().map_or(deadline, |&at| at.min(deadline));
        // What was submitted just before the client could know.
        let last = self.turn(session, false);
        send(self.socket.as_fd(), &[TAG_REVOKED]);
        while last.is_ok() && !session.is_drained() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            match self.read_packets() {
                Ok(None) => {}
                Ok(Some(_)) => break,
                Err(Violation(why)) => return Some(End::Garbage(why)),
            }
            // A client that takes its answers hangs up then; one that does not is looked at again soon enough.
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
            let _ = poll(&mut fds, timespec(Some(left.min(RETRY))).as_ref());
        }
        None
    }

    /// Reads some packets. `Some` when the client has hung up.
    fn read_packets(&self) -> Result<Option<End>, Violation> {
        let mut packet = [0; PACKET_MAX_BYTES];
        for _ in 0..PACKETS {
            match receive(self.socket.as_fd(), &mut packet) {
                Received::Nothing => break,
                Received::Packet([TAG_WAKE]) => {}
                Received::Packet(_) => return Err(Violation("an unknown packet")),
                Received::TooLong => return Err(Violation("a packet that is too long")),
                Received::Gone => return Ok(Some(End::Done("hung up"))),
            }
        }
        Ok(None)
    }

    fn past_grace(&self) -> bool {
        self.shared.stop_at.get().is_some_and(|&at| at <= Instant::now())
    }

    /// Sleeps until somebody has something to say. EINTR and spurious returns lead to another look.
    fn sleep(&self, device: Option<BorrowedFd<'_>>, timeout: Option<Duration>) {
        let (socket, notify) = (self.socket.as_fd(), self.notify.fd());
        let third = device.unwrap_or(notify);
        let mut fds = [socket, notify, third].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let watched = if device.is_some() { &mut fds[..] } else { &mut fds[..2] };
        let _ = poll(watched, timespec(timeout).as_ref());
    }
}

fn timespec(timeout: Option<Duration>) -> Option<Timespec> {
    timeout.and_then(|timeout| Timespec::try_from(timeout).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_that_keep_moving_are_served_for_the_linger_and_no_longer() {
        let begin = Instant::now();
        let at = |millis| begin + Duration::from_millis(millis);
        let mut over = Over::default();
        assert!((0..100).all(|millis| !over.may_end(true, at(millis))));
        assert!(over.may_end(true, at(100)));
        assert_eq!(over.since, Some(begin), "what is left to say is not given another linger");
    }

    #[test]
    fn rings_at_rest_are_not_waited_for() {
        assert!(Over::default().may_end(false, Instant::now()));
    }
}
