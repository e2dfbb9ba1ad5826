//! The control API: HTTP/JSON on a Unix socket. These are its documents; server and client share them.
//!
//! | method and path | document in | document out |
//! | --- | --- | --- |
//! | `GET /v1/bindings` | | list of [`BindingStatus`](cofferdam_manager::BindingStatus) |
//! | `GET /v1/bindings/NAME` | | [`BindingStatus`](cofferdam_manager::BindingStatus) |
//! | `POST /v1/bindings` | [`LoadBody`] | [`BindingStatus`](cofferdam_manager::BindingStatus) |
//! | `POST /v1/bindings/NAME/unload` | [`UnloadBody`] | [`Certificate`] |
//!
//! Errors are an [`ErrorBody`] with status 400 (usage), 404 (no such thing), 409 (still draining) or 422 (failed).

use cofferdam_manager::Certificate;
use serde::{Deserialize, Serialize};

/// A load. Paths are absolute: they are opened by the daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LoadBody {
    pub(crate) driver: String,
    pub(crate) device: String,
    #[serde(default)]
    pub(crate) ports: Vec<String>,
    pub(crate) name: Option<String>,
    pub(crate) queues: u16,
    #[serde(default)]
    pub(crate) allow: Vec<String>,
    #[serde(default)]
    pub(crate) pinned: bool,
    pub(crate) memory_mib: u32,
    pub(crate) call_deadline_ms: u32,
    pub(crate) arena_mib: u32,
    pub(crate) ring_entries: u16,
    pub(crate) requests: u32,
    pub(crate) handles: u32,
}

/// An unload.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct UnloadBody {
    pub(crate) deadline_ms: u64,
    pub(crate) force: bool,
}

/// Why it was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ErrorCode {
    /// The call's words are off.
    Usage,
    /// No such binding, driver file or path.
    NoSuchThing,
    /// The deadline passed; unload again to go on.
    StillDraining,
    /// Anything else.
    Failed,
}

impl ErrorCode {
    /// The command line's exit code (DESIGN section 11).
    pub(crate) fn exit_code(self) -> u8 {
        match self {
            ErrorCode::Failed => 1,
            ErrorCode::Usage => 2,
            ErrorCode::NoSuchThing => 3,
            ErrorCode::StillDraining => 4,
        }
    }

    pub(crate) fn http_status(self) -> u16 {
        match self {
            ErrorCode::Usage => 400,
            ErrorCode::NoSuchThing => 404,
            ErrorCode::StillDraining => 409,
            ErrorCode::Failed => 422,
        }
    }
}

/// An error, as it crosses the socket and as `main` prints it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ErrorBody {
    pub(crate) code: ErrorCode,
    pub(crate) message: String,
    /// With `still-draining`: what is known so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) so_far: Option<Box<Certificate>>,
}

impl ErrorBody {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> ErrorBody {
        ErrorBody { code, message: message.into(), so_far: None }
    }

    pub(crate) fn failed(message: impl std::fmt::Display) -> ErrorBody {
        ErrorBody::new(ErrorCode::Failed, message.to_string())
    }
}

impl std::fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ErrorBody {}
