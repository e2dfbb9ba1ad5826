//! A client's revocable right to operate on a binding.
//!
//! ```text
//! open -> submit/poll ... -> (revoked by the ladder: every call answers `Revoked`) -> close
//!                         \-> close by drop: infallible, waits for nothing
//! ```
//!
//! What was submitted through a handle that was closed still completes; its answers are thrown away and its buffers go back to the arena.

mod patience;
mod wait;

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use cofferdam_device::Buffer;
pub use cofferdam_gate::HandleState;
use cofferdam_gate::{Cancel, DrainError, Guards, HandleError, HandleRefused, Notify};
use cofferdam_runtime::clean;
use parking_lot::Mutex;

use crate::arrival::Arrivals;
use crate::binding::Binding;
use crate::block::BlockGeometry;
use crate::error::{LeaseError, OpenError, SubmitError};
pub use crate::handle::patience::Patience;
use crate::lane::Lane;
use crate::mapped::{Regions, Share};
use crate::offer::Offer;
use crate::request::{Completion, IoRequest};

/// What a client says of itself when it opens a handle.
#[derive(Clone, Debug, Default)]
pub struct HandleSpec {
    /// What kind of client this is, for `ls` and `handles`: `nbd:/run/a.sock`, `in-process`.
    pub label: String,
    /// Who is at the other end, in the port's words.
    pub peer: String,
    /// The lane that serves it, below [`Binding::lanes`].
    pub lane: usize,
    /// Whether this client takes what arrives on the lane ([`Handle::receive`]); one at a time does.
    pub receives: bool,
    /// Signalled whenever the client should call [`Handle::poll`] or look at [`Handle::state`]. Clients that share one (a port's worker) poll all
    /// their handles when it is signalled. With `None` the handle makes its own, which hangs up for ever at revocation.
    pub notify: Option<Arc<Notify>>,
}

/// Longest label and peer, in bytes: they are shown to operators, and what is in them may be a client's.
const LABEL_BYTES: usize = 256;

/// Answers that a client may leave unfetched before nothing more of it is admitted.
const BACKLOG: u32 = 4096;

/// The part of a handle that the lane and the ladder know.
pub(crate) struct HandleShared {
    pub(crate) id: u64,
    pub(crate) label: String,
    pub(crate) peer: String,
    pub(crate) lane: usize,
    pub(crate) opened: Instant,
    pub(crate) notify: Arc<Notify>,
    /// The notify is this handle's alone, so revocation may hang it up.
    own_notify: bool,
    /// The right itself: admission, revocation and the count of this handle's operations are the gate's.
    right: cofferdam_gate::Handle,
    /// The client is gone.
    closed: AtomicBool,
    /// Requests that are not answered. Written under the lease of the handle's lane alone, so a load and a store do where others need a locked addition.
    pub(crate) in_flight: AtomicU32,
    /// Requests that were admitted; written as `in_flight` is.
    pub(crate) requests: AtomicU64,
    /// Answers that another thread reaped, or of requests that were invalid. Bounded: [`BACKLOG`] of them and no more is admitted.
    answers: Mutex<Vec<Completion>>,
    /// Length of `answers`, so that the common poll takes no lock.
    waiting: AtomicU32,
    /// Its next flush is to fail: writes that were acknowledged may be lost.
    owes_flush_error: AtomicBool,
    /// Its one region is there or being made.
    mapping: AtomicBool,
    mapped: OnceLock<Arc<Share>>,
}

impl HandleShared {
    /// Puts an answer where the handle's client will find it; the caller signals `notify` once per batch.
    pub(crate) fn deliver(&self, completion: Completion) {
        if self.closed.load(Ordering::Acquire) {
            // Nobody will fetch it: its buffer goes back now.
            return;
        }
        let mut answers = self.answers.lock();
        answers.push(completion);
        self.waiting.store(answers.len() as u32, Ordering::Release);
    }

    fn take_answers(&self, out: &mut Vec<Completion>) -> usize {
        if self.waiting.load(Ordering::Acquire) == 0 {
            return 0;
        }
        let mut answers = self.answers.lock();
        let count = answers.len();
        out.append(&mut answers);
        self.waiting.store(0, Ordering::Release);
        count
    }

    /// So many more are in flight. Only under the lane's lease.
    #[inline]
    pub(crate) fn count_in(&self, count: u32) {
        self.in_flight.store(self.in_flight.load(Ordering::Relaxed) + count, Ordering::Relaxed);
        self.requests.store(self.requests.load(Ordering::Relaxed) + u64::from(count), Ordering::Relaxed);
    }

    /// So many less are. Only under the lane's lease.
    #[inline]
    pub(crate) fn count_out(&self, count: u32) {
        // Release: who reads 0 sees all that was done for the requests that are over; earlier holders of the lease are before this one.
        self.in_flight.store(self.in_flight.load(Ordering::Relaxed).saturating_sub(count), Ordering::Release);
    }

    /// The one look that admits operations (G1): all of them or none.
    pub(crate) fn admit(&self, count: u32) -> Result<Guards, HandleRefused> {
        self.right.admit_many(count)
    }

    /// Whether the client has left so many answers unfetched that nothing more is taken from it.
    pub(crate) fn is_choked(&self) -> bool {
        self.waiting.load(Ordering::Acquire) >= BACKLOG
    }

    pub(crate) fn state(&self) -> HandleState {
        self.right.state()
    }

    /// Ends this handle's right alone; whether this call did it. The client is told.
    pub(crate) fn revoke(&self) -> bool {
        let did = self.right.revoke();
        self.announce_revocation();
        did
    }

    /// Waits until what was admitted through this handle is answered, at most until `deadline`. Whether that could be waited for.
    pub(crate) fn drain(&self, deadline: Instant) -> bool {
        matches!(self.right.drain(Some(deadline), &Cancel::new()), Ok(()) | Err(DrainError::Deadline { .. }))
    }

    /// Tells the client that its right has ended. A notify of its own was hung up by the gate already.
    pub(crate) fn announce_revocation(&self) {
        if !self.own_notify {
            self.notify.signal();
        }
        if let Some(mapped) = self.mapped.get() {
            mapped.wake();
        }
    }

    /// The right by itself, for what outlives the handle.
    pub(crate) fn right(&self) -> cofferdam_gate::Handle {
        self.right
    }

    /// Whether a request of this handle may use `buffer` although it is no lease of the lane's arena.
    pub(crate) fn owns_window(&self, buffer: &Buffer) -> bool {
        self.mapped.get().is_some_and(|mapped| mapped.owns(buffer))
    }

    /// Its next flush is to fail.
    pub(crate) fn owe_flush_error(&self) {
        self.owes_flush_error.store(true, Ordering::Release);
    }

    /// Whether its next flush is to fail.
    pub(crate) fn owes_flush_error(&self) -> bool {
        self.owes_flush_error.load(Ordering::Acquire)
    }

    /// Whether a flush is to fail; the next one is not.
    pub(crate) fn take_flush_error(&self) -> bool {
        self.owes_flush_error.swap(false, Ordering::AcqRel)
    }

    /// Takes the one chance to map a region; false when it is taken.
    pub(crate) fn claim_mapping(&self) -> bool {
        !self.mapping.swap(true, Ordering::AcqRel)
    }

    /// Nothing came of it: another try may be made.
    pub(crate) fn unclaim_mapping(&self) {
        self.mapping.store(false, Ordering::Release);
    }

    /// Whether a region is this handle's.
    pub(crate) fn has_mapped(&self) -> bool {
        self.mapped.get().is_some()
    }

    /// From here on requests may use windows of the region.
    pub(crate) fn set_mapped(&self, share: &Arc<Share>) -> bool {
        self.mapped.set(Arc::clone(share)).is_ok()
    }
}

/// An open handle. `Send`, used by one thread at a time; open one per client.
pub struct Handle {
    shared: Arc<HandleShared>,
    lane: Arc<Lane>,
    binding: Arc<Binding>,
    /// As it was when the handle was opened.
    offer: Arc<Offer>,
    /// It takes what arrives.
    receives: bool,
    patience: Patience,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").field("id", &self.shared.id).field("state", &self.state()).finish()
    }
}

impl Handle {
    pub(crate) fn new(
        binding: Arc<Binding>,
        lane: Arc<Lane>,
        id: u64,
        spec: HandleSpec,
    ) -> Result<(Handle, Arc<HandleShared>), OpenError> {
        let offer = binding.offer().ok_or(OpenError::Revoked)?;
        let own_notify = spec.notify.is_none();
        let notify = match spec.notify {
            Some(notify) => notify,
            None => Notify::new().map_err(|error| OpenError::Host(error.to_string()))?,
        };
        let receives = spec.receives;
        if receives && !lane.claim_receiver(id) {
            return Err(OpenError::Taken(spec.lane));
        }
        // From here on whoever leaves lets go of it.
        let claim = Receiver(receives.then(|| (Arc::clone(&lane), id)));
        let right =
            binding.gate().open_handle(own_notify.then(|| Arc::clone(&notify))).map_err(|error| match error {
                HandleError::Full { capacity } => OpenError::TooMany(capacity as usize),
                _ => OpenError::Revoked,
            })?;
        let shared = Arc::new(HandleShared {
            id,
            label: clean(&spec.label, LABEL_BYTES),
            peer: clean(&spec.peer, LABEL_BYTES),
            lane: spec.lane,
            opened: Instant::now(),
            notify,
            own_notify,
            right,
            closed: AtomicBool::new(false),
            in_flight: AtomicU32::new(0),
            requests: AtomicU64::new(0),
            answers: Mutex::new(Vec::new()),
            waiting: AtomicU32::new(0),
            owes_flush_error: AtomicBool::new(false),
            mapping: AtomicBool::new(false),
            mapped: OnceLock::new(),
        });
        let patience = Patience::new(Patience::DEFAULT);
        claim.keep();
        Ok((Handle { shared: Arc::clone(&shared), lane, binding, offer, receives, patience }, shared))
    }

    /// What [`Handle::map`] works with.
    pub(crate) fn for_mapping(&self) -> (&Arc<HandleShared>, &Arc<Lane>, &Regions) {
        (&self.shared, &self.lane, self.binding.regions())
    }

    /// The number that `handles` shows.
    pub fn id(&self) -> u64 {
        self.shared.id
    }

    /// What the device could do when the handle was opened. Should its configuration change, requests are checked against what it can do then, and a handle that is opened
    /// afterwards says that ([`Binding::offer`]).
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// The same of a disk; of another device, what no disk can do.
    pub fn geometry(&self) -> &BlockGeometry {
        self.offer.block().unwrap_or(&BlockGeometry::NONE)
    }

    /// Whether the handle may operate. Takes no lock.
    pub fn state(&self) -> HandleState {
        self.shared.state()
    }

    /// Borrows `bytes` of the binding's DMA memory. Dropping the buffer gives it back; after the binding is gone it reaches nothing.
    ///
    /// # Errors
    /// [`LeaseError`]; `Exhausted` passes when something is answered and its buffer dropped.
    pub fn lease(&self, bytes: u32) -> Result<Buffer, LeaseError> {
        if self.state() == HandleState::Revoked {
            return Err(LeaseError::Revoked);
        }
        self.lane.arena().lease(bytes).map_err(|error| LeaseError::from_arena(&error, bytes))
    }

    /// Admits requests from the front of `requests`, in order, and publishes them to the device. What was admitted is gone from the vector and is answered
    /// exactly once, also if it is invalid; what is left was not looked at. Any number may be given; one crossing carries up to 64.
    ///
    /// # Errors
    /// [`SubmitError`] says why something was left. With `Held`, the handle's notify is signalled when it is worth trying again.
    pub fn submit(&self, requests: &mut Vec<IoRequest>) -> Result<(), SubmitError> {
        if requests.is_empty() {
            return Ok(());
        }
        if self.state() == HandleState::Revoked {
            return Err(SubmitError::Revoked);
        }
        if self.binding.gate().in_crossing() {
            return Err(SubmitError::Inside);
        }
        match self.lane.submit(&self.shared, requests) {
            Ok(()) => Ok(()),
            Err(crate::lane::Stop::Full) => Err(SubmitError::Full),
            Err(crate::lane::Stop::Gone) => Err(SubmitError::Revoked),
            Err(crate::lane::Stop::Refused(HandleRefused::Revoked)) => Err(SubmitError::Revoked),
            Err(crate::lane::Stop::Refused(HandleRefused::Held)) => {
                self.binding.gate().register_held(&self.shared.notify);
                Err(SubmitError::Held)
            }
        }
    }

    /// Takes what was answered. Never blocks; looks at the device for everyone on the lane when nobody else is doing so. Returns how much was found, for this
    /// handle or for handles that share its notify: only after a 0 with `arm` from each of those is it safe to sleep on
    /// [`Handle::device_fd`] and [`Handle::notify`] (without `arm` the device is not asked to notify, which is cheaper while polling).
    pub fn poll(&self, arm: bool, out: &mut Vec<Completion>) -> usize {
        // From inside a call into this driver, its lane is taken by that call. And a client that goes on polling a handle of which nothing will come any more does
        // not contend with the ladder.
        if self.binding.gate().in_crossing() || (self.in_flight() == 0 && self.state() == HandleState::Revoked) {
            return self.shared.take_answers(out);
        }
        let found = self.lane.poll(&self.shared, arm, out);
        found + self.shared.take_answers(out)
    }

    /// Takes what arrived, for a handle that was opened to receive; up to 64 buffers' worth at a time, in the order in which the device used them. Never blocks. Returns how much was found:
    /// only after a 0 with `arm` is it safe to sleep on [`Handle::arrival_fd`]. Buffers that clients let go of are given back to the device on the way.
    pub fn receive(&self, arm: bool, out: &mut Arrivals) -> usize {
        if !self.receives || self.state() == HandleState::Revoked || self.binding.gate().in_crossing() {
            return 0;
        }
        self.lane.receive(arm, out)
    }

    /// Gives the device back the buffers of arrivals that were dropped, without looking for new ones: for a client that stopped taking them. Never blocks.
    pub fn give_back(&self) {
        if self.receives {
            self.lane.repost();
        }
    }

    /// Readable when something arrived on this handle's lane; `None` where nothing ever does. [`Handle::receive`] with `arm` clears it.
    pub fn arrival_fd(&self) -> Option<BorrowedFd<'_>> {
        self.lane.posted_fd()
    }

    /// Readable when the device used something on this handle's lane. [`Handle::poll`] clears it.
    pub fn device_fd(&self) -> BorrowedFd<'_> {
        self.lane.device_fd()
    }

    /// See [`HandleSpec::notify`].
    pub fn notify(&self) -> &Arc<Notify> {
        &self.shared.notify
    }

    /// Requests of this handle that are not answered yet.
    pub fn in_flight(&self) -> u32 {
        self.shared.in_flight.load(Ordering::Acquire)
    }
}

/// The claim to what arrives on a lane, until it is kept.
struct Receiver(Option<(Arc<Lane>, u64)>);

impl Receiver {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some((lane, id)) = &self.0 {
            lane.release_receiver(*id);
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.receives {
            self.lane.release_receiver(self.shared.id);
        }
        // Close is final and waits for nothing: what is in flight is answered into `answers`, which goes with the last reference.
        self.shared.right.close();
        self.shared.closed.store(true, Ordering::Release);
        self.binding.forget_handle(self.shared.id);
        let mut rest = Vec::new();
        self.shared.take_answers(&mut rest);
        if self.in_flight() > 0 {
            // Nobody may be left to look at the device for what is still on it.
            self.binding.adopt_orphan(&self.shared, &self.lane);
            self.lane.wake_reaper();
        }
        // The watching thread takes the region away, once nothing is in flight.
        if let Some(mapped) = self.shared.mapped.get() {
            mapped.wake();
        }
    }
}
