//! The other side of a function under test: the kernel's end of a pair, on which a thread sends back what comes.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::thread::JoinHandle;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RawProtocol, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{Protocol, recvfrom, sendto, socket_with, sockopt};

/// A kind of frame that is for experiments (IEEE 802): what the suite sends, and nothing else.
const EXPERIMENTAL: u16 = 0x88b5;

/// Bytes of a port that wait to be sent back, at the most; then nothing more is read.
const MAX_WAITING_BYTES: usize = 1 << 20;

/// What may wait in the kernel in each direction, in bytes: a window of the longest frames many times over, so that none of them is lost here.
const SOCKET_BYTES: usize = 4 << 20;

/// Longest frame, in bytes.
const MAX_FRAME_BYTES: usize = 65_550;

/// The thread; it ends with this.
pub(super) struct Echo {
    /// Hung up, it ends the thread.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Echo {
    /// Of frames, on whichever interface they come: the one at the other end of the cable is the only one that is up.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn of_frames() -> anyhow::Result<Echo> {
        let protocol = RawProtocol::new(u32::from(EXPERIMENTAL.to_be())).map(Protocol::from_raw);
        let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::NONBLOCK, protocol)
            .context("a packet socket")?;
        sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BYTES)?;
        sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BYTES)?;
        Echo::start(move |stop| frames(&socket, &stop))
    }

    /// Of the bytes of a port (`/dev/vport1p1`).
    ///
    /// # Errors
    /// When it cannot be opened, also because somebody else has it open.
    pub(super) fn of_bytes(port: &str) -> anyhow::Result<Echo> {
        let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let port = OpenOptions::new().read(true).write(true).custom_flags(nonblocking).open(port);
        let port = port.context("the other side's port")?;
        Echo::start(move |stop| bytes(port, &stop))
    }

    fn start(work: impl FnOnce(PipeReader) -> anyhow::Result<()> + Send + 'static) -> anyhow::Result<Echo> {
        let (reader, stop) = std::io::pipe()?;
        let thread = std::thread::Builder::new().name("other side".into()).spawn(move || work(reader))?;
        Ok(Echo { stop: Some(stop), thread: Some(thread) })
    }

    /// Ends it; why it had ended before.
    ///
    /// # Errors
    /// The thread's.
    pub(super) fn end(mut self) -> anyhow::Result<()> {
        self.stop = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result.context("the other side"),
            _ => anyhow::bail!("the other side panicked"),
        }
    }
}

fn frames(socket: &OwnedFd, stop: &PipeReader) -> anyhow::Result<()> {
    let mut frame = vec![0; MAX_FRAME_BYTES];
    loop {
        match recvfrom(socket, &mut frame[..], RecvFlags::empty()) {
            // The address says which interface it was.
            Ok((length, _, Some(from))) => match sendto(socket, &frame[..length], SendFlags::empty(), &from) {
                // A card whose queue is full loses frames, as cards do; one that goes down, too.
                Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::NETDOWN | Errno::NXIO) => {}
                Err(error) => return Err(error.into()),
            },
            Ok(_) | Err(Errno::NETDOWN | Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if waits(socket, PollFlags::IN, stop)? {
                    return Ok(());
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn bytes(mut port: File, stop: &PipeReader) -> anyhow::Result<()> {
    let (mut waiting, mut piece) = (VecDeque::new(), vec![0; 32 << 10]);
    loop {
        let mut moved = 0;
        if waiting.len() < MAX_WAITING_BYTES {
            let read = unless_blocked(port.read(&mut piece))?;
            waiting.extend(&piece[..read]);
            moved += read;
        }
        let (front, _) = waiting.as_slices();
        if !front.is_empty() {
            let written = unless_blocked(port.write(front))?;
            waiting.drain(..written);
            moved += written;
        }
        let reads = if waiting.len() < MAX_WAITING_BYTES { PollFlags::IN } else { PollFlags::empty() };
        let writes = if waiting.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        if moved == 0 && waits(&port, reads | writes, stop)? {
            return Ok(());
        }
    }
}

fn unless_blocked(result: std::io::Result<usize>) -> std::io::Result<usize> {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        other => other,
    }
}

/// Sleeps until there is something to do; whether that is to stop.
fn waits(on: impl AsFd, flags: PollFlags, stop: &PipeReader) -> anyhow::Result<bool> {
    let mut fds = [PollFd::from_borrowed_fd(on.as_fd(), flags), PollFd::new(stop, PollFlags::IN)];
    match poll(&mut fds, None) {
        Ok(_) => Ok(!fds[1].revents().is_empty()),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
