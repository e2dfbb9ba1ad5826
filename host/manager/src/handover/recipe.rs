//! What a load was told, kept for another process that is to do the same.

use std::path::PathBuf;
use std::time::Duration;

use cofferdam_runtime::{Grants, GuestLimits};
use serde::{Deserialize, Serialize};

use crate::load::LoadSpec;
use crate::recovery::RestartPolicy;

/// The longest time that anything may wait for, as on the command line: a day.
const LONGEST_WAIT: Duration = Duration::from_secs(86_400);
/// The longest call of a driver, in milliseconds.
const LONGEST_CALL_MS: u64 = 60_000;
/// The longest that the host's part of one call may take, in milliseconds: an hour, for hosts that are emulated.
const LONGEST_HOST_PART_MS: u64 = 3_600_000;
/// Most memory of an instance, in bytes: what 32 bits can name.
const MOST_MEMORY_BYTES: u64 = 4 << 30;
/// Most table elements of an instance.
const MOST_TABLE_ELEMENTS: u64 = 10_000_000;

/// Of a [`LoadSpec`] everything but names, device and component.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Recipe {
    pub(super) queues: Option<u16>,
    pub(super) arena_bytes: u64,
    pub(super) ring_entries: u16,
    pub(super) requests_per_lane: usize,
    pub(super) handle_limit: usize,
    pub(super) mapped_handles: usize,
    pub(super) mapped_bytes: u64,
    pub(super) crash_dir: Option<PathBuf>,
    /// Limit, and the three times of the policy.
    restarts: Option<(u32, [Duration; 3])>,
    /// How long its device is waited for when it is lost, if it is.
    pub(super) reconnect: Option<Duration>,
    /// As they are written for `--allow`.
    grants: Vec<String>,
    /// A directory was granted: the one that had its path then, which may be another one's now.
    pub(crate) grants_directory: bool,
    memory_bytes: usize,
    table_elements: usize,
    core_instances: usize,
    call_deadline_ms: u64,
    host_budget_ms: u64,
    log_lines_per_s: u32,
}

impl Recipe {
    pub(crate) fn of(spec: &LoadSpec) -> Recipe {
        let (grants, limits) = (&spec.grants, &spec.limits);
        let words =
            [(grants.wasi_clocks, "wasi:clocks"), (grants.wasi_random, "wasi:random"), (grants.wasi_cli, "wasi:cli")];
        let policy = |policy: &RestartPolicy| (policy.limit, [policy.within, policy.backoff, policy.longest]);
        Recipe {
            queues: spec.queues,
            arena_bytes: spec.arena_bytes,
            ring_entries: spec.ring_entries,
            requests_per_lane: spec.requests_per_lane,
            handle_limit: spec.handle_limit,
            mapped_handles: spec.mapped_handles,
            mapped_bytes: spec.mapped_bytes,
            crash_dir: spec.crash_dir.clone(),
            restarts: spec.restarts.as_ref().map(policy),
            reconnect: spec.reconnect.as_ref().map(|reconnect| reconnect.wait),
            grants: words.into_iter().filter(|(granted, _)| *granted).map(|(_, word)| word.to_owned()).collect(),
            grants_directory: !grants.filesystem.is_empty(),
            memory_bytes: limits.memory_bytes,
            table_elements: limits.table_elements,
            core_instances: limits.core_instances,
            call_deadline_ms: limits.call_deadline_ms,
            host_budget_ms: limits.host_budget_ms,
            log_lines_per_s: limits.log_lines_per_s,
        }
    }

    /// Whether it asks for nothing that lasts for ever, or that no clock can hold. Who can forge it: whoever calls the control API, and a process that hands bindings over.
    ///
    /// # Errors
    /// What is out of bounds, in a sentence.
    pub(crate) fn check(&self) -> Result<(), String> {
        let policy = self.restarts.map(|(_, times)| times).unwrap_or_default();
        if let Some(wait) = policy.into_iter().chain(self.reconnect).find(|wait| *wait > LONGEST_WAIT) {
            return Err(format!("a wait of {wait:?}, the longest is {LONGEST_WAIT:?}"));
        }
        let numbers = [
            ("milliseconds for a guest call", self.call_deadline_ms, LONGEST_CALL_MS),
            ("milliseconds for the host calls of one guest call", self.host_budget_ms, LONGEST_HOST_PART_MS),
            ("bytes of memory for an instance", self.memory_bytes as u64, MOST_MEMORY_BYTES),
            ("table elements for an instance", self.table_elements as u64, MOST_TABLE_ELEMENTS),
        ];
        match numbers.into_iter().find(|(_, asked, most)| asked > most) {
            Some((what, asked, most)) => Err(format!("{asked} {what}, the most is {most}")),
            None => Ok(()),
        }
    }

    pub(super) fn grants(&self) -> Result<Grants, String> {
        let mut grants = Grants::default();
        for word in &self.grants {
            grants.allow(word).map_err(|error| error.to_string())?;
        }
        if !grants.filesystem.is_empty() {
            return Err("a directory is not handed over: its path may be another one's by now".to_owned());
        }
        Ok(grants)
    }

    pub(super) fn limits(&self) -> GuestLimits {
        GuestLimits {
            memory_bytes: self.memory_bytes,
            table_elements: self.table_elements,
            core_instances: self.core_instances,
            call_deadline_ms: self.call_deadline_ms,
            host_budget_ms: self.host_budget_ms,
            log_lines_per_s: self.log_lines_per_s,
        }
    }

    pub(super) fn restarts(&self) -> Option<RestartPolicy> {
        let (limit, [within, backoff, longest]) = self.restarts?;
        Some(RestartPolicy { limit, within, backoff, longest })
    }
}
