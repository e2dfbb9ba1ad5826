//! A client that says what it likes.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use cofferdam_client::ring::{Rings, Word};
use cofferdam_client::wire::{Complete, Hello, PACKET_MAX_BYTES, Submit, TAG_WAKE, VERSION, Welcome};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::mock::{PATIENCE, Served};

pub(crate) struct Raw {
    pub(crate) socket: OwnedFd,
}

/// A raw client that was let in.
pub(crate) struct Guest {
    pub(crate) raw: Raw,
    pub(crate) welcome: Welcome,
    pub(crate) rings: Rings,
    pub(crate) rings_file: OwnedFd,
    pub(crate) region: OwnedFd,
}

pub(crate) fn hello(entries: u32) -> Hello {
    Hello { version: VERSION, region_bytes: 1 << 16, entries }
}

impl Raw {
    pub(crate) fn new(served: &Served) -> Raw {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(&served.path).unwrap()).unwrap();
        Raw { socket }
    }

    /// Whether it went out; the port may have hung up.
    pub(crate) fn send(&self, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(descriptors.is_empty() || control.push(SendAncillaryMessage::ScmRights(descriptors)));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::sendmsg(&self.socket, &[IoSlice::new(packet)], &mut control, flags).is_ok()
    }

    /// The next packet and its descriptors; empty when the port hung up.
    pub(crate) fn receive(&self) -> (Vec<u8>, Vec<OwnedFd>) {
        let start = Instant::now();
        loop {
            let mut packet = [0; PACKET_MAX_BYTES];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            match rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(&mut packet)], &mut control, flags) {
                Ok(received) => {
                    let mut descriptors = Vec::new();
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(sent) = message {
                            descriptors.extend(sent);
                        }
                    }
                    return (packet[..received.bytes].to_vec(), descriptors);
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNRESET) => {}
                Err(_) => return (Vec::new(), Vec::new()),
            }
            assert!(start.elapsed() < PATIENCE, "waited in vain for a packet");
            let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&Timespec { tv_sec: 1, tv_nsec: 0 }));
        }
    }

    /// The next packet that is not a wake.
    pub(crate) fn receive_news(&self) -> Vec<u8> {
        loop {
            let (packet, _) = self.receive();
            if packet != [TAG_WAKE] {
                return packet;
            }
        }
    }

    pub(crate) fn enter(self, entries: u32) -> Guest {
        assert!(self.send(&hello(entries).encode(), &[]));
        let (packet, descriptors) = self.receive();
        let welcome = Welcome::decode(&packet).expect("a welcome");
        let [region, rings_file] = <[OwnedFd; 2]>::try_from(descriptors).expect("two descriptors");
        let rings = Rings::open(rings_file.as_fd(), entries).expect("rings");
        Guest { raw: self, welcome, rings, rings_file, region }
    }
}

impl Guest {
    pub(crate) fn new(served: &Served, entries: u32) -> Guest {
        Raw::new(served).enter(entries)
    }

    pub(crate) fn wake(&self) {
        self.raw.send(&[TAG_WAKE], &[]);
    }

    /// Puts entries in and wakes the host.
    pub(crate) fn put(&self, entries: &[Submit]) {
        let mut tail = self.rings.load(Word::SubmitTail);
        for entry in entries {
            self.rings.put_submit(tail, entry);
            tail = tail.wrapping_add(1);
        }
        self.rings.store(Word::SubmitTail, tail);
        self.wake();
    }

    /// Takes the next answer.
    pub(crate) fn take(&self) -> Complete {
        let head = self.rings.load(Word::CompleteHead);
        crate::mock::eventually("an answer", || self.rings.load(Word::CompleteTail) != head);
        let answer = self.rings.complete_at(head);
        self.rings.store(Word::CompleteHead, head.wrapping_add(1));
        answer
    }
}
