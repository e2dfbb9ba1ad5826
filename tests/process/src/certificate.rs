//! What a certificate must say (DESIGN section 7).

use serde_json::Value;

/// The keys, exactly.
const KEYS: [&str; 15] = [
    "name",
    "driver",
    "device",
    "generation",
    "outcome",
    "handles_revoked",
    "calls_at_close",
    "calls_drained",
    "calls_interrupted",
    "requests_at_close",
    "requests_completed",
    "requests_failed",
    "stages",
    "residual",
    "leaked",
];
const RESIDUAL: [&str; 7] = ["calls", "handles", "requests", "buffers", "dma_bytes", "mappings", "fds"];

/// The certificate of a binding that left.
#[derive(Clone, Debug)]
pub struct Certificate(Value);

impl Certificate {
    /// Checks that the document has the keys of a certificate, all and no other.
    #[track_caller]
    pub fn parse(document: Value) -> Certificate {
        assert_eq!(keys(&document), sorted(&KEYS), "{document}");
        assert_eq!(keys(&document["residual"]), sorted(&RESIDUAL), "{document}");
        assert_eq!(keys(&document["leaked"]), ["bytes", "reason"], "{document}");
        let stages = document["stages"].as_array().expect("stages are a list");
        assert!(!stages.is_empty());
        for stage in stages {
            assert_eq!(keys(stage), ["micros", "name"], "{document}");
            assert!(stage["name"].is_string() && stage["micros"].is_u64(), "{stage}");
        }
        Certificate(document)
    }

    /// A number or text by its key.
    #[track_caller]
    pub fn number(&self, key: &str) -> u64 {
        self.0[key].as_u64().unwrap_or_else(|| panic!("{key} in {}", self.0))
    }

    /// How it ended.
    #[track_caller]
    pub fn outcome(&self) -> &str {
        self.0["outcome"].as_str().unwrap_or_else(|| panic!("outcome in {}", self.0))
    }

    /// Why something was retired; empty if nothing was.
    #[track_caller]
    pub fn leak_reason(&self) -> &str {
        self.0["leaked"]["reason"].as_str().unwrap_or_else(|| panic!("leaked.reason in {}", self.0))
    }

    /// Bytes that were retired on purpose.
    #[track_caller]
    pub fn leaked_bytes(&self) -> u64 {
        self.0["leaked"]["bytes"].as_u64().unwrap_or_else(|| panic!("leaked.bytes in {}", self.0))
    }

    /// Nothing may be left.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        for key in RESIDUAL {
            assert_eq!(self.0["residual"][key].as_u64(), Some(0), "residual.{key} in {}", self.0);
        }
    }

    /// Nothing may be left or retired.
    #[track_caller]
    pub fn assert_clean(&self) {
        self.assert_nothing_left();
        assert_eq!((self.leaked_bytes(), self.leak_reason()), (0, ""), "{}", self.0);
        let [at_close, completed, failed] =
            ["requests_at_close", "requests_completed", "requests_failed"].map(|key| self.number(key));
        assert_eq!(at_close, completed + failed, "{}", self.0);
    }
}

fn keys(document: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = document.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
    keys.sort_unstable();
    keys
}

fn sorted<'a>(keys: &[&'a str]) -> Vec<&'a str> {
    let mut keys = keys.to_vec();
    keys.sort_unstable();
    keys
}
