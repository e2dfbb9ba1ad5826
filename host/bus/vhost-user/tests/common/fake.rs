//! Backends in a thread of the test that do as they are told. They speak the protocol from its description, not from the crate under test.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;

use tempfile::TempDir;

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const GET_VRING_BASE: u32 = 11;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const GET_CONFIG: u32 = 24;
pub const GET_MAX_MEM_SLOTS: u32 = 36;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;

pub const VERSION_1: u64 = 1 << 32;
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
pub const MQ: u64 = 1;
pub const REPLY_ACK: u64 = 1 << 3;
pub const CONFIG: u64 = 1 << 9;
pub const MEM_SLOTS: u64 = 1 << 15;

/// What a fake does with one message.
pub enum Act {
    /// Answers with this payload.
    Answer(Vec<u8>),
    /// Sends exactly these bytes.
    Raw(Vec<u8>),
    /// Says nothing and listens on.
    Nothing,
    /// Closes the connection.
    Close,
}

/// One message from the front end.
pub struct Message {
    pub request: u32,
    pub flags: u32,
    pub body: Vec<u8>,
}

impl Message {
    pub fn index(&self) -> u32 {
        u32::from_ne_bytes(self.body[..4].try_into().unwrap())
    }
}

/// A backend in a thread.
pub struct Fake {
    folder: TempDir,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    /// Serves one connection with `behave`.
    pub fn serve(mut behave: impl FnMut(&Message) -> Act + Send + 'static) -> Self {
        Self::run(move |mut stream| {
            while let Some(message) = receive(&mut stream) {
                let sent = match behave(&message) {
                    Act::Answer(body) => stream.write_all(&answer(message.request, &body)),
                    Act::Raw(bytes) => stream.write_all(&bytes),
                    Act::Nothing => Ok(()),
                    Act::Close => return,
                };
                if sent.is_err() {
                    return;
                }
            }
        })
    }

    /// Gives one connection to `run`.
    pub fn run(run: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("fake.sock")).unwrap();
        let thread = std::thread::spawn(move || {
            if let Ok((stream, _)) = listener.accept() {
                run(stream);
            }
        });
        Fake { folder, thread: Some(thread) }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("fake.sock")
    }

    pub fn address(&self) -> String {
        format!("vhost-user:{}", self.path().display())
    }

    /// Waits for the end of the fake: its connection must be closed by now.
    pub fn join(mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

/// The bytes of an answer.
pub fn answer(request: u32, body: &[u8]) -> Vec<u8> {
    message(request, 0x5, body)
}

/// The bytes of any message.
pub fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    let mut bytes: Vec<u8> = [request, flags, size].iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend_from_slice(body);
    bytes
}

/// The next message, or `None` when the connection ends.
pub fn receive(stream: &mut UnixStream) -> Option<Message> {
    let mut header = [0; 12];
    stream.read_exact(&mut header).ok()?;
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; word(8) as usize];
    stream.read_exact(&mut body).ok()?;
    Some(Message { request: word(0), flags: word(4), body })
}

/// A backend that does everything right, with these features and protocol features and two queues.
pub fn honest(features: u64, protocol: u64) -> impl FnMut(&Message) -> Act + Send {
    move |message| {
        let number = |number: u64| Act::Answer(number.to_ne_bytes().to_vec());
        match message.request {
            GET_FEATURES => number(features),
            GET_PROTOCOL_FEATURES => number(protocol),
            GET_QUEUE_NUM => number(2),
            GET_MAX_MEM_SLOTS => number(3),
            GET_CONFIG => Act::Answer(message.body.clone()),
            GET_VRING_BASE => Act::Answer(message.body.clone()),
            _ if message.flags & 0x8 != 0 => number(0),
            _ => Act::Nothing,
        }
    }
}

/// All that this front end can use before the device starts.
pub fn complete() -> impl FnMut(&Message) -> Act + Send {
    honest(VERSION_1 | PROTOCOL_FEATURES, MQ | CONFIG | REPLY_ACK)
}

/// All that this front end can use, with three memory slots.
pub fn with_slots() -> impl FnMut(&Message) -> Act + Send {
    honest(VERSION_1 | PROTOCOL_FEATURES, MQ | CONFIG | REPLY_ACK | MEM_SLOTS)
}
