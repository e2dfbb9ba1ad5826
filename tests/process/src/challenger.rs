//! The takeover protocol from its description (`host/cli/src/takeover.rs`), for tests that say the wrong thing or nothing at all.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde_json::{Value, json};

use crate::nbd::connect;
use crate::wait::PATIENCE;

/// A new daemon that speaks the protocol and does as it is told, written from its description.
pub struct Challenger {
    /// The connection itself.
    pub stream: UnixStream,
}

impl Challenger {
    /// Asks at `door`.
    #[track_caller]
    pub fn new(door: &Path) -> Challenger {
        Challenger { stream: connect(door) }
    }

    /// Either side of a conversation that has begun.
    pub fn on(stream: UnixStream) -> Challenger {
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        Challenger { stream }
    }

    /// Sends a document.
    #[track_caller]
    pub fn say(&mut self, message: &Value) {
        self.stream.write_all(&framed(message)).expect("sent");
    }

    /// Its first words.
    #[track_caller]
    pub fn hello(&mut self, deadline_ms: u64) -> &mut Challenger {
        self.say(&json!({"says": "hello", "version": 1, "deadline_ms": deadline_ms}));
        self
    }

    /// The next document. Descriptors that come with it are lost: nothing takes them.
    #[track_caller]
    fn hear(&mut self) -> Value {
        let mut head = [0; 12];
        self.stream.read_exact(&mut head).expect("a message");
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
        assert_eq!(&head[..4], b"cfto");
        let mut document = vec![0; word(4) as usize];
        self.stream.read_exact(&mut document).expect("a document");
        self.stream.read_exact(&mut vec![0; word(8).div_ceil(253) as usize]).expect("its descriptors");
        serde_json::from_slice(&document).expect("JSON")
    }

    /// The next document, which must be this one.
    #[track_caller]
    pub fn expect(&mut self, says: &str) -> Value {
        let heard = self.hear();
        assert_eq!(heard["says"], says, "{heard}");
        heard
    }
}

/// Stands between the daemon at `door` and the next one that asks there, for one takeover: passes everything on, descriptors too, and tells `before` what the old one says before the new one
/// hears it. Ends when both have hung up.
#[track_caller]
pub fn stand_between(door: &Path, mut before: impl FnMut(&str) + Send + 'static) -> JoinHandle<()> {
    let aside = door.with_extension("aside");
    std::fs::rename(door, &aside).expect("the door");
    let listener = UnixListener::bind(door).expect("a socket");
    let door = door.to_owned();
    std::thread::spawn(move || {
        let (new, _) = listener.accept().expect("it comes");
        let old = connect(&aside);
        // Whoever comes afterwards finds the right one.
        std::fs::rename(&aside, &door).expect("the door");
        std::thread::scope(|scope| {
            scope.spawn(|| pass_all(&new, &old, |_| {}));
            pass_all(&old, &new, |says| before(says));
        });
    })
}

/// Passes messages on until there are no more.
fn pass_all(from: &UnixStream, to: &UnixStream, mut before: impl FnMut(&str)) {
    from.set_read_timeout(None).expect("no time-out");
    while let Some((message, descriptors)) = whole_message(from) {
        let document: Value = serde_json::from_slice(&message[12..]).expect("JSON");
        before(document["says"].as_str().expect("it says something"));
        let mut into = to;
        // It may have gone.
        let sent = into.write_all(&message).is_ok() && descriptors.iter().all(|batch| send_batch(to, batch));
        if !sent {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Head and document, and the descriptors as they came; `None` at the end.
fn whole_message(mut from: &UnixStream) -> Option<(Vec<u8>, Vec<Vec<OwnedFd>>)> {
    let mut message = vec![0; 12];
    from.read_exact(&mut message).ok()?;
    let word = |at: usize| u32::from_le_bytes(message[at..at + 4].try_into().expect("four bytes")) as usize;
    let (bytes, count) = (word(4), word(8));
    message.resize(12 + bytes, 0);
    from.read_exact(&mut message[12..]).ok()?;
    let batches = (0..count.div_ceil(BATCH)).map(|_| receive_batch(from)).collect();
    Some((message, batches))
}

/// Descriptors that one byte carries at the most.
const BATCH: usize = 253;

fn receive_batch(from: &UnixStream) -> Vec<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let into = &mut [IoSliceMut::new(&mut byte)];
    recvmsg(from, into, &mut control, RecvFlags::CMSG_CLOEXEC).expect("descriptors");
    let rights = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    });
    rights.flatten().collect()
}

fn send_batch(to: &UnixStream, batch: &[OwnedFd]) -> bool {
    let batch: Vec<_> = batch.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&batch));
    sendmsg(to, &[IoSlice::new(b"+")], &mut control, SendFlags::NOSIGNAL).is_ok()
}

/// A document as it goes over the socket.
pub fn framed(message: &Value) -> Vec<u8> {
    let document = message.to_string().into_bytes();
    let mut bytes = b"cfto".to_vec();
    bytes.extend_from_slice(&u32::try_from(document.len()).expect("short").to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&document);
    bytes
}
