//! From a path to two descriptors and a geometry.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType,
};

use crate::error::Error;
use crate::ring::is_ring_size;
use crate::wire::{Hello, PACKET_MAX_BYTES, PAGE_BYTES, Refusal, Refused, TAG_VIOLATION, VERSION, Welcome};

/// What a client asks for.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bytes of memory for its requests, a multiple of 4,096. The binding's bound is 256 MiB for all clients unless the operator says otherwise.
    pub region_bytes: u64,
    /// Requests that may be unanswered: a power of two up to 1,024.
    pub entries: u32,
    /// How long the host may take to answer the hello. It talks to the device meanwhile.
    pub timeout: Duration,
}

impl Default for Options {
    /// 1 MiB, 128 entries, 10 seconds.
    fn default() -> Options {
        Options { region_bytes: 1 << 20, entries: 128, timeout: Duration::from_secs(10) }
    }
}

/// What a welcome brings.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) socket: OwnedFd,
    pub(crate) welcome: Welcome,
    pub(crate) region: OwnedFd,
    pub(crate) rings: OwnedFd,
}

pub(crate) fn connect(path: &Path, options: &Options) -> Result<Connected, Error> {
    if options.region_bytes == 0 || !options.region_bytes.is_multiple_of(PAGE_BYTES) {
        return Err(Error::Options("a region is a multiple of 4,096 bytes".to_owned()));
    }
    if !is_ring_size(options.entries) {
        return Err(Error::Options("a ring has a power of two of entries, up to 1,024".to_owned()));
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(Error::io("socket"))?;
    let failed = |source: Errno| Error::Connect { path: path.to_owned(), source: source.into() };
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    match rustix::net::connect(&socket, &address) {
        // The backlog is full.
        Err(Errno::AGAIN) => return Err(Error::Busy("too many clients are connecting".to_owned())),
        result => result.map_err(failed)?,
    }
    let hello = Hello { version: VERSION, region_bytes: options.region_bytes, entries: options.entries }.encode();
    let sent = rustix::net::sendmsg(
        &socket,
        &[IoSlice::new(&hello)],
        &mut SendAncillaryBuffer::default(),
        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    );
    match sent {
        // It may have been turned away already, and the reason is there to be read.
        Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => {}
        Err(error) => return Err(Error::io("sendmsg")(error)),
    }
    let deadline = Instant::now() + options.timeout.min(Duration::from_secs(86_400));
    loop {
        let mut packet = [0; PACKET_MAX_BYTES];
        if let Some((length, descriptors)) = receive(&socket, &mut packet)? {
            let (welcome, region, rings) = judge(packet.get(..length).unwrap_or_default(), descriptors, options)?;
            return Ok(Connected { socket, welcome, region, rings });
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::TimedOut);
        }
        let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        // EINTR leads to another look.
        let _ = poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&left));
    }
}

/// One packet with up to two descriptors, if there is one.
fn receive(socket: &OwnedFd, packet: &mut [u8]) -> Result<Option<(usize, Vec<OwnedFd>)>, Error> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = match rustix::net::recvmsg(socket.as_fd(), &mut [IoSliceMut::new(packet)], &mut control, flags) {
        // Reset: the host closed without reading the hello. That is said once; behind it is what it had to say, or a hang-up.
        Err(Errno::AGAIN | Errno::INTR | Errno::CONNRESET) => return Ok(None),
        result => result.map_err(Error::io("recvmsg"))?,
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(sent) = message {
            descriptors.extend(sent);
        }
    }
    Ok(Some((received.bytes, descriptors)))
}

fn judge(packet: &[u8], descriptors: Vec<OwnedFd>, options: &Options) -> Result<(Welcome, OwnedFd, OwnedFd), Error> {
    if packet.is_empty() {
        return Err(Error::Revoked);
    }
    if packet == [TAG_VIOLATION] {
        return Err(Error::Protocol("the host says that this client broke the protocol"));
    }
    if let Some(Refused { reason, text }) = Refused::decode(packet) {
        return Err(match reason {
            Refusal::Busy => Error::Busy(text),
            Refusal::Revoked => Error::Revoked,
            Refusal::Unsupported => Error::Unsupported(text),
            Refusal::Version => Error::Version(text),
            Refusal::Size => Error::Options(text),
            Refusal::NotAllowed => Error::NotAllowed(text),
            Refusal::Malformed => Error::Protocol("the host did not understand the hello"),
            Refusal::Host => Error::Host(text),
        });
    }
    let welcome = Welcome::decode(packet).ok_or(Error::Protocol("neither welcome nor refusal"))?;
    if welcome.region_bytes != options.region_bytes || welcome.entries != options.entries {
        return Err(Error::Protocol("the welcome is for something else than what was asked for"));
    }
    let [region, rings] =
        <[OwnedFd; 2]>::try_from(descriptors).map_err(|_| Error::Protocol("a welcome without its descriptors"))?;
    Ok((welcome, region, rings))
}
