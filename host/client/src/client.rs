//! Submitting, polling, waiting.
//!
//! Every request that was taken by [`Client::submit`] is answered exactly once by [`Client::poll`] or [`Client::wait`], whatever becomes of the host: the client keeps
//! a table of what is outstanding, the host names only places in it, and at the end the rest is answered with [`Status::Shutdown`].

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::connect::{Connected, Options, connect};
use crate::error::Error;
use crate::mapping::Mapping;
use crate::memory::{Memory, Slot};
use crate::ring::{LIVE, Rings, WAKE_ON_ROOM, WAKE_ON_SUBMIT, Word};
use crate::wire::{
    FLAG_MAY_UNMAP, Geometry, Op, PACKET_MAX_BYTES, Status, Submit, TAG_REVOKED, TAG_VIOLATION, TAG_WAKE,
};

/// Polls in a row that find nothing, until one looks whether the host is still there: that costs a system call.
const POLLS_PER_LOOK: u32 = 1024;

/// One operation.
#[derive(Debug)]
pub struct Request {
    /// The caller's own name for it, given back in the [`Completion`].
    pub user: u64,
    /// What to do.
    pub op: Op,
    /// First byte on the medium, a multiple of the logical block.
    pub offset: u64,
    /// Bytes of payload or of the range; 0 for flush.
    pub length: u32,
    /// Write-zeroes only: the range may be deallocated.
    pub may_unmap: bool,
    /// Read, write, get-id: at least `length` bytes of this client's memory.
    pub slot: Option<Slot>,
}

/// The answer to one [`Request`].
#[derive(Debug)]
pub struct Completion {
    /// The request's.
    pub user: u64,
    /// How it ended; the error is never [`Status::Ok`].
    pub result: Result<(), Status>,
    /// The request's. After a failed read its contents mean nothing.
    pub slot: Option<Slot>,
}

/// Why nothing more comes of a client.
#[derive(Clone, Copy, Debug)]
enum End {
    Revoked,
    Protocol(&'static str),
}

impl From<End> for Error {
    fn from(end: End) -> Error {
        match end {
            End::Revoked => Error::Revoked,
            End::Protocol(why) => Error::Protocol(why),
        }
    }
}

/// A connection to a data socket. One thread at a time uses it.
#[derive(Debug)]
pub struct Client {
    /// `None` when it is over: so the host knows that it need not wait for this client to take its answers.
    socket: Option<OwnedFd>,
    rings: Arc<Rings>,
    memory: Arc<Memory>,
    geometry: Geometry,
    handle: u64,
    /// What is outstanding; an entry's `user` on the wire is its place here.
    table: Vec<Option<(u64, Option<Slot>)>>,
    free: Vec<u32>,
    submit_tail: u32,
    complete_head: u32,
    empty_polls: u32,
    end: Option<End>,
}

impl Client {
    /// Connects to the data socket at `path` and is given memory.
    ///
    /// # Errors
    /// [`Error`], by kind.
    pub fn connect(path: impl AsRef<Path>, options: Options) -> Result<Client, Error> {
        let Connected { socket, welcome, region, rings } = connect(path.as_ref(), &options)?;
        let mapped = |source| Error::Io { what: "mapping the host's memory", source };
        let rings = Arc::new(Rings::open(rings.as_fd(), welcome.entries).map_err(mapped)?);
        let bytes = usize::try_from(welcome.region_bytes).map_err(|_| Error::Options("too large".to_owned()))?;
        let region = Mapping::new(region.as_fd(), bytes).map_err(mapped)?;
        let memory = Arc::new(Memory::new(region, welcome.region_bytes, Arc::clone(&rings)));
        Ok(Client {
            socket: Some(socket),
            rings,
            memory,
            geometry: welcome.geometry,
            handle: welcome.handle,
            table: (0..welcome.entries).map(|_| None).collect(),
            free: (0..welcome.entries).rev().collect(),
            submit_tail: 0,
            complete_head: 0,
            empty_polls: 0,
            end: None,
        })
    }

    /// What the device can do.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The number by which `cofferdam handles` knows this client.
    #[must_use]
    pub fn handle(&self) -> u64 {
        self.handle
    }

    /// Requests that were submitted and whose answers were not given out yet.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.table.len() - self.free.len()
    }

    /// Whether nothing more will be taken. What is outstanding is still to be fetched with [`Client::poll`].
    #[must_use]
    pub fn is_revoked(&self) -> bool {
        self.end.is_some() || self.rings.load(Word::State) != LIVE
    }

    /// Takes `bytes` bytes of the region, in whole pages.
    ///
    /// # Errors
    /// [`Error::NoMemory`] until a slot that is long enough comes back.
    pub fn slot(&self, bytes: u32) -> Result<Slot, Error> {
        self.memory.slot(bytes)
    }

    /// Submits requests from the front of `requests`, in order. What was taken is gone from the vector and is answered exactly once; what is left was not looked at, or
    /// is the one that the error is about.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::OutOfRange`] for a request whose slot does not fit, [`Error::Revoked`], [`Error::Protocol`].
    pub fn submit(&mut self, requests: &mut Vec<Request>) -> Result<(), Error> {
        if let Some(end) = self.end {
            return Err(end.into());
        }
        if self.rings.load(Word::State) != LIVE {
            return Err(Error::Revoked);
        }
        let (mut taken, mut stop) = (0, None);
        for request in requests.iter_mut() {
            let fits = match &request.slot {
                Some(slot) => slot.is_of(&self.memory) && request.length <= slot.len(),
                None => !request.op.has_payload(),
            };
            if !fits {
                stop = Some(Error::OutOfRange("the request's slot is missing, too short or another client's"));
                break;
            }
            let Some(place) = self.free.pop() else {
                stop = Some(Error::Full);
                break;
            };
            let slot = request.slot.take();
            let entry = Submit {
                user: place.into(),
                offset: request.offset,
                memory_offset: slot.as_ref().map_or(0, Slot::offset),
                length: request.length,
                op: request.op as u16,
                flags: if request.may_unmap { FLAG_MAY_UNMAP } else { 0 },
            };
            self.rings.put_submit(self.submit_tail, &entry);
            self.submit_tail = self.submit_tail.wrapping_add(1);
            if let Some(row) = self.table.get_mut(place as usize) {
                *row = Some((request.user, slot));
            }
            taken += 1;
        }
        requests.drain(..taken);
        if taken > 0 {
            self.rings.store(Word::SubmitTail, self.submit_tail);
            if self.rings.must_wake(Word::HostSleeps, WAKE_ON_SUBMIT) {
                self.wake();
            }
        }
        stop.map_or(Ok(()), Err)
    }

    /// Takes what was answered, without waiting. Returns how much that was.
    ///
    /// # Errors
    /// [`Error::Revoked`] and [`Error::Protocol`], after everything that was outstanding has been given out.
    pub fn poll(&mut self, out: &mut Vec<Completion>) -> Result<usize, Error> {
        let mut found = self.reap(out);
        if found == 0 && self.end.is_none() {
            self.empty_polls += 1;
            if self.empty_polls >= POLLS_PER_LOOK {
                self.empty_polls = 0;
                found = self.look(out);
            }
        }
        match self.end {
            _ if found > 0 => Ok(found),
            None => Ok(0),
            Some(end) => {
                found = self.fail_rest(out);
                if found > 0 { Ok(found) } else { Err(end.into()) }
            }
        }
    }

    /// Takes what was answered, and sleeps for at most `timeout` if there is nothing yet. Returns how much that was; 0 after the time-out. With nothing
    /// outstanding it sleeps until the disk is taken away.
    ///
    /// # Errors
    /// As [`Client::poll`].
    pub fn wait(&mut self, timeout: Duration, out: &mut Vec<Completion>) -> Result<usize, Error> {
        let start = Instant::now();
        loop {
            let found = self.poll(out)?;
            let left = timeout.saturating_sub(start.elapsed());
            if found > 0 || left.is_zero() {
                return Ok(found);
            }
            // Partner: the host stores the tail, then looks whether somebody sleeps.
            self.rings.arm(Word::ClientSleeps, 1);
            let mut found = self.reap(out);
            if found == 0
                && let Some(socket) = &self.socket
            {
                let left =
                    Timespec { tv_sec: left.as_secs().min(86_400).cast_signed(), tv_nsec: left.subsec_nanos().into() };
                // EINTR and spurious returns lead to another look.
                let _ = poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left));
            }
            self.rings.store(Word::ClientSleeps, 0);
            found += self.look(out);
            if found > 0 {
                return Ok(found);
            }
        }
    }

    /// Fetches answers from the ring. The host is not trusted with more than its word: whatever is there, every place is answered once.
    fn reap(&mut self, out: &mut Vec<Completion>) -> usize {
        if self.end.is_some() {
            return 0;
        }
        let tail = self.rings.load(Word::CompleteTail);
        let ready = tail.wrapping_sub(self.complete_head);
        if ready == 0 {
            return 0;
        }
        if ready > self.rings.entries() {
            self.violated("the complete ring's tail is impossible");
            return 0;
        }
        let mut found = 0;
        for _ in 0..ready {
            let entry = self.rings.complete_at(self.complete_head);
            if entry.status == 0 {
                // Zeroes where an answer was announced.
                self.violated("an answer without a status");
                break;
            }
            let place = usize::try_from(entry.user).unwrap_or(usize::MAX);
            let Some((user, slot)) = self.table.get_mut(place).and_then(Option::take) else {
                self.violated("an answer to what was not asked");
                break;
            };
            self.free.push(place as u32);
            self.complete_head = self.complete_head.wrapping_add(1);
            let result = match Status::from_wire(entry.status) {
                Some(Status::Ok) => Ok(()),
                Some(status) => Err(status),
                // Of a later version: an error in any case.
                None => Err(Status::Io),
            };
            out.push(Completion { user, result, slot });
            found += 1;
        }
        self.empty_polls = 0;
        self.rings.store(Word::CompleteHead, self.complete_head);
        if self.end.is_none() && self.rings.must_wake(Word::HostSleeps, WAKE_ON_ROOM) {
            self.wake();
        }
        found
    }

    /// Answers what nobody will answer any more.
    fn fail_rest(&mut self, out: &mut Vec<Completion>) -> usize {
        let mut found = 0;
        for (place, row) in self.table.iter_mut().enumerate() {
            if let Some((user, slot)) = row.take() {
                self.free.push(place as u32);
                out.push(Completion { user, result: Err(Status::Shutdown), slot });
                found += 1;
            }
        }
        found
    }

    /// Reads packets until there are none; whether the host says that it is over.
    fn read_socket(&mut self) -> Option<End> {
        let socket = self.socket.as_ref()?;
        loop {
            let mut packet = [0; PACKET_MAX_BYTES];
            // Without a control buffer the kernel closes whatever descriptors come along.
            let length = match rustix::net::recv(socket, &mut packet, RecvFlags::DONTWAIT) {
                Ok((_, length)) => length,
                Err(Errno::AGAIN) => return None,
                // Reset: the host closed with wakes unread. That is said once, before its own last packets.
                Err(Errno::INTR | Errno::CONNRESET) => continue,
                Err(_) => 0,
            };
            match packet.get(..length) {
                Some([TAG_WAKE]) => {}
                Some([TAG_VIOLATION]) => {
                    return Some(End::Protocol("the host says that this client broke the protocol"));
                }
                Some([] | [TAG_REVOKED]) => return Some(End::Revoked),
                _ => return Some(End::Protocol("an unknown packet")),
            }
        }
    }

    /// Looks at the socket. If it is over, what was answered before that still counts.
    fn look(&mut self, out: &mut Vec<Completion>) -> usize {
        let Some(end) = self.read_socket() else { return 0 };
        let found = self.reap(out);
        self.over(end);
        found
    }

    /// The ring makes no sense: because it was taken away, or because the host is wrong.
    fn violated(&mut self, why: &'static str) {
        let live = self.rings.load(Word::State) == LIVE;
        self.over(if live { End::Protocol(why) } else { End::Revoked });
    }

    fn over(&mut self, end: End) {
        self.end.get_or_insert(end);
        self.socket = None;
    }

    fn wake(&self) {
        if let Some(socket) = &self.socket {
            // A full socket has wakes in it that were not read yet. A lost host is noticed when the socket is read.
            let _ = rustix::net::send(socket, &[TAG_WAKE], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }
}
