//! Packets, in and out. Nothing here waits, and nothing that a client sends beside its bytes gets in.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use cofferdam_client::wire::PACKET_MAX_BYTES;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

/// What was in the socket.
#[derive(Debug)]
pub(crate) enum Received<'a> {
    Nothing,
    Packet(&'a [u8]),
    TooLong,
    /// Hung up, or a packet of no bytes, which cannot be told apart.
    Gone,
}

/// Takes one packet.
///
/// There is no control buffer, so the kernel closes the descriptors that came along before this returns: none ever has a number in this process, and no
/// ancillary data can be truncated half-way.
pub(crate) fn receive<'a>(socket: BorrowedFd<'_>, packet: &'a mut [u8; PACKET_MAX_BYTES]) -> Received<'a> {
    let length = match rustix::net::recv(socket, &mut packet[..], RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
        // With TRUNC the number is the packet's whole length.
        Ok((_, length)) => length,
        Err(Errno::AGAIN | Errno::INTR) => return Received::Nothing,
        Err(_) => return Received::Gone,
    };
    match packet.get(..length) {
        Some([]) => Received::Gone,
        Some(packet) => Received::Packet(packet),
        None => Received::TooLong,
    }
}

/// Sends a packet if the socket takes it now. Whether it did: a client that does not read is not waited for.
pub(crate) fn send(socket: BorrowedFd<'_>, packet: &[u8]) -> bool {
    rustix::net::send(socket, packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok()
}

/// Sends a packet with two descriptors; the caller's stay its own.
pub(crate) fn send_with(socket: BorrowedFd<'_>, packet: &[u8], region: &OwnedFd, rings: BorrowedFd<'_>) -> bool {
    use std::os::fd::AsFd;
    let descriptors = [region.as_fd(), rings];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors))
        && rustix::net::sendmsg(
            socket,
            &[IoSlice::new(packet)],
            &mut control,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        )
        .is_ok()
}
