//! A blocking NBD client (newstyle, simple replies), made from the protocol's description. It can also misbehave: its stream is in the open.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::wait::PATIENCE;

/// `NBD_ESHUTDOWN`.
pub const ESHUTDOWN: u32 = 108;
/// `NBD_EINVAL`.
pub const EINVAL: u32 = 22;
/// `NBD_ENOSPC`.
pub const ENOSPC: u32 = 28;

/// What can be asked (`NBD_CMD_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Reads.
    Read = 0,
    /// Writes.
    Write = 1,
    /// Says goodbye.
    Disconnect = 2,
    /// Makes safe what was answered.
    Flush = 3,
    /// Lets go of a range.
    Trim = 4,
    /// Zeroes a range.
    WriteZeroes = 6,
}

/// A connection in the transmission phase.
pub struct Client {
    /// The connection itself.
    pub stream: UnixStream,
    cookie: u64,
    /// Bytes of payload that the answer to each unanswered request brings.
    expected: HashMap<u64, usize>,
}

/// One answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// Of which request.
    pub cookie: u64,
    /// 0 or an error of the protocol.
    pub error: u32,
    /// What was read.
    pub data: Vec<u8>,
}

/// Connects without a word.
#[track_caller]
pub fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    stream.set_write_timeout(Some(PATIENCE)).expect("a time-out");
    stream
}

impl Client {
    /// Connects and shakes hands.
    #[track_caller]
    pub fn new(path: &Path) -> Client {
        Client::shake(connect(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    fn shake(mut stream: UnixStream) -> io::Result<Client> {
        stream.read_exact(&mut [0; 18])?;
        // FIXED_NEWSTYLE and NO_ZEROES, then NBD_OPT_GO for the default export without wishes.
        let mut hello = 3u32.to_be_bytes().to_vec();
        hello.extend_from_slice(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0");
        stream.write_all(&hello)?;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head)?;
            let mut data = vec![0; be32(&head[16..]) as usize];
            stream.read_exact(&mut data)?;
            match be32(&head[12..]) {
                1 => break,
                error if error >= 1 << 31 => return Err(io::Error::other(format!("option refused: {error:#x}"))),
                _ => {}
            }
        }
        Ok(Client { stream, cookie: 0, expected: HashMap::new() })
    }

    /// A request's 28 bytes, entered as unanswered.
    pub fn header(&mut self, command: Command, offset: u64, length: u32) -> Vec<u8> {
        self.cookie += 1;
        let brings = if command == Command::Read { length as usize } else { 0 };
        self.expected.insert(self.cookie, brings);
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&(command as u32).to_be_bytes());
        bytes.extend_from_slice(&self.cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes
    }

    /// Sends a request that has no payload.
    ///
    /// # Errors
    /// The connection's.
    pub fn send(&mut self, command: Command, offset: u64, length: u32) -> io::Result<u64> {
        let bytes = self.header(command, offset, length);
        self.stream.write_all(&bytes)?;
        Ok(self.cookie)
    }

    /// Sends a write.
    ///
    /// # Errors
    /// The connection's.
    pub fn send_write(&mut self, offset: u64, data: &[u8]) -> io::Result<u64> {
        let mut bytes = self.header(Command::Write, offset, u32::try_from(data.len()).expect("a short write"));
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes)?;
        Ok(self.cookie)
    }

    /// The next answer.
    ///
    /// # Errors
    /// The connection's, or `InvalidData` for what is no answer.
    pub fn reply(&mut self) -> io::Result<Reply> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        let (magic, error, cookie) = (be32(&head), be32(&head[4..]), be64(&head[8..]));
        let Some(brings) = self.expected.remove(&cookie).filter(|_| magic == 0x6744_6698) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{head:02x?} answers nothing")));
        };
        let mut data = vec![0; if error == 0 { brings } else { 0 }];
        self.stream.read_exact(&mut data)?;
        Ok(Reply { cookie, error, data })
    }

    /// One request and its answer; `Err` holds the protocol's error.
    ///
    /// # Errors
    /// The connection's.
    pub fn call(&mut self, command: Command, offset: u64, length: u32) -> io::Result<Result<Vec<u8>, u32>> {
        self.send(command, offset, length)?;
        let reply = self.reply()?;
        Ok(if reply.error == 0 { Ok(reply.data) } else { Err(reply.error) })
    }

    /// A read that must succeed.
    #[track_caller]
    pub fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        self.call(Command::Read, offset, length).expect("an answer").expect("a read that succeeds")
    }

    /// A write; 0 or the protocol's error.
    #[track_caller]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.send_write(offset, data).expect("sent");
        self.reply().expect("an answer").error
    }

    /// A flush; 0 or the protocol's error.
    #[track_caller]
    pub fn flush(&mut self) -> u32 {
        self.call(Command::Flush, 0, 0).expect("an answer").err().unwrap_or(0)
    }

    /// The server must close the connection; what it still says does not matter.
    #[track_caller]
    pub fn assert_closed(mut self) {
        assert_closed(&mut self.stream);
    }
}

/// The peer must close the connection; what it still says does not matter.
#[track_caller]
pub fn assert_closed(stream: &mut UnixStream) {
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}"),
    }
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}
