//! What a binding waits for, as an operator wants to read it: that first, then who holds what.

use cofferdam_manager::{CallStatus, Explanation, RequestStatus};

use super::{bytes, certificate, handle_lines, millis, print, table};

/// `why`.
pub(crate) fn explanation(explanation: &Explanation) {
    print(&explanation_lines(explanation));
    if let Some(of_the_end) = &explanation.certificate {
        certificate(of_the_end);
    }
}

/// The same as lines, without the certificate of a binding that has left.
pub(crate) fn explanation_lines(e: &Explanation) -> Vec<String> {
    let mut lines = vec![format!("{}: {}", e.name, standing(e))];
    if !e.waits_for.is_empty() {
        lines.push("waits for".into());
        lines.extend(e.waits_for.iter().map(|sentence| format!("  {sentence}")));
    } else if e.certificate.is_none() {
        lines.push("waits for nothing".into());
    }
    if !e.handles.is_empty() {
        lines.push("handles".into());
        lines.extend(handle_lines("  ", &e.handles));
    }
    if !e.requests.is_empty() {
        lines.push("oldest requests".into());
        let row = |request: &RequestStatus| {
            [
                millis(request.age_ms),
                request.operation.clone(),
                request.stage.clone(),
                request.lane.to_string(),
                request.handle.to_string(),
                request.token.clone(),
            ]
        };
        let head = ["AGE", "OPERATION", "STAGE", "LANE", "HANDLE", "TOKEN"];
        lines.extend(table::lines("  ", head, e.requests.iter().map(row)));
    }
    if !e.calls.is_empty() {
        lines.push("calls into the driver".into());
        for call in &e.calls {
            lines.push(format!("  {}", in_words(call)));
            lines.extend(frames(&call.backtrace));
        }
    }
    if let Some(fault) = &e.fault {
        lines.push(format!("fault ({})", fault.kind));
        lines.push(format!("  {}", fault.message));
        lines.extend(frames(&fault.backtrace));
    }
    if e.retired_bytes > 0 {
        lines.push("retired memory".into());
        lines.push(format!("  {}, until the daemon ends", bytes(e.retired_bytes)));
    }
    lines
}

/// `draining (waiting, unload, forced) for 2.5 s`.
fn standing(e: &Explanation) -> String {
    let state = (e.state != e.phase).then(|| e.state.clone());
    let notes = [state, e.cause.clone(), e.forced.then(|| "forced".into()), e.pinned.then(|| "pinned".into())];
    let notes: Vec<String> = notes.into_iter().flatten().collect();
    let notes = if notes.is_empty() { String::new() } else { format!(" ({})", notes.join(", ")) };
    let since = match e.draining_ms {
        Some(ms) if e.certificate.is_none() => format!(" for {}", millis(ms)),
        _ => String::new(),
    };
    format!("{}{notes}{since}", e.phase)
}

fn in_words(call: &CallStatus) -> String {
    let import = call.import.as_ref().map_or_else(String::new, |import| format!(", in the host's {import}"));
    let lane = if call.lane == "control" { "control" } else { &format!("lane {}", call.lane) };
    let core = call.core.map_or_else(String::new, |core| format!(", core {core}"));
    let interrupted = if call.interrupted { ", told to stop" } else { "" };
    format!("{lane}: {}{import}, for {}, thread {}{core}{interrupted}", call.export, millis(call.age_ms), call.thread)
}

fn frames(backtrace: &[String]) -> impl Iterator<Item = String> {
    backtrace.iter().enumerate().map(|(number, frame)| format!("    #{number:<2} {frame}"))
}

/// What does not change while everything stays where it is: by this a person who waits is told only of what is new.
pub(crate) fn fingerprint(e: &Explanation) -> Vec<String> {
    let standing = [&e.state, e.cause.as_ref().unwrap_or(&e.phase)].map(String::clone);
    let handles = e.handles.iter().map(|handle| format!("handle {}", handle.id));
    let requests = e.requests.iter().map(|request| format!("{} {}", request.token, request.stage));
    let call = |call: &CallStatus| format!("{} {} {:?} {}", call.lane, call.export, call.import, call.interrupted);
    standing.into_iter().chain(handles).chain(requests).chain(e.calls.iter().map(call)).collect()
}
