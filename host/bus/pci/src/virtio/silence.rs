//! Making the device silent, and letting go of it.
//!
//! ```text
//! write 0 to device_status -> reads 0, and keeps what is written -> interrupts and bus mastering off -> silent
//!                          -> the function is absent             -> silent: what is out of the machine reaches nothing
//!                          -> neither                            -> the function's own reset
//! the function's own reset -> done                               -> interrupts and bus mastering off -> silent
//!                          -> there is none, or it fails         -> bus mastering off, and not silent: what the device has in hand may still reach its medium
//! ```
//!
//! What was asked is not asked again: a call that ran out of time is gone on with by the next one.

use std::time::{Duration, Instant};

use cofferdam_device::Silence;

use super::common::Reset;
use super::device::VirtioPci;

/// Longest wait for `device_status` to read 0. Some devices finish what they have in hand first.
pub(super) const RESET_LIMIT: Duration = Duration::from_secs(2);

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopping {
    /// Not asked.
    No,
    /// 0 was written to the status at this time.
    Asked(Instant),
    /// A reset was confirmed.
    Reset,
    /// And the function cannot reach memory. For good: nothing starts it again.
    Silent,
}

impl VirtioPci {
    pub(super) fn silence(&mut self, deadline: Instant) -> Silence {
        if self.stopping == Stopping::Silent {
            return Silence::Confirmed;
        }
        if self.dormant.is_some() {
            return Silence::Unconfirmed { reason: "another process has the device".to_owned() };
        }
        match self.stop(deadline) {
            Ok(()) => {
                self.stopping = Stopping::Silent;
                tracing::info!(address = self.address, "virtio function is silent");
                Silence::Confirmed
            }
            // It was reset when it was opened, and was told no address since.
            Err(reason) if self.queues.is_empty() => {
                tracing::debug!(address = self.address, reason, "virtio function was never given a queue");
                Silence::Confirmed
            }
            Err(reason) => {
                tracing::debug!(address = self.address, reason, "virtio function may still act");
                Silence::Unconfirmed { reason }
            }
        }
    }

    fn stop(&mut self, deadline: Instant) -> Result<(), String> {
        for queue in &self.queues {
            queue.bell.silence();
        }
        let Some(open) = &mut self.open else {
            return Err("the function was released before it was silent".to_owned());
        };
        if self.stopping == Stopping::No {
            open.common.begin_reset();
            self.stopping = Stopping::Asked(Instant::now());
        }
        if let Stopping::Asked(since) = self.stopping {
            if open.claimed.is_absent() {
                return Ok(());
            }
            let limit = since + RESET_LIMIT;
            let answer = open.common.confirm_reset(limit.min(deadline));
            if answer != Reset::Done {
                if open.claimed.is_absent() {
                    return Ok(());
                }
                let mute = match answer {
                    Reset::Pending(status) if Instant::now() < limit => {
                        return Err(format!("its reset is not finished, device_status still reads {status:#x}"));
                    }
                    Reset::Pending(status) => format!("device_status does not read 0 but {status:#x}"),
                    Reset::Nobody => "its registers read all ones".to_owned(),
                    Reset::Deaf | Reset::Done => "device_status reads 0 and keeps nothing".to_owned(),
                };
                tracing::warn!(address = self.address, mute, "virtio reset not confirmed, resetting the function");
                if let Err(error) = open.claimed.reset(deadline) {
                    if open.claimed.is_absent() {
                        return Ok(());
                    }
                    // At least its DMA ends. That says nothing of requests that it has read already.
                    let dma = match open.claimed.quiet(deadline) {
                        Silence::Confirmed => "bus mastering is off".to_owned(),
                        Silence::Unconfirmed { reason } => reason,
                    };
                    return Err(format!("{mute}; resetting the function: {error}; {dma}"));
                }
            }
            self.stopping = Stopping::Reset;
        }
        match open.claimed.quiet(deadline) {
            Silence::Confirmed => Ok(()),
            Silence::Unconfirmed { .. } if open.claimed.is_absent() => Ok(()),
            Silence::Unconfirmed { reason } => Err(reason),
        }
    }

    pub(super) fn give_back(&mut self) {
        // Dropped in the middle of a start, say. Who asked for silence has had its answer; what another process has is not this one's to silence.
        if self.dormant.is_none() && self.open.is_some() && self.stopping == Stopping::No && !self.queues.is_empty() {
            self.silence(Instant::now() + RESET_LIMIT);
        }
        if let Some(open) = self.open.take() {
            for queue in self.queues.drain(..) {
                queue.bell.silence();
            }
            // Before the function: what is left of its mapped BARs goes with them.
            let mut claimed = open.close();
            claimed.release();
            tracing::info!(address = self.address, "virtio function released");
        }
        self.memory.clear();
    }
}
