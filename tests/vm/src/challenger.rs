//! A new daemon that asks for everything (`host/cli/src/takeover.rs`), takes it into its hands, and dies: written from the protocol's description.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fd::OwnedFd;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

/// How long it waits for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Descriptors that come with one byte (unix(7), `SCM_MAX_FD`).
const BATCH: usize = 253;

/// What it was given. Dropped, everything is closed, as the kernel does for a process that is killed.
#[derive(Debug)]
pub struct Hands {
    /// Its last message: every binding and what comes with it.
    pub state: Value,
    /// Every descriptor.
    pub descriptors: Vec<OwnedFd>,
    _connection: UnixStream,
}

/// Asks the daemon whose door this is for everything, and gets it. Clients are held until what comes back is dropped, or `deadline` is over.
///
/// # Errors
/// When it gets something else.
pub fn take_everything(door: &Path, deadline: Duration) -> Result<Hands> {
    let mut stream = UnixStream::connect(door).with_context(|| format!("{}", door.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    say(&mut stream, &json!({"says": "hello", "version": 1, "deadline_ms": deadline.as_millis() as u64}))?;
    let (manifest, _) = hear(&mut stream)?;
    ensure!(manifest["says"] == "manifest", "{manifest}");
    say(&mut stream, &json!({"says": "prepared"}))?;
    let (state, descriptors) = hear(&mut stream)?;
    ensure!(state["says"] == "state", "{state}");
    Ok(Hands { state, descriptors, _connection: stream })
}

fn say(stream: &mut UnixStream, message: &Value) -> Result<()> {
    let document = message.to_string().into_bytes();
    let length = u32::try_from(document.len())?.to_le_bytes();
    stream.write_all(&[&b"cfto"[..], &length, &[0; 4], &document].concat())?;
    Ok(())
}

fn hear(stream: &mut UnixStream) -> Result<(Value, Vec<OwnedFd>)> {
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    ensure!(head.starts_with(b"cfto"), "{head:?}");
    let word = |at: usize| head[at..at + 4].iter().rev().fold(0_usize, |word, byte| word << 8 | usize::from(*byte));
    let mut document = vec![0; word(4)];
    stream.read_exact(&mut document)?;
    let mut descriptors = Vec::new();
    while descriptors.len() < word(8) {
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut room);
        let mut byte = [0];
        let got = recvmsg(&*stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes;
        ensure!(got == 1, "it has gone");
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
    }
    Ok((serde_json::from_slice(&document)?, descriptors))
}
