//! What the runs of a ladder so far found, and the certificate made of it.

use std::time::Instant;

use crate::binding::Binding;
use crate::certificate::{Certificate, Leaked, Outcome, Residual, Stage, StageTime};

/// Part of the binding, so that the next run goes on from it.
#[derive(Clone, Default)]
pub(crate) struct Progress {
    /// The numbers at the gate's closing were taken.
    pub(super) counted: bool,
    pub(super) handles_revoked: u64,
    pub(super) calls_at_close: u64,
    pub(super) calls_interrupted: u64,
    pub(super) requests_at_close: u64,
    pub(super) failed: u64,
    /// What the lanes had lost before the gate was closed.
    pub(super) lost_before: u64,
    pub(super) abandoned: u64,
    pub(super) leaked: Leaked,
    pub(super) times: Vec<StageTime>,
}

impl Progress {
    /// Adds the time since `since` to a stage.
    pub(super) fn timed(&mut self, name: Stage, since: Instant) {
        let micros = super::micros(since.elapsed());
        match self.times.iter_mut().find(|time| time.name == name) {
            Some(time) => time.micros += micros,
            None => self.times.push(StageTime { name, micros }),
        }
    }

    /// Memory that stays on purpose, and why; several reasons are told one after the other.
    pub(super) fn leak(&mut self, bytes: u64, reason: &str) {
        self.leaked.bytes += bytes;
        if !self.leaked.reason.contains(reason) {
            if !self.leaked.reason.is_empty() {
                self.leaked.reason.push_str("; ");
            }
            self.leaked.reason.push_str(reason);
        }
    }

    pub(super) fn draft(&self, binding: &Binding, residual: Residual, outcome: Outcome) -> Certificate {
        Certificate {
            name: binding.name().to_owned(),
            driver: binding.driver().to_string(),
            device: binding.device().to_owned(),
            generation: binding.generation(),
            outcome,
            handles_revoked: self.handles_revoked,
            calls_at_close: self.calls_at_close,
            calls_drained: self.calls_at_close.saturating_sub(self.calls_interrupted + residual.calls),
            calls_interrupted: self.calls_interrupted,
            requests_at_close: self.requests_at_close,
            requests_completed: self.requests_at_close.saturating_sub(self.failed + self.abandoned + residual.requests),
            requests_failed: self.failed,
            stages: self.times.clone(),
            residual,
            leaked: self.leaked.clone(),
        }
    }
}

/// What is there of a binding that has not ended.
pub(super) fn now(binding: &Binding) -> Residual {
    let arena = binding.serving.get().and_then(|serving| serving.lanes.first()).map(|lane| lane.arena());
    Residual {
        calls: binding.gate().crossings(),
        handles: binding.gate().handles() as u64,
        requests: binding.gate().operations(),
        buffers: arena.map_or(0, |arena| arena.live_buffers()),
        dma_bytes: arena.map_or(0, |arena| arena.region().len()),
        ..Residual::default()
    }
}
