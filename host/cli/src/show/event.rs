//! Events as lines.

use cofferdam_manager::{EventKind, EventRecord};

use super::{bytes, count, harmless};

/// One line of text, or more where there is a backtrace; without the last line's end.
pub(crate) fn event(record: &EventRecord) -> String {
    let what = what(&record.what);
    let mut lines = what.lines();
    let first = format!("{} {:>6}  ", time(record.unix_micros), record.seq);
    let first = match &record.what {
        // A gap stands between events and is none of a binding's.
        EventKind::Gap { .. } => first,
        _ => format!("{first}{}/{}  ", harmless(&record.binding), record.generation),
    };
    let mut text = format!("{first}{}", harmless(lines.next().unwrap_or_default()));
    for line in lines {
        text.push_str("\n    ");
        text.push_str(&harmless(line));
    }
    text
}

fn what(what: &EventKind) -> String {
    match what {
        EventKind::State { from, to, cause, detail, .. } => {
            let mut text = match from.as_str() {
                "" => to.clone(),
                from => format!("{from} -> {to}"),
            };
            if let Some(cause) = cause {
                text.push_str(&format!(" ({cause})"));
            }
            if let Some(detail) = detail {
                text.push_str(&format!(": {detail}"));
            }
            text
        }
        EventKind::Fault { kind, message, backtrace } => {
            let frames: String = backtrace.iter().map(|frame| format!("\n{frame}")).collect();
            format!("fault ({kind}): {message}{frames}")
        }
        EventKind::DeviceAway { reason, wait_ms } => {
            format!("device away: {reason}; it is waited for up to {:.1} s", *wait_ms as f64 / 1e3)
        }
        EventKind::DeviceBack { again, waited_micros } => {
            let waited = *waited_micros as f64 / 1e6;
            format!("device back after {waited:.3} s, {} given again", count(*again, "request"))
        }
        EventKind::DeviceGivenUp { reason } => format!("device given up: {reason}"),
        EventKind::PortAttached { port } => format!("port attached: {port}"),
        EventKind::PortDetached { port, connections, severed, ended } => {
            let left_behind = if *ended { "" } else { "; it did not end in time and was left behind" };
            let connections = count(*connections, "connection");
            format!("port detached: {port} ({connections}, {severed} severed with answers unsent){left_behind}")
        }
        EventKind::HandleRevoked { handle, port, peer } => format!("handle {handle} revoked: {port}, {peer}"),
        EventKind::ConfigChanged { refused: Some(why), .. } => format!("configuration changed, refused: {why}"),
        EventKind::ConfigChanged { changes, refused: None } => format!("configuration changed: {}", changes.join(", ")),
        EventKind::Upgraded { from, to, blackout_micros } => {
            format!("upgraded: {from} -> {to}, clients waited {blackout_micros} us")
        }
        EventKind::TakenOver { connections, blackout_micros } => {
            format!("taken over with {connections} connections, clients waited {blackout_micros} us")
        }
        EventKind::RolledBack { from, to, reason } => format!("rolled back: {from} -> {to}: {reason}"),
        EventKind::Trusted { driver, device } => {
            format!("{driver} is trusted (--trust-dma): it may have {device} reach any memory of this machine")
        }
        EventKind::Retired { bytes: size, reason } => format!("memory retired: {}: {reason}", bytes(*size)),
        EventKind::Gap { missed } => format!("-- {} missed: they are no longer kept --", count(*missed, "event")),
    }
}

/// UTC as RFC 3339 has it, from microseconds since 1970.
pub(super) fn time(unix_micros: u64) -> String {
    let (seconds, micros) = (unix_micros / 1_000_000, unix_micros % 1_000_000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

/// The Gregorian date of a day since 1970-01-01. The calendar repeats after 400 years of 146,097 days; years begin in March here, so that a leap day is a year's last.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (400 * era + year + next, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(what: EventKind) -> EventRecord {
        EventRecord { seq: 7, unix_micros: 1_709_210_096_000_012, binding: "disk0".into(), generation: 1, what }
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (micros, text) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400_000_000, "2000-02-29T00:00:00.000000Z"),
            (1_709_210_096_000_012, "2024-02-29T12:34:56.000012Z"),
            (4_107_542_399_999_999, "2100-02-28T23:59:59.999999Z"),
            (4_107_542_400_000_000, "2100-03-01T00:00:00.000000Z"),
            (1_735_689_599_000_000, "2024-12-31T23:59:59.000000Z"),
        ] {
            assert_eq!(time(micros), text);
        }
        assert!(time(u64::MAX).ends_with('Z'));
    }

    #[test]
    fn a_transition_is_a_line_with_its_cause() {
        let state = |from: &str, to: &str, phase: &str, cause: Option<&str>, detail: Option<&str>| EventKind::State {
            from: from.into(),
            to: to.into(),
            phase: phase.into(),
            cause: cause.map(str::to_owned),
            detail: detail.map(str::to_owned),
        };
        let text = |what| event(&record(what));
        let head = "2024-02-29T12:34:56.000012Z      7  disk0/1  ";
        assert_eq!(text(state("", "loading", "loading", None, None)), format!("{head}loading"));
        assert_eq!(
            text(state("draining", "waiting", "draining", Some("unload"), Some("1 request"))),
            format!("{head}draining -> waiting (unload): 1 request")
        );
    }

    #[test]
    fn what_a_guest_says_cannot_play_with_the_terminal() {
        let fault = EventKind::Fault {
            kind: "trap".into(),
            message: "a\u{1b}[2Jb".into(),
            backtrace: vec!["f\rx".into(), "g".into()],
        };
        let text = event(&record(fault));
        assert!(text.ends_with("fault (trap): a\\u{1b}[2Jb\n    f\\rx\n    g"), "{text}");
    }

    #[test]
    fn a_configuration_change_says_what_is_new_or_why_it_is_refused() {
        let text = |changes: &[&str], refused: Option<&str>| {
            let changes = changes.iter().map(|change| (*change).to_owned()).collect();
            event(&record(EventKind::ConfigChanged { changes, refused: refused.map(str::to_owned) }))
        };
        let grown = text(&["capacity-bytes 1 -> 2", "read-only false -> true"], None);
        assert!(grown.ends_with("configuration changed: capacity-bytes 1 -> 2, read-only false -> true"), "{grown}");
        let refused = text(&[], Some("no\u{1b}[2J"));
        assert!(refused.ends_with("configuration changed, refused: no\\u{1b}[2J"), "{refused}");
    }

    #[test]
    fn a_gap_is_a_line_without_a_binding() {
        let text = event(&record(EventKind::Gap { missed: 1 }));
        assert_eq!(text, "2024-02-29T12:34:56.000012Z      7  -- 1 event missed: they are no longer kept --");
    }
}
