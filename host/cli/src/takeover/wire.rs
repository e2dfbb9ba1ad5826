//! Messages with descriptors over a Unix socket, every wait bounded.
//!
//! | bytes | |
//! | --- | --- |
//! | 4 | [`MAGIC`] |
//! | 4 | bytes of the document, little-endian, at most [`MAX_BYTES`] |
//! | 4 | descriptors, little-endian, at most [`MAX_DESCRIPTORS`] |
//! | | the document, JSON |
//! | | for every [`BATCH`] descriptors (or the rest of them) one byte that carries them (`SCM_RIGHTS`) |
//!
//! Whoever receives closes what it does not use: descriptors that come with other bytes are dropped by the kernel, since nothing is there to take them.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, recv, recvmsg, send, sendmsg, shutdown, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How every message begins.
const MAGIC: [u8; 4] = *b"cfto";
const HEAD_BYTES: usize = 12;
/// Longest document, in bytes: 4,096 connections of 16 ports, and room.
const MAX_BYTES: usize = 64 << 20;
/// Most descriptors of one message.
const MAX_DESCRIPTORS: usize = 1 << 17;
/// Descriptors that one byte may carry (unix(7), `SCM_MAX_FD`).
const BATCH: usize = 253;
/// Longest wait before somebody is asked whether it is worth it.
const SLICE: Duration = Duration::from_millis(20);

/// Why a conversation is over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("it does not answer in time")]
    Late,
    #[error("it has gone")]
    Gone,
    #[error("it does not speak this protocol: {0}")]
    Garbage(String),
    #[error("called off")]
    CalledOff,
    #[error("{what}: {source}")]
    Io {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
}

fn io(what: &'static str) -> impl Fn(Errno) -> Broken {
    move |errno| match errno {
        Errno::PIPE | Errno::CONNRESET => Broken::Gone,
        _ => Broken::Io { what, source: errno.into() },
    }
}

/// One end of it.
pub(crate) struct Wire {
    socket: UnixStream,
    /// Longest document that is received, and most descriptors.
    most: (usize, usize),
}

impl Wire {
    /// Over `socket`, if whoever is at the other end is of this user, or root.
    ///
    /// # Errors
    /// [`Broken::Garbage`] for anybody else.
    pub(crate) fn new(socket: UnixStream) -> Result<Wire, Broken> {
        let peer = sockopt::socket_peercred(&socket).map_err(io("who is at the other end"))?;
        if peer.uid != rustix::process::geteuid() && !peer.uid.is_root() {
            return Err(Broken::Garbage(format!("it is of user {}", peer.uid.as_raw())));
        }
        socket.set_nonblocking(true).map_err(|source| Broken::Io { what: "a socket", source })?;
        Ok(Wire { socket, most: (MAX_BYTES, MAX_DESCRIPTORS) })
    }

    /// The same, which receives no longer documents and no more descriptors than that.
    pub(crate) fn bounded(self, bytes: usize, descriptors: usize) -> Wire {
        Wire { most: (bytes, descriptors), ..self }
    }

    /// Sends `message` and duplicates of `descriptors`.
    pub(crate) fn send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<(), Broken> {
        let document = serde_json::to_vec(message).map_err(|error| Broken::Garbage(error.to_string()))?;
        let (Ok(bytes), Ok(count)) = (u32::try_from(document.len()), u32::try_from(descriptors.len())) else {
            return Err(Broken::Garbage("a message is too long".to_owned()));
        };
        if document.len() > MAX_BYTES || descriptors.len() > MAX_DESCRIPTORS {
            return Err(Broken::Garbage("a message is too long".to_owned()));
        }
        // In one piece where it fits, so that a short message is there whole or not at all.
        let mut whole = Vec::with_capacity(HEAD_BYTES + document.len());
        whole.extend_from_slice(&MAGIC);
        whole.extend_from_slice(&bytes.to_le_bytes());
        whole.extend_from_slice(&count.to_le_bytes());
        whole.extend_from_slice(&document);
        let mut sent = 0;
        while sent < whole.len() {
            sent += self.retry(PollFlags::OUT, until, &|| false, || {
                send(&self.socket, &whole[sent..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
            })?;
        }
        for batch in descriptors.chunks(BATCH) {
            self.retry(PollFlags::OUT, until, &|| false, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                control.push(SendAncillaryMessage::ScmRights(batch));
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                sendmsg(&self.socket, &[IoSlice::new(b"+")], &mut control, flags)
            })?;
        }
        Ok(())
    }

    /// The next message, with its descriptors. `called_off` is asked now and then.
    pub(crate) fn receive<T: DeserializeOwned>(
        &self,
        until: Instant,
        called_off: &dyn Fn() -> bool,
    ) -> Result<(T, Vec<OwnedFd>), Broken> {
        let mut head = [0; HEAD_BYTES];
        self.fill(&mut head, until, called_off)?;
        let word = |at: usize| head.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes);
        let (bytes, count) = (word(4) as usize, word(8) as usize);
        if head[..4] != MAGIC || bytes > self.most.0 || count > self.most.1 {
            return Err(Broken::Garbage("a message does not begin as one".to_owned()));
        }
        // Grown as it comes: whoever announces much has to send it.
        let mut document = Vec::new();
        while document.len() < bytes {
            let at = document.len();
            document.resize(bytes.min(at + (64 << 10)), 0);
            self.fill(&mut document[at..], until, called_off)?;
        }
        let mut descriptors = Vec::new();
        while descriptors.len() < count {
            let batch = self.batch(until, called_off)?;
            if batch.is_empty() || descriptors.len() + batch.len() > count {
                return Err(Broken::Garbage("other descriptors than were announced".to_owned()));
            }
            descriptors.extend(batch);
        }
        let message = serde_json::from_slice(&document).map_err(|error| Broken::Garbage(error.to_string()))?;
        Ok((message, descriptors))
    }

    /// Nothing more can be sent to this end; what was sent can still be received.
    pub(crate) fn shut(&self) {
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    fn fill(&self, into: &mut [u8], until: Instant, called_off: &dyn Fn() -> bool) -> Result<(), Broken> {
        let mut filled = 0;
        while filled < into.len() {
            let (count, _) = self.retry(PollFlags::IN, until, called_off, || {
                recv(&self.socket, &mut into[filled..], RecvFlags::DONTWAIT)
            })?;
            if count == 0 {
                return Err(Broken::Gone);
            }
            filled += count;
        }
        Ok(())
    }

    fn batch(&self, until: Instant, called_off: &dyn Fn() -> bool) -> Result<Vec<OwnedFd>, Broken> {
        self.retry(PollFlags::IN, until, called_off, || {
            let mut byte = [0];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let got = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
            let mut descriptors = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    descriptors.extend(rights);
                }
            }
            // This process may have no more descriptors: then some are missing.
            if got.bytes == 0 || got.flags.contains(ReturnFlags::CTRUNC) {
                return Err(Errno::CONNRESET);
            }
            Ok(descriptors)
        })
    }

    fn retry<T>(
        &self,
        what: PollFlags,
        until: Instant,
        called_off: &dyn Fn() -> bool,
        mut attempt: impl FnMut() -> rustix::io::Result<T>,
    ) -> Result<T, Broken> {
        loop {
            match attempt() {
                Ok(done) => return Ok(done),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(io("the takeover's socket")(errno)),
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Broken::Late);
            }
            if called_off() {
                return Err(Broken::CalledOff);
            }
            let slice = Timespec::try_from(left.min(SLICE)).unwrap_or_default();
            let _ = poll(&mut [PollFd::from_borrowed_fd(self.socket.as_fd(), what)], Some(&slice));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn pair() -> (Wire, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Wire::new(ours).unwrap(), theirs)
    }

    fn receive(wire: &Wire, until: Instant) -> Result<(Vec<u32>, Vec<OwnedFd>), Broken> {
        wire.receive(until, &|| false)
    }

    #[test]
    fn a_message_arrives_with_all_of_its_descriptors_in_order() {
        let (ours, theirs) = pair();
        let theirs = Wire::new(theirs).unwrap();
        let files: Vec<_> = (0..600)
            .map(|number: u32| {
                let file = rustix::fs::memfd_create("wire", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
                rustix::io::write(&file, &number.to_le_bytes()).unwrap();
                file
            })
            .collect();
        let numbers: Vec<u32> = (0..100_000).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                ours.send(&numbers, &borrowed, soon()).unwrap();
                ours.send(&[7_u32], &[], soon()).unwrap();
            });
            let (received, descriptors) = receive(&theirs, soon()).unwrap();
            assert_eq!((received, descriptors.len()), (numbers.clone(), 600));
            for (number, file) in (0_u32..).zip(&descriptors) {
                let mut bytes = [0; 4];
                rustix::io::pread(file, &mut bytes, 0).unwrap();
                assert_eq!(u32::from_le_bytes(bytes), number);
            }
            let (received, descriptors) = receive(&theirs, soon()).unwrap();
            assert_eq!((received, descriptors.len()), (vec![7], 0));
        });
    }

    #[test]
    fn garbage_is_an_error_and_nothing_is_waited_for_without_a_bound() {
        let cases: [(&[u8], &str); 6] = [
            (b"GET / HTTP/1.1\r\n", "does not begin"),
            (b"cfto\xff\xff\xff\xff\0\0\0\0", "does not begin"),
            (b"cfto\x02\0\0\0\xff\xff\xff\xff[]", "does not begin"),
            (b"cfto\x02\0\0\0\0\0\0\0[}", "does not speak"),
            (b"cfto\x02\0\0\0\x01\0\0\0[]x", "other descriptors"),
            (b"cfto\x02\0\0", "has gone"),
        ];
        for (bytes, why) in cases {
            let (wire, mut theirs) = pair();
            theirs.write_all(bytes).unwrap();
            drop(theirs);
            let error = receive(&wire, soon()).unwrap_err().to_string();
            assert!(error.contains(why), "{bytes:?}: {error}");
        }
        let (wire, mut theirs) = pair();
        theirs.write_all(b"cfto\x02\0\0\0\0\0\0\0[").unwrap();
        assert!(matches!(receive(&wire, Instant::now() + Duration::from_millis(20)), Err(Broken::Late)));
        assert!(matches!(wire.receive::<u32>(soon(), &|| true), Err(Broken::CalledOff)));
    }

    #[test]
    fn what_was_sent_before_this_end_was_shut_is_received_and_nothing_can_be_sent_after() {
        let (ours, theirs) = pair();
        let theirs = Wire::new(theirs).unwrap();
        theirs.send(&[1_u32], &[], soon()).unwrap();
        ours.shut();
        assert!(theirs.send(&[2_u32], &[], soon()).is_err());
        assert_eq!(receive(&ours, soon()).unwrap().0, [1]);
        assert!(matches!(receive(&ours, soon()), Err(Broken::Gone)));
    }
}
