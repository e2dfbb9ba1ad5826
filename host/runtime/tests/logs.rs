//! What a driver says reaches the log with who said it, bounded in rate and length.

mod support;

use std::sync::{Arc, Mutex};

use cofferdam_runtime::LaneDriver;
use support::{Guest, instance, module, requests, runtime, spec};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// One event, with its fields as text.
#[derive(Clone, Debug)]
struct Line {
    level: Level,
    fields: Vec<(&'static str, String)>,
}

impl Line {
    fn get(&self, name: &str) -> &str {
        self.fields.iter().find(|(n, _)| *n == name).map_or("", |(_, value)| value)
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.fields.push((field.name(), format!("{value:?}")));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.push((field.name(), value.to_owned()));
    }
}

#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<Line>>>);

impl Subscriber for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "cofferdam::driver"
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut line = Line { level: *event.metadata().level(), fields: Vec::new() };
        event.record(&mut line);
        self.0.lock().unwrap().push(line);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

fn recorded(run: impl FnOnce()) -> Vec<Line> {
    let recorder = Recorder::default();
    tracing::subscriber::with_default(recorder.clone(), run);
    let lines = recorder.0.lock().unwrap();
    lines.clone()
}

/// Writes the `length` bytes at 512 `times` times at level `level`.
fn speaking(level: u32, length: u32, times: u32, data: &str) -> Guest {
    let submit = format!(
        "(local $i i32)
        (loop $again (call $log (i32.const {level}) (i32.const 512) (i32.const {length}))
            (local.set $i (i32.add (local.get $i) (i32.const 1))) (br_if $again (i32.lt_u (local.get $i) (i32.const {times}))))
        (i64.store (i32.const 256) (i64.const 0)) (i32.const 256)"
    );
    Guest { more: format!(r#"(data (i32.const 512) "{data}")"#), ..Guest::submit(&submit) }
}

#[test]
fn a_line_says_who_spoke_and_is_escaped() {
    let lines = recorded(|| {
        let mut lane = instance(&runtime(), &speaking(1, 4, 1, r"a\0ab\07"));
        lane.submit(&requests(1), &mut Vec::new()).unwrap();
    });
    let [line] = &lines[..] else { panic!("{lines:?}") };
    assert_eq!(line.level, Level::WARN);
    assert_eq!(line.get("line"), "a\\nb\\u{7}");
    assert_eq!(
        (line.get("binding"), line.get("driver"), line.get("device"), line.get("generation")),
        ("disk0", "guest", "fake:0", "1")
    );
}

#[test]
fn a_long_line_is_cut() {
    let lines = recorded(|| {
        let guest = Guest { pages: 20, ..speaking(2, 1 << 20, 1, "x") };
        instance(&runtime(), &guest).submit(&requests(1), &mut Vec::new()).unwrap();
    });
    let text = lines[0].get("line");
    assert!(text.starts_with('x') && text.ends_with("..."), "{} bytes", text.len());
    // Zero bytes are six when escaped.
    assert!(text.len() <= 4096 * 6 + 3, "{} bytes", text.len());
}

#[test]
fn a_flood_is_cut_over_all_lanes_of_a_driver_and_the_rest_is_counted() {
    let lines = recorded(|| {
        let runtime = runtime();
        let module = module(&runtime, &speaking(2, 1, 3_000, "x"));
        let mut first = module.instantiate(spec()).unwrap();
        let mut second = module.instantiate(spec()).unwrap();
        for lane in [&mut first, &mut second] {
            lane.submit(&requests(1), &mut Vec::new()).unwrap();
        }
    });
    let spoken = lines.iter().filter(|line| line.get("line") == "x").count();
    let dropped: u64 = lines.iter().map(|line| line.get("dropped").parse().unwrap_or(0)).sum();
    // A slow machine may see a second pass in between.
    assert!((1_000..=2_000).contains(&spoken), "{spoken}");
    assert_eq!(spoken as u64 + dropped, 6_000);
    assert!(lines.len() <= spoken + 3, "dropped lines are told at most once per second");
}
