//! The same pipe or terminal in another process (see [`cofferdam_manager::Port::export`]): it stays open, so that whoever reads it or types into it sees a pause.
//!
//! ```text
//! thread    parking: asks the device for nothing and reads nothing of its line; waits for the answers of what the device has
//! export    entropy: the pipe. Random bytes that it holds and that nobody has read are given up: others are as good
//!           stream:  terminal and watch, what has arrived and the line has not, what was read of the line and the device has not, and what either was told of the other
//! ```
//!
//! Descriptors: those of the sink or the line; of a stream then a file with the bytes for the line and those for the device, one behind the other.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use cofferdam_manager::{Exported, NotExportable};
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};

use crate::error::CharacterError;

/// [`Exported::kind`] of these ports.
pub const KIND: &str = "character";

/// Most bytes that are taken over for a line: the posted buffers that a port of a console may have (`wit/stream.wit`), each of 64 KiB.
const MAX_LINE_BYTES: u32 = 64 << 20;
/// Most bytes for a device: one write.
const MAX_DEVICE_BYTES: u32 = 1 << 20;

/// What a thread that stands says of what it has.
#[derive(Debug, Default)]
pub(crate) struct Said {
    /// Of its sink, or its line.
    pub(crate) descriptors: Vec<OwnedFd>,
    pub(crate) stream: Option<(StreamState, Bytes)>,
}

/// Bytes on their way, in neither the device nor the line.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Bytes {
    pub(crate) for_line: Vec<u8>,
    pub(crate) for_device: Vec<u8>,
}

/// A stream's part of the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StreamState {
    /// Name of the terminal.
    pub(crate) terminal: PathBuf,
    pub(crate) lane: usize,
    /// What the device was told of the line.
    pub(crate) told: Option<bool>,
    /// The device has the port.
    pub(crate) plugged: bool,
    pub(crate) size: Option<(u16, u16)>,
    /// Somebody is at the line's other end.
    pub(crate) there: bool,
    pub(crate) hung_up: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PortState {
    address: String,
    /// Device and inode of the file at its path.
    file: Option<(u64, u64)>,
    stream: Option<StreamState>,
    line_bytes: u32,
    device_bytes: u32,
}

/// What another process exported, sorted.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) address: String,
    pub(crate) file: Option<(u64, u64)>,
    /// Of the sink, or the line.
    pub(crate) descriptors: Vec<OwnedFd>,
    pub(crate) stream: Option<(StreamState, Bytes)>,
}

pub(crate) fn because(error: impl std::fmt::Display) -> NotExportable {
    NotExportable::because(error.to_string())
}

impl Said {
    pub(crate) fn export(self, address: String, file: Option<(u64, u64)>) -> Result<Exported, NotExportable> {
        let Said { mut descriptors, stream } = self;
        let mut state = PortState { address, file, stream: None, line_bytes: 0, device_bytes: 0 };
        if let Some((stream, Bytes { for_line, for_device })) = stream {
            let blob = rustix::fs::memfd_create("cofferdam-character-handover", MemfdFlags::CLOEXEC);
            let mut blob = File::from(blob.map_err(because)?);
            blob.write_all(&for_line).and_then(|()| blob.write_all(&for_device)).map_err(because)?;
            descriptors.push(blob.into());
            state.stream = Some(stream);
            state.line_bytes = u32::try_from(for_line.len()).map_err(because)?;
            state.device_bytes = u32::try_from(for_device.len()).map_err(because)?;
        }
        let state = serde_json::to_string(&state).map_err(because)?;
        Ok(Exported { kind: KIND.to_owned(), state, descriptors })
    }
}

impl Received {
    pub(crate) fn sort(exported: Exported) -> Result<Received, CharacterError> {
        let wrong = |why: String| CharacterError::wrong(why);
        let Exported { kind, state, mut descriptors } = exported;
        if kind != KIND {
            return Err(wrong(format!("a port of kind {kind:?}")));
        }
        let state: PortState = serde_json::from_str(&state).map_err(CharacterError::wrong)?;
        let PortState { address, file, stream, line_bytes, device_bytes } = state;
        let Some(stream) = stream else { return Ok(Received { address, file, descriptors, stream: None }) };
        let blob = descriptors.pop().ok_or_else(|| wrong("a descriptor is missing".to_owned()))?;
        let there = rustix::fs::fstat(&blob).map_err(CharacterError::wrong)?.st_size;
        let total = i64::from(line_bytes) + i64::from(device_bytes);
        if line_bytes > MAX_LINE_BYTES || device_bytes > MAX_DEVICE_BYTES || there != total {
            return Err(wrong(format!("{there} bytes in place of {total}")));
        }
        let bytes = read(blob, line_bytes as usize, device_bytes as usize).map_err(CharacterError::wrong)?;
        Ok(Received { address, file, descriptors, stream: Some((stream, bytes)) })
    }
}

fn read(blob: OwnedFd, line: usize, device: usize) -> io::Result<Bytes> {
    // The place in it is shared with whoever wrote it.
    rustix::fs::seek(&blob, rustix::fs::SeekFrom::Start(0))?;
    let mut blob = File::from(blob);
    let mut some = |bytes: usize| {
        let mut into = vec![0; bytes];
        blob.read_exact(&mut into).map(|()| into)
    };
    Ok(Bytes { for_line: some(line)?, for_device: some(device)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exported() -> Exported {
        let stream = StreamState {
            terminal: "/dev/pts/7".into(),
            lane: 1,
            told: Some(true),
            plugged: true,
            size: None,
            there: true,
            hung_up: false,
        };
        let bytes = Bytes { for_line: b"line".to_vec(), for_device: b"device".to_vec() };
        let said = Said { descriptors: Vec::new(), stream: Some((stream, bytes)) };
        said.export("pty:/a".into(), Some((1, 2))).unwrap()
    }

    #[test]
    fn bytes_on_their_way_arrive_apart_and_what_is_no_state_is_an_error() {
        let received = Received::sort(exported()).unwrap();
        let (stream, bytes) = received.stream.unwrap();
        assert_eq!((received.file, stream.lane, received.descriptors.len()), (Some((1, 2)), 1, 0));
        assert_eq!((&bytes.for_line[..], &bytes.for_device[..]), (&b"line"[..], &b"device"[..]));
        type Change = fn(&mut Exported);
        let changes: [Change; 5] = [
            |exported| exported.kind = "nbd".into(),
            |exported| exported.state.truncate(10),
            |exported| drop(exported.descriptors.pop()),
            |exported| exported.state = exported.state.replace("\"line_bytes\":4", "\"line_bytes\":5"),
            |exported| exported.state = exported.state.replace("\"line_bytes\":4", "\"line_bytes\":4000000000"),
        ];
        for (number, change) in changes.iter().enumerate() {
            let mut exported = exported();
            change(&mut exported);
            assert!(Received::sort(exported).is_err(), "change {number}");
        }
    }
}
