//! The daemon that gives away: a thread that listens for a new one.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_manager::{HandOver, Manager};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;

use super::turns::Giving;
use super::wire::{Broken, Wire};
use super::{Answer, Ask, PREPARE, PROMPT, Parcel, Turns, VERSION, monotonic_now};
use crate::control::LONGEST_TAKEOVER;
use crate::log;

/// How often the thread looks whether the daemon stops.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// Before somebody is let in again, when that failed.
const REST: Duration = Duration::from_millis(100);
/// Longest message of a new daemon, in bytes: it may say at length why it cannot.
const SHORT_BYTES: usize = 64 << 10;
/// How long the one message may take: less than clients stay held beyond their deadline.
const COMMIT: Duration = Duration::from_secs(1);
/// How long the log may take to be written, before anybody is held and as the last thing of all; and so what is known of drivers that broke down.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What the daemon itself has, beside its bindings: each a duplicate.
pub(crate) struct Given {
    pub(crate) lock: OwnedFd,
    pub(crate) control: OwnedFd,
}

/// See the module.
pub(crate) struct Giver {
    pub(crate) manager: Manager,
    pub(crate) turns: Arc<Turns>,
    pub(crate) own: Given,
    pub(crate) listener: UnixListener,
}

/// Why a new daemon did not take over.
enum Refusal {
    /// It is told.
    Told(String),
    /// There is nobody to tell.
    Untold(Broken),
}

impl From<Broken> for Refusal {
    fn from(broken: Broken) -> Refusal {
        Refusal::Untold(broken)
    }
}

fn told(reason: impl std::fmt::Display) -> Refusal {
    Refusal::Told(reason.to_string())
}

impl Giver {
    /// Starts the thread, which ends with the process, or soon after the daemon was told to stop.
    pub(crate) fn start(self) -> std::io::Result<()> {
        self.listener.set_nonblocking(true)?;
        std::thread::Builder::new().name("cofferdam-takeover".into()).spawn(move || self.run()).map(drop)
    }

    fn run(self) {
        while !self.turns.is_stopping() {
            let mut fds = [PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN)];
            // EINTR leads to another look.
            let _ = poll(&mut fds, Some(&LOOK));
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) => {
                    if error.kind() != std::io::ErrorKind::WouldBlock {
                        // Of descriptors, for one, there may be more later; who knocks stays in front of the door.
                        tracing::warn!(%error, "nobody can be let in to take over");
                        std::thread::sleep(REST);
                    }
                    continue;
                }
            };
            let wire = match Wire::new(socket) {
                // What is said on this side is short, and nothing comes with it.
                Ok(wire) => wire.bounded(SHORT_BYTES, 0),
                Err(error) => {
                    tracing::warn!(%error, "takeover refused");
                    continue;
                }
            };
            match self.give(&wire) {
                Ok(never) => match never {},
                Err(Refusal::Told(reason)) => {
                    tracing::warn!(reason, "no takeover; serving on");
                    let _ = wire.send(&Answer::Refused { reason }, &[], Instant::now() + PROMPT);
                }
                Err(Refusal::Untold(error)) => tracing::warn!(%error, "no takeover; serving on"),
            }
        }
    }

    fn called_off(&self) -> bool {
        self.turns.is_stopping()
    }

    /// The whole of it. Comes back only if the other one has not got anything.
    fn give(&self, wire: &Wire) -> Result<std::convert::Infallible, Refusal> {
        let called_off = || self.called_off();
        let (hello, _) = wire.receive(Instant::now() + PROMPT, &called_off)?;
        let deadline = match hello {
            Ask::Hello { version: VERSION, deadline_ms } => Duration::from_millis(deadline_ms).min(LONGEST_TAKEOVER),
            Ask::Hello { version, .. } => {
                return Err(told(format!(
                    "this daemon hands over in version {VERSION} of the protocol, the new one asks for version {version}; stop the one and start the other"
                )));
            }
            other => return Err(told(format!("{other:?} is no greeting"))),
        };
        let manifests = self.manager.manifests().map_err(told)?;
        let announced: Vec<_> = manifests.iter().map(|(one, _)| one.clone()).collect();
        let (bindings, components): (Vec<_>, Vec<_>) = manifests.into_iter().unzip();
        let files = components.iter().map(|bytes| file(bytes)).collect::<Result<Vec<_>, _>>()?;
        drop(components);
        tracing::info!(bindings = bindings.len(), "a new daemon prepares to take over");
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        wire.send(&Answer::Manifest { process: std::process::id(), bindings }, &files, Instant::now() + PROMPT)?;
        self.expect(wire, "prepared", Instant::now() + PREPARE, |ask| matches!(ask, Ask::Prepared))?;

        // Nobody waits yet. If nobody reads what this process says, it will not wait for that at its end.
        let is_heard = log::finish(LAST_WORDS, LAST_WORDS);
        let Some(giving) = self.turns.give(Instant::now() + deadline) else {
            return Err(told("a call that changes a binding is under way; try again when it has ended"));
        };
        let now = self.manager.manifests().map_err(told)?;
        if !now.iter().map(|(one, _)| one).eq(&announced) {
            return Err(told("bindings have changed meanwhile; try again"));
        }
        let mut over = self.manager.hand_over_unless(deadline, &called_off).map_err(told)?;
        let held_since = monotonic_now().saturating_sub(over.since().elapsed());
        let until = over.since() + deadline;
        let mut descriptors: Vec<OwnedFd> = Vec::new();
        let bindings = over.take_exported().into_iter().map(|one| Parcel::pack(one, &mut descriptors)).collect();
        let own: [BorrowedFd<'_>; 3] = [self.own.lock.as_fd(), self.own.control.as_fd(), self.listener.as_fd()];
        let all: Vec<_> = own.into_iter().chain(descriptors.iter().map(AsFd::as_fd)).collect();
        wire.send(&Answer::State { held_since, bindings }, &all, until)?;
        drop(descriptors);
        self.expect(wire, "ready", until, |ask| matches!(ask, Ask::Ready))?;
        self.commit(wire, over, &giving, is_heard)
    }

    fn expect(&self, wire: &Wire, what: &str, until: Instant, is_it: impl FnOnce(&Ask) -> bool) -> Result<(), Refusal> {
        match wire.receive(until, &|| self.called_off())?.0 {
            Ask::Failed { reason } => Err(told(format!("the new daemon cannot: {reason}"))),
            ask if is_it(&ask) => Ok(()),
            ask => Err(told(format!("{ask:?} in place of {what}"))),
        }
    }

    /// The one message. A process that has sent it ends as it stands: nothing of what it had is its own any more, so nothing is taken down, closed or removed.
    fn commit(
        &self,
        wire: &Wire,
        over: HandOver,
        giving: &Giving<'_>,
        is_heard: bool,
    ) -> Result<std::convert::Infallible, Refusal> {
        if !over.is_whole() || !giving.commit() {
            return Err(told("a binding is leaving, clients wait no longer, or the daemon stops"));
        }
        wire.send(&Answer::Commit, &[], Instant::now() + COMMIT)?;
        log::say("cofferdam: a new daemon has taken over; this one ends");
        // What broke down in the last moment.
        over.write_crashes(Instant::now() + LAST_WORDS);
        // Not even the drop of what was held.
        std::mem::forget(over);
        if is_heard {
            log::finish(LAST_WORDS, LAST_WORDS);
        }
        std::process::exit(0);
    }
}

/// A component as a file.
fn file(bytes: &[u8]) -> Result<OwnedFd, Refusal> {
    let made = rustix::fs::memfd_create("cofferdam-component", MemfdFlags::CLOEXEC);
    let mut file = File::from(made.map_err(told)?);
    std::io::Write::write_all(&mut file, bytes).map_err(told)?;
    Ok(file.into())
}
