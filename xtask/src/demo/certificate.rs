//! Reading the certificate that `cofferdam unload --json` prints, and not believing it too easily.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::collections::BTreeMap;

/// The certificate. A missing key and an unknown one are both errors: the set of keys is a promise.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Certificate {
    pub(crate) name: String,
    pub(crate) driver: String,
    pub(crate) device: String,
    pub(crate) generation: u64,
    pub(crate) outcome: String,
    pub(crate) handles_revoked: u64,
    pub(crate) calls_at_close: u64,
    pub(crate) calls_drained: u64,
    pub(crate) calls_interrupted: u64,
    pub(crate) requests_at_close: u64,
    pub(crate) requests_completed: u64,
    pub(crate) requests_failed: u64,
    pub(crate) stages: Vec<Stage>,
    pub(crate) residual: BTreeMap<String, u64>,
    pub(crate) leaked: Leaked,
}

/// One step of the ladder.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Stage {
    pub(crate) name: String,
    pub(crate) micros: u64,
}

/// Memory that was retired on purpose.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Leaked {
    pub(crate) bytes: u64,
    pub(crate) reason: Option<String>,
}

const RESIDUAL: [&str; 7] = ["buffers", "calls", "dma_bytes", "fds", "handles", "mappings", "requests"];

impl Certificate {
    /// Parses what `unload --json` printed.
    pub(crate) fn parse(text: &str) -> Result<Certificate> {
        let certificate: Certificate =
            serde_json::from_str(text).with_context(|| format!("this is no certificate: {text:?}"))?;
        let keys: Vec<_> = certificate.residual.keys().map(String::as_str).collect();
        if keys != RESIDUAL {
            bail!("the certificate's residual has the keys {keys:?}, not {RESIDUAL:?}");
        }
        Ok(certificate)
    }

    /// Fails unless nothing is left and the numbers agree with each other.
    pub(crate) fn hold_to_it(&self) -> Result<()> {
        let left: Vec<_> = self.residual.iter().filter(|(_, count)| **count != 0).collect();
        if !left.is_empty() {
            bail!("the certificate leaves something behind: {left:?}");
        }
        if self.leaked.bytes != 0 {
            bail!(
                "{} bytes were retired: {}",
                self.leaked.bytes,
                self.leaked.reason.as_deref().unwrap_or("no reason given")
            );
        }
        if self.stages.is_empty() {
            bail!("the certificate names no stage");
        }
        if self.requests_completed + self.requests_failed < self.requests_at_close {
            bail!(
                "{} requests were in flight, but only {} completed and {} failed",
                self.requests_at_close,
                self.requests_completed,
                self.requests_failed
            );
        }
        Ok(())
    }

    /// The certificate as lines to read.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!(
                "{} of {} on {}, generation {}: {}",
                self.name, self.driver, self.device, self.generation, self.outcome
            ),
            format!("handles     {:>6} revoked", self.handles_revoked),
            format!(
                "calls       {:>6} at close, {} drained, {} interrupted",
                self.calls_at_close, self.calls_drained, self.calls_interrupted
            ),
            format!(
                "requests    {:>6} at close, {} completed, {} failed",
                self.requests_at_close, self.requests_completed, self.requests_failed
            ),
        ];
        for Stage { name, micros } in &self.stages {
            lines.push(format!("  {name:<24} {micros:>9} us"));
        }
        let residual: Vec<_> = self.residual.iter().map(|(key, count)| format!("{key} {count}")).collect();
        lines.push(format!("left        {}", residual.join(", ")));
        lines.push(format!("retired     {} bytes", self.leaked.bytes));
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"name":"disk0","driver":"virtio-blk","device":"vhost-user:/d","generation":1,"outcome":"unloaded",
        "handles_revoked":4,"calls_at_close":1,"calls_drained":1,"calls_interrupted":0,"requests_at_close":128,"requests_completed":128,
        "requests_failed":0,"stages":[{"name":"close","micros":3}],
        "residual":{"calls":0,"handles":0,"requests":0,"buffers":0,"dma_bytes":0,"mappings":0,"fds":0},"leaked":{"bytes":0,"reason":null}}"#;

    #[test]
    fn a_clean_certificate_holds() {
        Certificate::parse(GOOD).unwrap().hold_to_it().unwrap();
    }

    #[test]
    fn anything_left_retired_or_unaccounted_for_fails() {
        for (from, to) in [
            (r#""mappings":0"#, r#""mappings":1"#),
            (r#""bytes":0"#, r#""bytes":4096"#),
            (r#"[{"name":"close","micros":3}]"#, "[]"),
            (r#""requests_completed":128"#, r#""requests_completed":127"#),
        ] {
            assert_ne!(GOOD.replace(from, to), GOOD);
            assert!(Certificate::parse(&GOOD.replace(from, to)).unwrap().hold_to_it().is_err(), "{to}");
        }
    }

    #[test]
    fn a_missing_or_unknown_key_is_an_error() {
        for (from, to) in [
            (r#""fds":0"#, r#""files":0"#),
            (r#""generation":1,"#, ""),
            (r#""name":"disk0""#, r#""name":"disk0","more":1"#),
        ] {
            assert_ne!(GOOD.replace(from, to), GOOD);
            assert!(Certificate::parse(&GOOD.replace(from, to)).is_err(), "{to}");
        }
    }
}
