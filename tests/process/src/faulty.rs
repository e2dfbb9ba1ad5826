//! Bindings whose driver breaks down now and then (`tests/guests/faulty-blk`).

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use guest_faulty_blk::{Kind, Orders, Point};
use serde_json::Value;

use crate::host::Daemon;
use crate::programs;

/// Milliseconds since 1970.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Loads the driver with these orders, but that it has no fault before it is loaded, to be replaced as often as it takes. From the time that is the answer, in milliseconds since
/// 1970, it breaks down.
#[track_caller]
pub fn load(daemon: &Daemon, orders: &Orders, device: &str, name: &str, more: &[&str]) -> u64 {
    let component = programs::test_driver("faulty-blk");
    let component = std::fs::read(&component).unwrap_or_else(|error| panic!("{}: {error}", component.display()));
    let mut lead = Duration::from_millis(700);
    loop {
        let from_ms = unix_ms() + lead.as_millis() as u64;
        let ordered = Orders { from_ms, ..orders.clone() }.write_into(&component);
        let path = daemon.path(&format!("{name}.wasm"));
        std::fs::write(&path, ordered).expect("a file");
        let always = ["--allow", "wasi:clocks", "--restarts", "10000/60m", "--restart-wait", "0ms"];
        let ended = daemon.load(&path, device, name, &[&always, more].concat());
        // On a busy machine the load may not have ended by then.
        if ended.code == Some(0) || unix_ms() < from_ms || lead > Duration::from_secs(10) {
            ended.expect(0);
            return from_ms;
        }
        lead *= 3;
    }
}

/// The crash reports of a binding, by their numbers. Only the last 16 are kept: whoever wants more collects in time.
#[derive(Default)]
pub struct Crashes(pub BTreeMap<u64, Value>);

impl Crashes {
    /// Takes what there is.
    #[track_caller]
    pub fn collect(&mut self, daemon: &Daemon, name: &str) {
        let document = daemon.run(&["crashes", name, "--json"]).expect(0).json();
        for crash in document.as_array().unwrap_or_else(|| panic!("{document}")) {
            self.0.insert(crash["number"].as_u64().expect("a number"), crash.clone());
        }
    }

    /// How many there were, also of those that were not collected.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.last_key_value().map_or(0, |(number, _)| *number)
    }

    /// How often each has been, of what is at `key` of the reports.
    #[must_use]
    pub fn by(&self, key: impl Fn(&Value) -> Option<&str>) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for value in self.0.values().filter_map(key) {
            *counts.entry(value.to_owned()).or_insert(0) += 1;
        }
        counts
    }

    /// How long clients waited for each of those of this kind, in microseconds, sorted.
    #[must_use]
    pub fn pauses(&self, kind: &str) -> Vec<u64> {
        let of_kind = self.0.values().filter(|crash| crash["kind"] == kind);
        let mut pauses: Vec<_> = of_kind.filter_map(|crash| crash["pause_micros"].as_u64()).collect();
        pauses.sort_unstable();
        pauses
    }
}

impl fmt::Display for Crashes {
    /// Each in a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, crash) in &self.0 {
            let call = &crash["calls"][0]["export"];
            write!(f, "{number} at {} lane {} {call}: {}", crash["unix_micros"], crash["lane"], crash["message"])?;
            writeln!(f, ", {} us", crash["pause_micros"])?;
        }
        Ok(())
    }
}
