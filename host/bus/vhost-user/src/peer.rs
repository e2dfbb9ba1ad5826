//! The backend's process, and the proof that it is gone.
//!
//! A process id can be used again, so an id alone proves nothing. The order here does: an answer comes from process P (credentials by the kernel),
//! a pidfd is opened for P, and a *later question* is answered from P again. Whoever answered that was alive as P after the pidfd
//! had been opened, so the pidfd is its own. Until then the process counts as unknown, and unknown is never silent.
//!
//! What this cannot see: a backend that gave the shared memory to a third process. Such a backend is trusted with it like a device with its
//! DMA engine.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Who is at the other end.
#[derive(Debug)]
pub(crate) enum Peer {
    /// Nobody has answered yet.
    Unseen,
    /// Process `pid` answered once and `pidfd` was opened for that id.
    Candidate { pid: i32, pidfd: OwnedFd },
    /// `pidfd` is the process that answers.
    Known { pid: i32, pidfd: OwnedFd },
    /// It cannot be told, for this reason.
    Unknown { reason: String },
}

impl Peer {
    /// Takes note that an answer to a question asked after the last call of this came from process `pid`.
    pub(crate) fn answered_by(&mut self, pid: Option<i32>) {
        *self = match (std::mem::replace(self, Peer::Unseen), pid) {
            (Peer::Unseen, Some(pid)) => Self::open(pid),
            (Peer::Candidate { pid, pidfd }, Some(now)) if pid == now => Peer::Known { pid, pidfd },
            (Peer::Known { pid, pidfd }, Some(now)) if pid == now => Peer::Known { pid, pidfd },
            (Peer::Candidate { pid, .. } | Peer::Known { pid, .. }, Some(now)) => {
                Peer::Unknown { reason: format!("the backend answered from process {pid} and from process {now}") }
            }
            (unknown @ Peer::Unknown { .. }, _) => unknown,
            (_, None) => Peer::Unknown { reason: "the kernel does not tell which process the backend is".to_owned() },
        };
    }

    /// What another process found out, and handed over with the process's descriptor where it is known.
    pub(crate) fn adopt(known: Option<(i32, OwnedFd)>, reason: &str) -> Self {
        match known {
            Some((pid, pidfd)) => Peer::Known { pid, pidfd },
            None => Peer::Unknown { reason: reason.to_owned() },
        }
    }

    /// Why it is not known, if it is not.
    pub(crate) fn doubt(&self) -> Option<&str> {
        match self {
            Peer::Known { .. } => None,
            Peer::Unknown { reason } => Some(reason),
            Peer::Unseen | Peer::Candidate { .. } => Some("the backend has not shown which process it is"),
        }
    }

    fn open(pid: i32) -> Self {
        let unknown = |reason: String| Peer::Unknown { reason };
        if u32::try_from(pid) == Ok(std::process::id()) {
            return unknown("the backend runs in this process, which cannot be seen to end".to_owned());
        }
        let Some(process) = Pid::from_raw(pid) else {
            return unknown("the backend runs in another process-id namespace".to_owned());
        };
        match pidfd_open(process, PidfdFlags::empty()) {
            Ok(pidfd) => Peer::Candidate { pid, pidfd },
            Err(errno) => unknown(format!("the backend's process {pid} cannot be watched: {errno}")),
        }
    }

    /// The descriptor that becomes readable when the process has ended.
    pub(crate) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Peer::Known { pidfd, .. } => Some(pidfd.as_fd()),
            _ => None,
        }
    }

    /// The process id, when it is sure.
    pub(crate) fn pid(&self) -> Option<i32> {
        match self {
            Peer::Known { pid, .. } => Some(*pid),
            _ => None,
        }
    }

    /// Whether the process is known and has ended: all its threads have left the kernel, and with them its I/O.
    pub(crate) fn is_gone(&self) -> bool {
        self.wait_gone(Instant::now()).is_ok()
    }

    /// Waits until `deadline` at most for the process to end, or says why that is not known.
    pub(crate) fn wait_gone(&self, deadline: Instant) -> Result<(), String> {
        let (pid, pidfd) = match self {
            Peer::Known { pid, pidfd } => (pid, pidfd),
            Peer::Unknown { reason } => return Err(reason.clone()),
            Peer::Unseen | Peer::Candidate { .. } => {
                return Err("the backend has not shown which process it is".to_owned());
            }
        };
        match wait(pidfd.as_fd(), PollFlags::IN, deadline) {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!("the backend's process {pid} still runs")),
            Err(errno) => Err(format!("waiting for the backend's process {pid}: {errno}")),
        }
    }
}

/// Waits until `fd` is ready for `what` (or has an error or hang-up): `false` when `deadline` came first.
/// A deadline in the past asks without waiting.
pub(crate) fn wait(fd: BorrowedFd<'_>, what: PollFlags, deadline: Instant) -> Result<bool, Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // `Timespec` holds any time that an `Instant` can be away; should it not, a day is long enough to ask again.
        let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 86_400, tv_nsec: 0 });
        match poll(&mut [PollFd::from_borrowed_fd(fd, what)], Some(&left)) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;

    fn reason(peer: &Peer) -> String {
        peer.wait_gone(Instant::now()).unwrap_err()
    }

    #[test]
    fn one_answer_is_not_enough_to_know_a_process() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut peer = Peer::Unseen;
        peer.answered_by(Some(pid));
        assert!(peer.pid().is_none());
        assert!(reason(&peer).contains("has not shown"));
        peer.answered_by(Some(pid));
        assert_eq!(peer.pid(), Some(pid));
        assert!(reason(&peer).contains("still runs"));
        // cat ends at the end of its input.
        drop(child.stdin.take());
        peer.wait_gone(Instant::now() + Duration::from_secs(10)).unwrap();
        assert!(peer.is_gone());
        child.wait().unwrap();
    }

    #[test]
    fn two_processes_are_nobody() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut peer = Peer::Unseen;
        peer.answered_by(Some(pid));
        peer.answered_by(Some(pid));
        peer.answered_by(Some(1));
        assert!(peer.pidfd().is_none());
        assert!(reason(&peer).contains("and from process 1"));
        peer.answered_by(Some(pid));
        assert!(peer.pidfd().is_none(), "doubt stays");
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn this_process_and_other_namespaces_are_unknown() {
        let mut own = Peer::Unseen;
        own.answered_by(i32::try_from(std::process::id()).ok());
        assert!(reason(&own).contains("this process"));
        let mut far = Peer::Unseen;
        far.answered_by(Some(0));
        assert!(reason(&far).contains("namespace"));
    }
}
