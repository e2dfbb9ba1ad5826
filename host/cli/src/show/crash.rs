//! How drivers broke down.

use cofferdam_manager::{CrashCall, CrashReport};

use super::{event, line, print};

/// `crashes`.
pub(crate) fn crashes(binding: &str, crashes: &[CrashReport]) {
    if crashes.is_empty() {
        return line(&format!("{binding}: its driver has not broken down"));
    }
    crashes.iter().for_each(|crash| print(&lines(crash)));
}

fn lines(crash: &CrashReport) -> Vec<String> {
    let CrashReport { number, binding, driver, generation, lane, kind, message, .. } = crash;
    let lane = if lane == "control" { "control lane".to_owned() } else { format!("lane {lane}") };
    let mut lines = vec![
        format!(
            "{} {binding} crash {number}: {driver} (generation {generation}, {lane})",
            event::time(crash.unix_micros)
        ),
        format!("  {kind}: {message}"),
    ];
    lines.extend(crash.backtrace.iter().map(|frame| format!("    {frame}")));
    if !crash.calls.is_empty() {
        lines.push(format!("  last calls: {}", calls(&crash.calls)));
    }
    if let Some(pause) = crash.pause_micros {
        lines.push(format!("  clients waited {pause} us for the next driver"));
    }
    if let Some(core) = &crash.core {
        lines.push(format!("  core dump: {}", core.display()));
    }
    lines
}

/// In their order, with what came several times in a row told once.
fn calls(calls: &[CrashCall]) -> String {
    let mut told: Vec<(String, u32)> = Vec::new();
    for CrashCall { export, import } in calls.iter().rev() {
        let call = import.as_ref().map_or_else(|| export.clone(), |import| format!("{export} (in {import})"));
        match told.last_mut().filter(|(last, _)| *last == call) {
            Some((_, times)) => *times += 1,
            None => told.push((call, 1)),
        }
    }
    let each = told.iter().map(|(call, times)| if *times > 1 { format!("{call} x{times}") } else { call.clone() });
    each.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_is_told_with_its_stack_and_its_last_calls_in_their_order() {
        let call =
            |export: &str, import: Option<&str>| CrashCall { export: export.into(), import: import.map(str::to_owned) };
        let crash = CrashReport {
            number: 3,
            unix_micros: 0,
            binding: "disk0".into(),
            driver: "virtio-blk.wasm".into(),
            digest: "00".into(),
            device: "pci:0000:00:04.0".into(),
            generation: 4,
            lane: "control".into(),
            kind: "trap".into(),
            message: "unreachable".into(),
            backtrace: vec!["driver: submit at 0x1".into()],
            calls: vec![
                call("submit", Some("log.write")),
                call("submit", None),
                call("submit", None),
                call("start", None),
            ],
            pause_micros: Some(250),
            core: Some("/spool/disk0.core".into()),
        };
        let expected = [
            "1970-01-01T00:00:00.000000Z disk0 crash 3: virtio-blk.wasm (generation 4, control lane)",
            "  trap: unreachable",
            "    driver: submit at 0x1",
            "  last calls: start, submit x2, submit (in log.write)",
            "  clients waited 250 us for the next driver",
            "  core dump: /spool/disk0.core",
        ];
        assert_eq!(lines(&crash), expected);
    }
}
