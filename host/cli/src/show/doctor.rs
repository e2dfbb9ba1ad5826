//! What the machine can do.

use serde_json::{Map, Value, json};

use super::{line, print, table};
use crate::doctor::Check;

pub(crate) fn doctor(checks: &[Check]) {
    let row = |check: &Check| [check.name.to_owned(), check.status.as_str().to_owned(), check.detail.clone()];
    let lines = table::lines("", ["WHAT", "STATUS", "DETAIL"], checks.iter().map(row));
    let (head, rows) = lines.split_at(1);
    print(head);
    for (check, text) in checks.iter().zip(rows) {
        line(text);
        if let Some(mend) = &check.mend {
            line(&format!("    -> {mend}"));
        }
    }
}

/// `doctor --json`.
pub(crate) fn doctor_json(checks: &[Check], is_ready: bool) {
    let of = |check: &Check| {
        let Check { name, status, detail, mend } = check;
        ((*name).to_owned(), json!({ "status": status.as_str(), "detail": detail, "mend": mend }))
    };
    let checks: Map<String, Value> = checks.iter().map(of).collect();
    super::json(&json!({ "vhost_user_ready": is_ready, "checks": checks }));
}
