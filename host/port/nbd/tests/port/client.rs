//! A plain blocking NBD client that can also misbehave.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use crate::mock::{PATIENCE, Served};

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const FUA: u16 = 1;
pub(crate) const NO_HOLE: u16 = 2;
pub(crate) const DF: u16 = 4;
pub(crate) const EIO: u32 = 5;
pub(crate) const EINVAL: u32 = 22;
pub(crate) const EOVERFLOW: u32 = 75;
pub(crate) const ESHUTDOWN: u32 = 108;

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    structured: bool,
    cookie: u64,
}

/// One reply, put together from its chunks.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) error: u32,
    pub(crate) data: Vec<u8>,
    pub(crate) chunks: usize,
}

impl Client {
    pub(crate) fn raw(served: &Served) -> UnixStream {
        let stream = UnixStream::connect(&served.path).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        stream.set_write_timeout(Some(PATIENCE)).expect("a time-out");
        stream
    }

    /// In the transmission phase.
    pub(crate) fn new(served: &Served, structured: bool) -> Client {
        let mut stream = Client::raw(served);
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).expect("a greeting");
        let mut hello = 3u32.to_be_bytes().to_vec();
        if structured {
            hello.extend(option(8, &[]));
        }
        hello.extend(option(7, &[0, 0, 0, 0, 0, 0]));
        stream.write_all(&hello).expect("options go out");
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head).expect("a reply to an option");
            let mut data = vec![0; be32(&head[16..]) as usize];
            stream.read_exact(&mut data).expect("its data");
            if be32(&head[8..]) == 7 && be32(&head[12..]) == 1 {
                break;
            }
            assert!(be32(&head[12..]) < 1 << 31, "{}", String::from_utf8_lossy(&data));
        }
        Client { stream, structured, cookie: 0 }
    }

    /// A request's bytes without payload.
    pub(crate) fn header(&mut self, kind: u16, flags: u16, offset: u64, length: u32) -> (u64, Vec<u8>) {
        self.cookie += 1;
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&self.cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        (self.cookie, bytes)
    }

    pub(crate) fn send(&mut self, kind: u16, flags: u16, offset: u64, length: u32) -> u64 {
        let (cookie, bytes) = self.header(kind, flags, offset, length);
        self.stream.write_all(&bytes).expect("a request goes out");
        cookie
    }

    pub(crate) fn send_write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u64 {
        let (cookie, mut bytes) = self.header(WRITE, flags, offset, data.len() as u32);
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes).expect("a write goes out");
        cookie
    }

    /// The next reply. `read_bytes`: what a simple reply to a read would carry.
    pub(crate) fn reply(&mut self, offset: u64, read_bytes: usize) -> io::Result<Reply> {
        let mut reply = Reply { cookie: 0, error: 0, data: vec![0; read_bytes], chunks: 0 };
        let mut covered = 0;
        loop {
            let mut magic = [0; 4];
            self.stream.read_exact(&mut magic)?;
            reply.chunks += 1;
            match u32::from_be_bytes(magic) {
                0x6744_6698 => {
                    assert!(!self.structured || read_bytes == 0, "a read got a simple reply");
                    let mut rest = [0; 12];
                    self.stream.read_exact(&mut rest)?;
                    (reply.error, reply.cookie) = (be32(&rest), be64(&rest[4..]));
                    if reply.error == 0 {
                        self.stream.read_exact(&mut reply.data)?;
                    }
                    return Ok(reply);
                }
                0x668e_33ef => {
                    assert!(self.structured, "structured replies were not negotiated");
                    let mut rest = [0; 16];
                    self.stream.read_exact(&mut rest)?;
                    let (done, kind) = (rest[1] == 1, u16::from_be_bytes([rest[2], rest[3]]));
                    let cookie = be64(&rest[4..]);
                    assert!(reply.chunks == 1 || cookie == reply.cookie, "this client sends one request at a time");
                    reply.cookie = cookie;
                    let mut payload = vec![0; be32(&rest[12..]) as usize];
                    self.stream.read_exact(&mut payload)?;
                    match kind {
                        0 => assert!(payload.is_empty() && done),
                        1 => {
                            let at = (be64(&payload) - offset) as usize;
                            reply.data[at..at + payload.len() - 8].copy_from_slice(&payload[8..]);
                            covered += payload.len() - 8;
                        }
                        0x8001 => {
                            assert_ne!(be32(&payload), 0);
                            reply.error = be32(&payload);
                        }
                        other => panic!("chunk of type {other}"),
                    }
                    if done {
                        assert!(reply.error != 0 || covered == read_bytes, "{covered} of {read_bytes} bytes came");
                        return Ok(reply);
                    }
                }
                other => panic!("reply magic {other:#x}"),
            }
        }
    }

    pub(crate) fn call(&mut self, kind: u16, flags: u16, offset: u64, length: u32) -> Reply {
        let cookie = self.send(kind, flags, offset, length);
        let reply = self.reply(offset, if kind == READ { length as usize } else { 0 }).expect("a reply");
        assert_eq!(reply.cookie, cookie);
        reply
    }

    /// The error, 0 for success.
    pub(crate) fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        let cookie = self.send_write(flags, offset, data);
        let reply = self.reply(0, 0).expect("a reply");
        assert_eq!(reply.cookie, cookie);
        reply.error
    }

    /// The server closed the connection without another byte.
    pub(crate) fn assert_closed(&mut self) {
        assert_closed(&mut self.stream);
    }
}

/// The server closes the connection, whatever it still says.
pub(crate) fn assert_closed(stream: &mut UnixStream) {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}"),
    }
}

pub(crate) fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}
