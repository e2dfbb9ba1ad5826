//! One look at a queue: take, execute, answer, and the lies in between.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::{Pending, Progress, Queue, Session};
use crate::kinds::Lie;
use crate::model::{Accepted, Context, Delivery, Role, Work};
use crate::ring::{Chain, Ring, Violation};
use crate::rng::Rng;

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
        if machine.is_quick() && queue.pending.is_empty() && !queue.stopped && machine.model.is_quick(index) {
            if let Some(ring) = &mut queue.ring {
                match machine.model.answer_quick(index, ring, QUICK_BATCH) {
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
        let Queue { index, role, ring: Some(ring), pending, in_flight, .. } = queue else { return Ok(None) };
        let machine = &*self.machine;
        let counters = &machine.counters;
        loop {
            let work = match role {
                Role::Serves => self.request(*index, ring, in_flight, &mut progress.idle)?,
                Role::Delivers => self.delivery(*index, ring, in_flight, &mut progress.idle)?,
            };
            let Some(work) = work else { break };
            let fate = machine.script().judge(*index, work.op);
            counters.taken.fetch_add(1, Ordering::SeqCst);
            if fate.die || fate.power_cut {
                return Ok(Some(fate.power_cut));
            }
            progress.done += 1;
            counters.waiting.fetch_add(1, Ordering::SeqCst);
            counters.gated.fetch_add(u64::from(fate.gated), Ordering::SeqCst);
            let (hang, freeze) = (fate.hang, fate.freeze);
            let due = if fate.ticks == 0 { 0 } else { self.now() + fate.ticks };
            pending.push(Pending { work, fate, due });
            if hang || freeze {
                machine.hang(freeze);
                break;
            }
        }
        Ok(None)
    }

    /// The next request of the driver, if the class wants one now.
    fn request(
        &self,
        queue: u16,
        ring: &mut Ring,
        in_flight: &mut [bool],
        idle: &mut bool,
    ) -> Result<Option<Work>, Violation> {
        let machine = &*self.machine;
        if !machine.model.accepts(queue) {
            *idle = true;
            return Ok(None);
        }
        let Some(chain) = take_chain(ring, in_flight)? else { return Ok(None) };
        let Accepted { op, tag, remark } = machine.model.accept(queue, ring.memory(), &chain)?;
        if let Some(violation) = remark {
            machine.violation(violation);
        }
        Ok(Some(Work { queue, chain, more: Vec::new(), op, tag, data: Vec::new() }))
    }

    /// The next delivery to the driver, if there is one and enough buffers are posted for it. Buffers that do not suffice stay
    /// on the ring.
    fn delivery(
        &self,
        queue: u16,
        ring: &mut Ring,
        in_flight: &mut [bool],
        idle: &mut bool,
    ) -> Result<Option<Work>, Violation> {
        let machine = &*self.machine;
        let mut chains: Vec<Chain> = Vec::new();
        loop {
            match machine.model.deliver(queue, &chains) {
                Delivery::More => {
                    if let Some(chain) = take_chain(ring, in_flight)? {
                        chains.push(chain);
                        continue;
                    }
                }
                Delivery::Ready { op, data, remark } if !chains.is_empty() => {
                    if let Some(violation) = remark {
                        machine.violation(violation);
                    }
                    let chain = chains.remove(0);
                    return Ok(Some(Work { queue, chain, more: chains, op, tag: 0, data }));
                }
                Delivery::Ready { .. } | Delivery::Nothing => *idle = true,
            }
            for chain in &chains {
                in_flight[usize::from(chain.head)] = false;
            }
            ring.put_back(chains.len() as u16);
            return Ok(None);
        }
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
        let mut wake = 0;
        for one in &ready {
            progress.done += 1;
            counters.waiting.fetch_sub(1, Ordering::SeqCst);
            if one.fate.lies(Lie::NotificationSpurious) {
                progress.signals += 1;
            }
            let mut context = Context {
                memory: ring.memory(),
                features: self.features(),
                fate: &one.fate,
                rng,
                session: self.number,
                wake: 0,
            };
            let written = machine.model.serve(&one.work, &mut context);
            wake |= context.wake;
            let answers = put_answers(ring, one, written, in_flight, rng);
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
        if wake != 0 {
            self.wake_queues(wake);
        }
    }
}

/// Takes one chain off the ring and checks it.
fn take_chain(ring: &mut Ring, in_flight: &mut [bool]) -> Result<Option<Chain>, Violation> {
    let Some(head) = ring.take()? else { return Ok(None) };
    let chain = ring.chain(head)?;
    if std::mem::replace(&mut in_flight[usize::from(head)], true) {
        return Err(Violation::InFlight { head });
    }
    Ok(Some(chain))
}

/// Puts the used elements of work that was done, of which `written` bytes lie over its chains in order. Returns how many
/// were put.
fn put_answers(ring: &mut Ring, one: &Pending, written: u64, in_flight: &mut [bool], rng: &mut Rng) -> u64 {
    let mut left = written;
    one.work.chains().fold(0, |answers, chain| {
        let here = left.min(chain.writable_bytes);
        left -= here;
        answers + put_answer(ring, one, chain, here, in_flight, rng)
    })
}

/// Puts the used element of one chain, with the lies that go there. Returns how many were put.
fn put_answer(
    ring: &mut Ring,
    one: &Pending,
    chain: &Chain,
    honest: u64,
    in_flight: &mut [bool],
    rng: &mut Rng,
) -> u64 {
    let fate = &one.fate;
    let head = u32::from(chain.head);
    let size = u32::from(ring.size());
    if fate.lies(Lie::DescriptorScribbled) {
        ring.scribble_descriptor(chain.head, [rng.next_u64(), rng.next_u64()]);
    }
    if fate.lies(Lie::AvailableScribbled) {
        ring.scribble_available(rng.next_u64() as u16);
    }
    if fate.lies(Lie::AnswerForgotten) {
        return 0;
    }
    let written = if fate.lies(Lie::LengthLong) {
        (chain.writable_bytes + 1 + rng.below(1 << 16)).min(u64::from(u32::MAX)) as u32
    } else if fate.lies(Lie::LengthZero) {
        0
    } else if fate.lies(Lie::LengthOne) {
        1
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
