//! Receiving bytes together with who sent them.
//!
//! `SO_PEERCRED` names the process that called `listen`, which need not be the one that serves (socket activation, a parent that
//! forked). With `SO_PASSCRED` the kernel attaches to every message the process that *sent* it, and that is what the proof of
//! silence needs. rustix can receive that too, but its process id cannot be zero and the kernel's is zero for a sender outside this
//! process-id namespace.

#![allow(unsafe_code)]

use std::io;
use std::mem::{offset_of, size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Room for exactly one credentials message. Descriptors that a peer attaches find no room after it, and the kernel closes them.
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    credentials: libc::ucred,
}

// The kernel puts the payload right behind the header, aligned as a header is: where the struct has it.
// SAFETY: CMSG_LEN and CMSG_SPACE are arithmetic on their argument.
const _: () = unsafe {
    assert!(offset_of!(Control, credentials) == libc::CMSG_LEN(0) as usize);
    assert!(size_of::<Control>() == libc::CMSG_SPACE(size_of::<libc::ucred>() as u32) as usize);
};

/// Receives what is there, at most `into.len()` bytes, without waiting: `(bytes, process id of the sender)`.
///
/// The process id is 0 when the sender is outside this process-id namespace, and `None` when the kernel attached no credentials
/// (end of stream). `socket` must have `SO_PASSCRED` set: without it a peer's descriptors would land in the room meant for credentials.
pub(crate) fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<(usize, Option<i32>)> {
    let mut iov = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: both are plain C structs of integers and pointers, for which all bits zero are a value.
    let (mut control, mut message): (Control, libc::msghdr) = unsafe { (zeroed(), zeroed()) };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `message` names one iovec over `into` and the control buffer with their true lengths; all three outlive the call.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) };
    let bytes = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let attached = message.msg_controllen >= offset_of!(Control, credentials) + size_of::<libc::ucred>()
        && control.header.cmsg_level == libc::SOL_SOCKET
        && control.header.cmsg_type == libc::SCM_CREDENTIALS;
    // At the end of the stream the kernel attaches credentials of nobody.
    Ok((bytes, (attached && bytes > 0).then_some(control.credentials.pid)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_sender_of_a_message_is_known() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_passcred(&ours, true).unwrap();
        theirs.write_all(b"hello").unwrap();
        let mut into = [0; 16];
        let me = i32::try_from(std::process::id()).unwrap();
        assert_eq!(receive(ours.as_fd(), &mut into).unwrap(), (5, Some(me)));
        assert_eq!(receive(ours.as_fd(), &mut into).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(theirs);
        assert_eq!(receive(ours.as_fd(), &mut into).unwrap(), (0, None));
    }

    #[test]
    fn descriptors_that_a_peer_attaches_are_closed() {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let (theirs, ours) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_passcred(&ours, true).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let attached = [writer.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&attached)));
        sendmsg(&theirs, &[io::IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
        drop(writer);
        assert_eq!(receive(ours.as_fd(), &mut [0; 4]).unwrap().0, 1);
        // The last writer of the pipe is gone: the descriptor did not stay open in this process.
        assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0);
    }
}
