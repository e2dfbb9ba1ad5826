//! A small pipelined NBD client: newstyle handshake, simple replies, any number of requests in flight on one Unix socket.
//!
//! It is the demo's own, so that what the demo claims does not rest on the project's server code, and nothing has to be installed. Everything is big-endian;
//! names are those of the NBD protocol document (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>).

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const NBDMAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const IHAVEOPT: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;
const OPT_GO: u32 = 7;
const OPT_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR_BIT: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const SIMPLE_REPLY_BYTES: usize = 16;

/// No option reply that this client asks for is longer.
const MAX_OPTION_REPLY_BYTES: u32 = 4096;
/// The handshake must be over by then.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Read from the socket at once.
const READ_BYTES: usize = 256 * 1024;

/// What is asked of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Operation {
    Read = 0,
    Write = 1,
    Flush = 3,
}

/// An answer; `cookie` is the request's.
pub(crate) struct Reply<'a> {
    pub(crate) cookie: usize,
    /// 0, or an error number of the protocol.
    pub(crate) error: u32,
    /// What was read; empty for everything else and on error.
    pub(crate) data: &'a [u8],
}

/// What the connection can still do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Open,
    /// The server has hung up; no further answer will come.
    Closed,
}

/// A connection in transmission phase.
pub(crate) struct Connection {
    stream: UnixStream,
    size_bytes: u64,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    /// By cookie: how many bytes of data a successful reply carries; none if the cookie is free.
    expected: Vec<Option<u32>>,
    in_flight: usize,
    state: State,
}

impl Connection {
    /// Connects and goes through the handshake for the default export.
    pub(crate) fn open(socket: &Path) -> Result<Connection> {
        let mut stream =
            UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(HANDSHAKE_LIMIT))?;
        stream.set_write_timeout(Some(HANDSHAKE_LIMIT))?;
        let size_bytes = handshake(&mut stream).context("NBD handshake")?;
        stream.set_nonblocking(true)?;
        Ok(Connection {
            stream,
            size_bytes,
            outgoing: Vec::new(),
            incoming: Vec::new(),
            expected: Vec::new(),
            in_flight: 0,
            state: State::Open,
        })
    }

    /// Size of the export.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Requests sent or queued and not answered.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Queues a request; `turn` sends it. `payload` is what a write writes; `length` counts for a read.
    pub(crate) fn push(&mut self, operation: Operation, cookie: usize, offset: u64, length: u32, payload: &[u8]) {
        if self.expected.len() <= cookie {
            self.expected.resize(cookie + 1, None);
        }
        let previous = self.expected[cookie].replace(if operation == Operation::Read { length } else { 0 });
        assert!(previous.is_none(), "cookie {cookie} is in flight already");
        self.in_flight += 1;
        self.outgoing.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        self.outgoing.extend_from_slice(&0_u16.to_be_bytes());
        self.outgoing.extend_from_slice(&(operation as u16).to_be_bytes());
        self.outgoing.extend_from_slice(&(cookie as u64).to_be_bytes());
        self.outgoing.extend_from_slice(&offset.to_be_bytes());
        self.outgoing.extend_from_slice(&length.to_be_bytes());
        self.outgoing.extend_from_slice(payload);
    }

    /// Waits for at most `limit` until the socket moves, moves bytes both ways and hands out every reply that is complete.
    ///
    /// A server that hangs up is no error: `State::Closed` comes back after the last reply. An answer that breaks the protocol is one.
    pub(crate) fn turn(&mut self, limit: Duration, mut each: impl FnMut(Reply<'_>) -> Result<()>) -> Result<State> {
        if self.state == State::Open {
            self.wait(limit)?;
            self.send()?;
            self.receive()?;
        }
        let mut used = 0;
        while let Some((reply, bytes)) = parse(&self.incoming[used..], &mut self.expected)? {
            self.in_flight -= 1;
            each(reply)?;
            used += bytes;
        }
        self.incoming.drain(..used);
        Ok(self.state)
    }

    fn wait(&self, limit: Duration) -> Result<()> {
        let mut interest = PollFlags::IN;
        if !self.outgoing.is_empty() {
            interest |= PollFlags::OUT;
        }
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        match poll(&mut [PollFd::new(&self.stream, interest)], Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn send(&mut self) -> Result<()> {
        let mut sent = 0;
        while sent < self.outgoing.len() {
            match self.stream.write(&self.outgoing[sent..]) {
                Ok(bytes) => sent += bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The server no longer reads, but answers may still be on their way: reading tells when the end has come.
                Err(error) if hung_up(error.kind()) => sent = self.outgoing.len(),
                Err(error) => return Err(error.into()),
            }
        }
        self.outgoing.drain(..sent);
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        let before = self.incoming.len();
        self.incoming.resize(before + READ_BYTES, 0);
        let result = self.stream.read(&mut self.incoming[before..]);
        self.incoming.truncate(before + result.as_ref().map_or(0, |bytes| *bytes));
        match result {
            Ok(0) => self.state = State::Closed,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) if hung_up(error.kind()) => self.state = State::Closed,
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

fn hung_up(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
}

/// Takes one complete reply off the front, freeing its cookie.
fn parse<'a>(bytes: &'a [u8], expected: &mut [Option<u32>]) -> Result<Option<(Reply<'a>, usize)>> {
    let Some((header, rest)) = bytes.split_at_checked(SIMPLE_REPLY_BYTES) else {
        return Ok(None);
    };
    ensure!(be_u32(&header[0..]) == SIMPLE_REPLY_MAGIC, "a reply begins with {:#x}", be_u32(&header[0..]));
    let error = be_u32(&header[4..]);
    let cookie = usize::try_from(be_u64(&header[8..]))?;
    let Some(slot) = expected.get_mut(cookie) else { bail!("an answer to request {cookie}, which was never made") };
    let Some(length) = *slot else { bail!("a second answer to request {cookie}") };
    let length = if error == 0 { length as usize } else { 0 };
    let Some(data) = rest.get(..length) else {
        return Ok(None);
    };
    *slot = None;
    Ok(Some((Reply { cookie, error, data }, SIMPLE_REPLY_BYTES + length)))
}

/// Fixed newstyle up to the acknowledgement of `NBD_OPT_GO`; returns the size of the export.
fn handshake(stream: &mut UnixStream) -> Result<u64> {
    let greeting: [u8; 18] = read_array(stream)?;
    ensure!(
        be_u64(&greeting[0..]) == NBDMAGIC && be_u64(&greeting[8..]) == IHAVEOPT,
        "the server does not speak newstyle NBD"
    );
    let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
    ensure!(flags & FLAG_FIXED_NEWSTYLE != 0, "the server does not speak fixed newstyle NBD");

    let mut hello = Vec::new();
    hello.extend_from_slice(&u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)).to_be_bytes());
    hello.extend_from_slice(&IHAVEOPT.to_be_bytes());
    hello.extend_from_slice(&OPT_GO.to_be_bytes());
    // An empty export name and no further information asked for.
    hello.extend_from_slice(&6_u32.to_be_bytes());
    hello.extend_from_slice(&[0; 6]);
    stream.write_all(&hello)?;

    let mut size = None;
    loop {
        let header: [u8; 20] = read_array(stream)?;
        ensure!(be_u64(&header[0..]) == OPT_REPLY_MAGIC, "an option reply begins with {:#x}", be_u64(&header[0..]));
        let (kind, length) = (be_u32(&header[12..]), be_u32(&header[16..]));
        ensure!(length <= MAX_OPTION_REPLY_BYTES, "an option reply of {length} bytes");
        let mut payload = vec![0; length as usize];
        stream.read_exact(&mut payload)?;
        match kind {
            REP_ACK => return size.context("the server did not tell the size of the export"),
            REP_INFO if payload.len() >= 12 && u16::from_be_bytes([payload[0], payload[1]]) == INFO_EXPORT => {
                size = Some(be_u64(&payload[2..]));
            }
            REP_INFO => {}
            _ if kind & REP_ERROR_BIT != 0 => {
                bail!("refused: {:#x} {}", kind, String::from_utf8_lossy(&payload))
            }
            _ => bail!("an option reply of unknown type {kind}"),
        }
    }
}

fn read_array<const N: usize>(stream: &mut UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The first four bytes; the callers have checked that they are there.
fn be_u32(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

fn be_u64(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(error: u32, cookie: u64, data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&error.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    #[test]
    fn a_reply_is_taken_only_when_it_is_whole() {
        let bytes = reply(0, 1, b"abcd");
        for cut in 0..bytes.len() {
            assert!(parse(&bytes[..cut], &mut [None, Some(4)]).unwrap().is_none(), "{cut} bytes");
        }
        let mut expected = [None, Some(4)];
        let (reply, used) = parse(&bytes, &mut expected).unwrap().unwrap();
        assert_eq!((reply.cookie, reply.error, reply.data, used), (1, 0, &b"abcd"[..], bytes.len()));
        assert_eq!(expected, [None, None]);
    }

    #[test]
    fn an_error_carries_no_data() {
        let bytes = reply(108, 0, b"the next reply");
        let (reply, used) = parse(&bytes, &mut [Some(4096)]).unwrap().unwrap();
        assert_eq!((reply.error, reply.data.len(), used), (108, 0, SIMPLE_REPLY_BYTES));
    }

    #[test]
    fn answers_that_nobody_asked_for_are_errors() {
        assert!(parse(&reply(0, 7, b""), &mut [Some(0)]).is_err());
        assert!(parse(&reply(0, 0, b""), &mut [None]).is_err());
        assert!(parse(&[0; SIMPLE_REPLY_BYTES], &mut [Some(0)]).is_err());
    }
}
