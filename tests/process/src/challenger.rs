//! The takeover protocol from its description (`host/cli/src/takeover.rs`), for tests that say the wrong thing or nothing at all.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

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

/// A document as it goes over the socket.
pub fn framed(message: &Value) -> Vec<u8> {
    let document = message.to_string().into_bytes();
    let mut bytes = b"cfto".to_vec();
    bytes.extend_from_slice(&u32::try_from(document.len()).expect("short").to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&document);
    bytes
}
