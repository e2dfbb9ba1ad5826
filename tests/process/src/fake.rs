//! Peers that only pretend to be a vhost-user device, each a thread with a socket.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tempfile::TempDir;

const GET_FEATURES: u32 = 1;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const GET_CONFIG: u32 = 24;
const NEEDS_REPLY: u32 = 1 << 3;
/// `VIRTIO_F_VERSION_1` and `VHOST_USER_F_PROTOCOL_FEATURES`.
const MODERN: u64 = 1 << 32 | 1 << 30;
/// `VIRTIO_NET_F_MAC`, `_STATUS`, `_CTRL_RX` and `_GUEST_ANNOUNCE` (virtio 1.2, section 5.1.3): no block device has the last two.
const NET: u64 = 1 << 5 | 1 << 16 | 1 << 18 | 1 << 21;
/// `VHOST_USER_PROTOCOL_F_MQ`, `_REPLY_ACK` and `_CONFIG`.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9;

/// What a fake does with the one connection that it takes.
#[derive(Clone, Copy, Debug)]
pub enum Pretence {
    /// Says what nobody asked for, in no protocol at all.
    Garbage,
    /// Takes the connection and never says anything.
    Silence,
    /// Closes the connection at the first question.
    HangUp,
    /// Answers so many messages as a device would, and then closes the connection.
    DieAfter(u32),
    /// Is a block device, as far as the set-up goes.
    Block,
    /// Is a network device.
    Network,
    /// Is a device that has no configuration space, such as an entropy device.
    Entropy,
}

/// A listening fake. Its thread ends with its connection.
pub struct Fake {
    folder: TempDir,
    messages: Arc<AtomicU32>,
}

impl Fake {
    /// Starts one.
    #[track_caller]
    pub fn start(pretence: Pretence) -> Fake {
        let folder = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(folder.path().join("fake.sock")).expect("a socket");
        let messages = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&messages);
        std::thread::spawn(move || {
            if let Ok((stream, _)) = listener.accept() {
                // The connection's end, whoever brings it about, is the fake's end.
                let _ = pretend(pretence, stream, &count);
            }
        });
        Fake { folder, messages }
    }

    /// How many messages it has taken.
    pub fn messages(&self) -> u32 {
        self.messages.load(Ordering::Acquire)
    }

    /// As `load --device` takes it.
    pub fn address(&self) -> String {
        format!("vhost-user:{}", self.path().display())
    }

    /// The socket's path.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("fake.sock")
    }
}

fn pretend(pretence: Pretence, mut stream: UnixStream, messages: &AtomicU32) -> std::io::Result<()> {
    let (limit, features, protocol) = match pretence {
        Pretence::Garbage => {
            let _ = stream.write_all(&[0xa5; 4096]);
            return swallow(stream);
        }
        Pretence::Silence => return swallow(stream),
        Pretence::HangUp => return Ok(()),
        Pretence::DieAfter(count) => (count, MODERN, PROTOCOL),
        Pretence::Block => (u32::MAX, MODERN, PROTOCOL),
        Pretence::Network => (u32::MAX, MODERN | NET, PROTOCOL),
        Pretence::Entropy => (u32::MAX, MODERN, PROTOCOL & !(1 << 9)),
    };
    for _ in 0..limit {
        answer(&mut stream, features, protocol, messages)?;
    }
    Ok(())
}

fn swallow(mut stream: UnixStream) -> std::io::Result<()> {
    stream.read_to_end(&mut Vec::new()).map(|_| ())
}

/// Takes one message and answers it if it wants an answer.
fn answer(stream: &mut UnixStream, features: u64, protocol: u64, messages: &AtomicU32) -> std::io::Result<()> {
    let mut header = [0; 12];
    stream.read_exact(&mut header)?;
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes"));
    let (request, flags) = (word(0), word(4));
    let mut body = vec![0; word(8) as usize];
    stream.read_exact(&mut body)?;
    messages.fetch_add(1, Ordering::AcqRel);
    let body = match request {
        GET_FEATURES => features.to_ne_bytes().to_vec(),
        GET_PROTOCOL_FEATURES => protocol.to_ne_bytes().to_vec(),
        GET_QUEUE_NUM => 2_u64.to_ne_bytes().to_vec(),
        GET_CONFIG => body,
        _ if flags & NEEDS_REPLY != 0 => vec![0; 8],
        _ => return Ok(()),
    };
    let size = u32::try_from(body.len()).expect("a short answer");
    let mut bytes: Vec<u8> = [request, 0x5, size].iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend_from_slice(&body);
    stream.write_all(&bytes)
}
