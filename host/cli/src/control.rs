//! The control API: HTTP/JSON on a Unix socket. These are its documents; server and client share them.
//!
//! | method and path | document in | document out |
//! | --- | --- | --- |
//! | `GET /v1/bindings` | | list of [`BindingStatus`](cofferdam_manager::BindingStatus), those that left memory behind among them |
//! | `GET /v1/bindings/NAME` | | [`BindingStatus`](cofferdam_manager::BindingStatus) |
//! | `POST /v1/bindings` | [`LoadBody`] | [`BindingStatus`](cofferdam_manager::BindingStatus) |
//! | `POST /v1/bindings/NAME/unload` | [`UnloadBody`] | [`Certificate`] |
//! | `POST /v1/bindings/NAME/upgrade` | [`UpgradeBody`] | [`UpgradeReport`](cofferdam_manager::UpgradeReport) |
//! | `POST /v1/bindings/NAME/rollback` | [`RollbackBody`] | [`UpgradeReport`](cofferdam_manager::UpgradeReport) |
//! | `POST /v1/bindings/NAME/restart` | | [`BindingStatus`](cofferdam_manager::BindingStatus) |
//! | `GET /v1/bindings/NAME/crashes` | | list of [`CrashReport`](cofferdam_manager::CrashReport), the oldest first |
//! | `GET /v1/bindings/NAME/why` | | [`Explanation`], also of a binding that left |
//! | `GET /v1/bindings/NAME/handles` | | list of [`HandleStatus`](cofferdam_manager::HandleStatus) |
//! | `POST /v1/bindings/NAME/handles/ID/revoke` | [`RevokeBody`] | [`RevokeReport`] |
//! | `POST /v1/bindings/NAME/ports/attach` | [`PortBody`] | [`PortChange`] |
//! | `POST /v1/bindings/NAME/ports/detach` | [`PortBody`] | [`PortChange`] |
//! | `GET /v1/events?since=SEQ&follow=BOOL` | | [`EventRecord`](cofferdam_manager::EventRecord)s, one a line (`application/x-ndjson`) |
//!
//! Every answer has the header [`DAEMON_HEADER`] with a text that no two daemons share: numbers of events, generations and handles are one daemon's, and a client that
//! keeps them and comes back can tell that it has found another one.
//!
//! Errors are an [`ErrorBody`] with status 400 (usage), 404 (no such thing), 409 (still draining) or 422 (failed).
//!
//! An unload ends with its client: when the connection closes, the wait does, and the binding stays `draining`. An unload with `force` goes through in any case;
//! so do all other calls, each within its bound. An unload or a revocation is answered soon after its deadline whatever holds it up; what is under way for it then ends
//! by itself.
//!
//! Connections are for one call each, and bounded: see [`crate::serve`].

use std::time::Duration;

use cofferdam_manager::{Certificate, Explanation, RestartPolicy, RevokeReport};
use serde::{Deserialize, Serialize};

use crate::client::millis;

/// Header of every answer: which daemon gave it.
pub(crate) const DAEMON_HEADER: &str = "x-cofferdam-daemon";
/// Longest wait of an unload.
pub(crate) const LONGEST_UNLOAD: Duration = Duration::from_secs(86_400);
/// Longest time that clients are held for an exchange of the driver.
pub(crate) const LONGEST_HOLD: Duration = Duration::from_secs(5);
/// Longest time that clients are held for another daemon that takes over.
pub(crate) const LONGEST_TAKEOVER: Duration = Duration::from_secs(10);
/// Longest probation of a new driver.
pub(crate) const LONGEST_PROBATION: Duration = Duration::from_secs(86_400);
/// Longest wait of a revocation: it goes on without its client.
pub(crate) const LONGEST_REVOKE: Duration = Duration::from_secs(60);

/// A load. Paths are absolute: they are opened by the daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LoadBody {
    /// The driver's file. None: the one in `drivers` that lists the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) driver: Option<String>,
    /// Where drivers are looked for. None: where the daemon's are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) drivers: Option<String>,
    pub(crate) device: String,
    #[serde(default)]
    pub(crate) ports: Vec<String>,
    pub(crate) name: Option<String>,
    pub(crate) queues: u16,
    #[serde(default)]
    pub(crate) allow: Vec<String>,
    #[serde(default)]
    pub(crate) pinned: bool,
    /// `uio` or `vfio`, for a PCI function that this load hands over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) via: Option<String>,
    #[serde(default)]
    pub(crate) trust_dma: bool,
    pub(crate) memory_mib: u32,
    pub(crate) call_deadline_ms: u32,
    pub(crate) arena_mib: u32,
    pub(crate) ring_entries: u16,
    pub(crate) requests: u32,
    pub(crate) handles: u32,
    /// Restarts within `restart_within_ms`; none: the binding leaves when its driver breaks down.
    #[serde(default = "restarts")]
    pub(crate) restarts: Option<u32>,
    #[serde(default = "restart_within_ms")]
    pub(crate) restart_within_ms: u64,
    #[serde(default = "restart_wait_ms")]
    pub(crate) restart_wait_ms: u64,
    /// How long a lost device is waited for; none: the binding leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reconnect_ms: Option<u64>,
    #[serde(default = "mapped_handles")]
    pub(crate) mapped_handles: u32,
    #[serde(default = "mapped_mib")]
    pub(crate) mapped_mib: u32,
}

/// As [`RestartPolicy`] has it, unless a load says otherwise.
fn restarts() -> Option<u32> {
    Some(RestartPolicy::default().limit)
}

fn restart_within_ms() -> u64 {
    millis(RestartPolicy::default().within)
}

fn restart_wait_ms() -> u64 {
    millis(RestartPolicy::default().backoff)
}

/// Clients that may share memory with the device, unless a load says otherwise.
pub(crate) const fn mapped_handles() -> u32 {
    16
}

/// How much memory they may share together, in MiB, unless a load says otherwise.
pub(crate) const fn mapped_mib() -> u32 {
    256
}

/// An unload.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct UnloadBody {
    pub(crate) deadline_ms: u64,
    pub(crate) force: bool,
    /// Answer a deadline that passed with the explanation.
    #[serde(default)]
    pub(crate) explain: bool,
}

/// An upgrade. The path is absolute.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct UpgradeBody {
    pub(crate) driver: String,
    pub(crate) deadline_ms: u64,
    pub(crate) probation_ms: u64,
}

/// A rollback.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RollbackBody {
    pub(crate) deadline_ms: u64,
}

/// A revocation.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RevokeBody {
    pub(crate) deadline_ms: u64,
}

/// A port to attach or detach.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PortBody {
    pub(crate) port: String,
}

/// What became of a port, and what serves now.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PortChange {
    pub(crate) binding: String,
    /// The address, with the real port where port 0 was asked for.
    pub(crate) port: String,
    /// Of a detached one: connections that were open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) connections: Option<u64>,
    /// Of those, how many were severed with answers unsent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) severed: Option<u64>,
    /// All ports of the binding, now.
    pub(crate) ports: Vec<String>,
}

/// Why it was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ErrorCode {
    /// The call's words are off.
    Usage,
    /// No such binding, handle, port, driver or path.
    NoSuchThing,
    /// The wait is over, what was waited for is not: unload again to go on.
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
    /// With `still-draining` of an unload that was to explain itself: who holds what.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) explanation: Option<Box<Explanation>>,
    /// With `still-draining` of a revocation: what was revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) revoked: Option<Box<RevokeReport>>,
}

impl ErrorBody {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> ErrorBody {
        ErrorBody { code, message: message.into(), so_far: None, explanation: None, revoked: None }
    }

    pub(crate) fn usage(message: impl std::fmt::Display) -> ErrorBody {
        ErrorBody::new(ErrorCode::Usage, message.to_string())
    }

    pub(crate) fn no_such_thing(message: impl std::fmt::Display) -> ErrorBody {
        ErrorBody::new(ErrorCode::NoSuchThing, message.to_string())
    }

    pub(crate) fn failed(message: impl std::fmt::Display) -> ErrorBody {
        ErrorBody::new(ErrorCode::Failed, message.to_string())
    }

    /// An error with its sources, but for those that it has named itself.
    pub(crate) fn caused(error: &dyn std::error::Error) -> ErrorBody {
        let mut message = error.to_string();
        for source in std::iter::successors(error.source(), |error| error.source()) {
            let text = source.to_string();
            if !message.contains(&text) {
                message = format!("{message}: {text}");
            }
        }
        ErrorBody::failed(message)
    }
}

impl std::fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ErrorBody {}
