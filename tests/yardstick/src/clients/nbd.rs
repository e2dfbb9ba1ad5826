//! A pipelined NBD client over a Unix socket: the NBD project's `doc/proto.md`, fixed newstyle, simple replies. Everything that is submitted together goes out in one system
//! call, and everything that has arrived comes in with one.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail, ensure};

use crate::engine::{Engine, Io, Job, PATIENCE};

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const REPLY_BYTES: usize = 16;

/// What is taken from the socket at once.
const INTAKE_BYTES: usize = 1 << 20;

/// One connection.
pub struct NbdClient {
    socket: UnixStream,
    capacity: u64,
    command: u16,
    bytes: u32,
    out: Vec<u8>,
    intake: Vec<u8>,
    /// Bytes of a reply's head that have arrived so far.
    head: [u8; REPLY_BYTES],
    head_len: usize,
    /// Bytes of payload that are still to come for the reply to `cookie`.
    payload: usize,
    cookie: u64,
}

fn number<const N: usize>(socket: &mut UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl NbdClient {
    /// Connects and takes `export`.
    ///
    /// # Errors
    /// When the server is none, or refuses.
    pub fn connect(path: &Path, export: &str) -> Result<NbdClient> {
        let deadline = Instant::now() + PATIENCE;
        let mut socket = loop {
            match UnixStream::connect(path) {
                Err(_) if Instant::now() < deadline => std::thread::yield_now(),
                result => break result?,
            }
        };
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let hello = number::<18>(&mut socket)?;
        ensure!(hello.starts_with(b"NBDMAGICIHAVEOPT"), "no NBD server");
        // NBD_FLAG_C_FIXED_NEWSTYLE and NBD_FLAG_C_NO_ZEROES.
        socket.write_all(&3_u32.to_be_bytes())?;
        let mut option = Vec::new();
        option.extend(OPTION_MAGIC.to_be_bytes());
        option.extend(OPT_GO.to_be_bytes());
        option.extend((export.len() as u32 + 6).to_be_bytes());
        option.extend((export.len() as u32).to_be_bytes());
        option.extend(export.as_bytes());
        option.extend(0_u16.to_be_bytes());
        socket.write_all(&option)?;
        let mut capacity = None;
        loop {
            ensure!(u64::from_be_bytes(number(&mut socket)?) == OPTION_REPLY_MAGIC, "no answer to an option");
            let _option = number::<4>(&mut socket)?;
            let kind = u32::from_be_bytes(number(&mut socket)?);
            let mut data = vec![0; u32::from_be_bytes(number(&mut socket)?).min(4096) as usize];
            socket.read_exact(&mut data)?;
            match kind {
                REP_ACK => break,
                REP_INFO if data.len() >= 12 && data[..2] == INFO_EXPORT.to_be_bytes() => {
                    capacity = data[2..10].try_into().ok().map(u64::from_be_bytes);
                }
                REP_INFO => {}
                other => bail!("option refused: {other:#x}"),
            }
        }
        let Some(capacity) = capacity else { bail!("the server does not tell its size") };
        Ok(NbdClient {
            socket,
            capacity,
            command: CMD_READ,
            bytes: 0,
            out: Vec::new(),
            intake: vec![0; INTAKE_BYTES],
            head: [0; REPLY_BYTES],
            head_len: 0,
            payload: 0,
            cookie: 0,
        })
    }

    fn head(&mut self, command: u16, cookie: u64, offset: u64, bytes: u32) {
        self.out.extend(REQUEST_MAGIC.to_be_bytes());
        self.out.extend(0_u16.to_be_bytes());
        self.out.extend(command.to_be_bytes());
        self.out.extend(cookie.to_be_bytes());
        self.out.extend(offset.to_be_bytes());
        self.out.extend(bytes.to_be_bytes());
    }

    /// Works through what has arrived.
    fn digest(&mut self, arrived: usize, done: &mut Vec<u32>) -> Result<()> {
        let mut at = 0;
        while at < arrived {
            if self.payload > 0 {
                let part = self.payload.min(arrived - at);
                (at, self.payload) = (at + part, self.payload - part);
            } else {
                let part = (REPLY_BYTES - self.head_len).min(arrived - at);
                self.head[self.head_len..self.head_len + part].copy_from_slice(&self.intake[at..at + part]);
                (at, self.head_len) = (at + part, self.head_len + part);
                if self.head_len < REPLY_BYTES {
                    break;
                }
                self.head_len = 0;
                let word = |place: usize| u32::from_be_bytes([0, 1, 2, 3].map(|byte| self.head[place + byte]));
                ensure!(word(0) == REPLY_MAGIC, "no simple reply");
                ensure!(word(4) == 0, "NBD error {}", word(4));
                self.cookie = u64::from(word(8)) << 32 | u64::from(word(12));
                self.payload = if self.command == CMD_READ { self.bytes as usize } else { 0 };
            }
            if self.payload == 0 {
                done.push(self.cookie as u32);
            }
        }
        Ok(())
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        self.out.clear();
        self.head(CMD_DISC, 0, 0, 0);
        let _ = self.socket.write_all(&self.out);
    }
}

impl Engine for NbdClient {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn prepare(&mut self, job: Job) -> Result<()> {
        self.command = if job.op.reads() { CMD_READ } else { CMD_WRITE };
        self.bytes = job.op.bytes();
        Ok(())
    }

    fn submit(&mut self, requests: &[Io]) -> Result<()> {
        self.out.clear();
        for io in requests {
            self.head(self.command, u64::from(io.tag), io.offset, self.bytes);
            if self.command == CMD_WRITE {
                self.out.resize(self.out.len() + self.bytes as usize, 0x5a);
            }
        }
        Ok(self.socket.write_all(&self.out)?)
    }

    fn reap(&mut self, done: &mut Vec<u32>) -> Result<()> {
        let arrived = self.socket.read(&mut self.intake)?;
        ensure!(arrived > 0, "the server has hung up");
        self.digest(arrived, done)
    }
}
