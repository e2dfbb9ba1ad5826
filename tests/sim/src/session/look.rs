//! One look at a queue: take, execute, answer, and the lies in between.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::{Pending, Progress, Queue, Session};
use crate::request::{OK, Request, Target};
use crate::ring::{Ring, Violation};
use crate::rng::Rng;
use crate::script::Lie;

/// Requests that the quick path answers before it makes the answers visible.
const QUICK_BATCH: u16 = 64;

impl Session {
    /// One look at a queue: takes what is available, executes and answers what is due.
    pub(crate) fn look(&self, index: u16) -> Progress {
        let mut queue = self.queue(index);
        let machine = &*self.machine;
        let mut progress = Progress::default();
        let power = machine.power.read().unwrap_or_else(PoisonError::into_inner);
        if self.is_over() || machine.is_hung() || queue.broken {
            return progress;
        }
        if machine.is_quick() && queue.pending.is_empty() && !queue.stopped {
            if let Some(ring) = &mut queue.ring {
                match ring.answer_all(QUICK_BATCH, &machine.profile.id) {
                    Ok(count) => {
                        progress.done = u64::from(count);
                        progress.answered = progress.done;
                    }
                    Err(violation) => {
                        queue.broken = true;
                        machine.violation(violation);
                    }
                }
                if progress.done > 0 {
                    progress.signals = u32::from(queue.ring.as_mut().is_some_and(Ring::wants_signal));
                    machine.counters.taken.fetch_add(progress.done, Ordering::Relaxed);
                    self.count(&progress);
                }
            }
            return progress;
        }
        let verdict = if queue.stopped { Ok(None) } else { self.take(&mut queue, &mut progress) };
        match verdict {
            Ok(None) => {}
            Ok(Some(power_cut)) => {
                // `die` takes it for writing.
                drop(power);
                machine.die(power_cut);
                self.forget(&mut queue);
                return Progress::default();
            }
            Err(violation) => {
                queue.broken = true;
                machine.violation(violation);
                machine.announce();
                return progress;
            }
        }
        if !machine.is_hung() {
            self.answer(&mut queue, &mut progress);
        }
        if progress.done > 0 {
            self.count(&progress);
        }
        progress
    }

    fn count(&self, progress: &Progress) {
        let counters = &self.machine.counters;
        counters.answered.fetch_add(progress.answered, Ordering::Relaxed);
        counters.notifications.fetch_add(u64::from(progress.signals), Ordering::Relaxed);
        self.machine.announce();
    }

    /// Takes what is available. `Some`: the device dies here, with a power cut or without.
    fn take(&self, queue: &mut Queue, progress: &mut Progress) -> Result<Option<bool>, Violation> {
        let Queue { index, ring: Some(ring), pending, in_flight, .. } = queue else { return Ok(None) };
        let machine = &*self.machine;
        let counters = &machine.counters;
        while let Some(head) = ring.take()? {
            let chain = ring.chain(head)?;
            if std::mem::replace(&mut in_flight[usize::from(head)], true) {
                return Err(Violation::InFlight { head });
            }
            let request = Request::read(ring.memory(), chain)?;
            if let Err(violation) = request.check_limits(&machine.profile) {
                machine.violation(violation);
            }
            let fate = machine.script().judge(*index, request.op);
            counters.taken.fetch_add(1, Ordering::SeqCst);
            if fate.die || fate.power_cut {
                return Ok(Some(fate.power_cut));
            }
            progress.done += 1;
            counters.waiting.fetch_add(1, Ordering::SeqCst);
            counters.gated.fetch_add(u64::from(fate.gated), Ordering::SeqCst);
            let (hang, freeze) = (fate.hang, fate.freeze);
            let due = if fate.ticks == 0 { 0 } else { self.now() + fate.ticks };
            pending.push(Pending { request, fate, due });
            if hang || freeze {
                machine.hang(freeze);
                break;
            }
        }
        Ok(None)
    }

    /// Executes and answers what is due.
    fn answer(&self, queue: &mut Queue, progress: &mut Progress) {
        let Queue { ring: Some(ring), pending, in_flight, rng, .. } = queue else { return };
        let machine = &*self.machine;
        let counters = &machine.counters;
        if pending.is_empty() {
            return;
        }
        let now = self.now();
        let mut ready = Vec::new();
        let mut later = Vec::new();
        for mut one in pending.drain(..) {
            let in_time = one.due <= now;
            if in_time && one.fate.gated && machine.pass_gate() {
                one.fate.gated = false;
                counters.gated.fetch_sub(1, Ordering::SeqCst);
            }
            progress.ticking |= !in_time;
            let list = if in_time && !one.fate.gated { &mut ready } else { &mut later };
            list.push(one);
        }
        *pending = later;
        if ready.is_empty() {
            return;
        }
        if ready.iter().any(|one| one.fate.reorder) {
            rng.shuffle(&mut ready);
        }
        let mut shown = 0;
        let mut quiet = true;
        for one in &ready {
            progress.done += 1;
            counters.waiting.fetch_sub(1, Ordering::SeqCst);
            if one.fate.lies(Lie::NotificationSpurious) {
                progress.signals += 1;
            }
            let features = self.features();
            let target = Target { memory: ring.memory(), store: &machine.store, profile: &machine.profile, features };
            let (status, payload) = one.request.execute(&target, &one.fate);
            self.machine.record(self.number, queue.index, &one.request, status);
            let answers = put_answer(ring, one, status, payload, in_flight, rng);
            if answers == 0 {
                self.forgotten.fetch_add(1, Ordering::SeqCst);
            }
            progress.answered += answers;
            quiet &= one.fate.lies(Lie::NotificationLost);
        }
        ring.publish();
        for one in &ready {
            if one.fate.lies(Lie::UsedIndexJump) {
                shown = ring.size() + 1;
            } else if one.fate.lies(Lie::UsedIndexBack) {
                shown = u16::MAX - progress.answered as u16;
            }
        }
        if shown != 0 {
            ring.show_used_index(shown);
        }
        if ring.wants_signal() && !quiet {
            progress.signals += 1;
        }
    }
}

/// Puts the used element of one executed request, with the lies that go there. Returns how many were put.
fn put_answer(ring: &mut Ring, one: &Pending, status: u8, payload: u64, in_flight: &mut [bool], rng: &mut Rng) -> u64 {
    let Pending { request, fate, .. } = one;
    let chain = &request.chain;
    let head = u32::from(chain.head);
    let size = u32::from(ring.size());
    if !fate.lies(Lie::StatusUnwritten) {
        let status = if fate.lies(Lie::StatusUnknown) { 3 + rng.below(250) as u8 } else { status };
        // The status is the last writable byte (section 5.2.6); empty segments may follow it.
        if let Some(last) = chain.writable.iter().rev().find(|segment| segment.bytes > 0) {
            let _ = ring.memory().write(last.address + u64::from(last.bytes) - 1, &[status]);
        }
    }
    if fate.lies(Lie::DescriptorScribbled) {
        ring.scribble_descriptor(chain.head, [rng.next_u64(), rng.next_u64()]);
    }
    if fate.lies(Lie::AvailableScribbled) {
        ring.scribble_available(rng.next_u64() as u16);
    }
    if fate.lies(Lie::AnswerForgotten) {
        return 0;
    }
    // Bytes from the start of the writable part that were written: with the status at its end, all of it on success, and a
    // failed request promises nothing about what comes before.
    let honest = if status == OK { payload + 1 } else { 1 };
    let written = if fate.lies(Lie::LengthLong) {
        (chain.writable_bytes + 1 + rng.below(1 << 16)).min(u64::from(u32::MAX)) as u32
    } else if fate.lies(Lie::LengthZero) {
        0
    } else {
        honest as u32
    };
    if fate.lies(Lie::UsedIdUnknown) {
        ring.put(size + rng.below(u64::from(u32::MAX - size)) as u32, written);
        return 1;
    }
    if fate.lies(Lie::UsedIdIdle) {
        let idle: Vec<u32> = (0..size).filter(|id| !in_flight[*id as usize]).collect();
        // With every descriptor in flight there is no idle one; an unknown one is the nearest lie.
        let id = if idle.is_empty() { size } else { idle[rng.below(idle.len() as u64) as usize] };
        ring.put(id, written);
        return 1;
    }
    in_flight[usize::from(chain.head)] = false;
    ring.put(head, written);
    if fate.lies(Lie::UsedIdTwice) {
        ring.put(head, written);
        return 2;
    }
    1
}
