//! The table for readers: `docs/LIFECYCLE.md`.

use std::fmt::Write;

use crate::event::{Cause, EventKind};
use crate::state::State;
use crate::table::{TABLE, Transition, When};

const INTRODUCTION: &str = "\
# The life of a binding

<!-- Printed by host/lifecycle from its table. UPDATE_SNAPSHOTS=1 cargo test -p cofferdam-lifecycle writes it anew. -->

A binding joins a driver and a device. It is loaded, it serves, and it leaves by the ladder, whatever the reason: an operator's unload, a device that went away, a
fault, a load that failed, the end of the daemon. A driver that breaks down is replaced while its clients wait; only one that does so too often is given up. With
`--reconnect` a device that is lost or breaks its rules is waited for, likewise.

In every state there is one thing to do, the effect. What comes of it is an event, and the table says which state is next. The manager carries out effects and
decides nothing; `cofferdam events` shows the steps as they are taken. What an effect does is documented at `Effect` in `host/lifecycle/src/state.rs`.

Three things to know when reading:

- **`draining` alone can be given up.** Every other effect ends within a bound of its own. A binding that is `waiting` admits nothing, and the next `leave`, an
  operator's or any other, goes on with the drain.
- **Silence decides about requests and memory.** Of a silent device what it has not done is answered as failed and the memory is freed. Of a device that may still act
  nothing is said to have failed, and the memory is retired: never used again and counted under `leaked`.
- **Every effect can be carried out again.** If the thread that carries them out dies, another one goes on from the state.
";

const MARKS: &str = "\
## What is remembered

| mark | set by | what for |
| --- | --- | --- |
| cause | the first `leave`; `device-lost` means removed, `device-broken` means fault | the outcome, and what stays of a pinned binding |
| forced | any `leave` with force, for good | the drain may be cut short |
| silent | `silent`, `not-silent` | whether memory is freed |
| pinned | the load | refuses unload; keeps memory and code when the device goes away or a rule is broken |

What has happened to a binding replaces what was wanted of it, until silence is decided:

";

const TABLE_INTRODUCTION: &str = "
## The table

What has no row is refused and changes nothing. *To stay* are memory and code of a pinned binding whose device went away or that broke a rule: until the process
ends. A `leave` of a binding that is already on its way changes the marks alone; those rows are left out of the graph.

";

/// The whole document, as it is in `docs/LIFECYCLE.md`.
pub fn document() -> String {
    let mut text = String::from(INTRODUCTION);
    text.push_str("\n## The graph\n\n```mermaid\n");
    text.push_str(&graph_mermaid());
    text.push_str("```\n\n");
    text.push_str(MARKS);
    text.push_str(&causes_markdown());
    text.push_str(TABLE_INTRODUCTION);
    text.push_str(&table_markdown());
    text
}

/// The table, one row a line, in Markdown.
pub fn table_markdown() -> String {
    let mut text = String::from("| state | effect | event | if | next |\n| --- | --- | --- | --- | --- |\n");
    for &Transition { from, event, when, to } in TABLE {
        let next = if from == to { "(stays)" } else { to.as_str() };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {from} | {} | {event} | {when} | {next} |", from.effect());
    }
    text
}

/// The graph, as a mermaid `stateDiagram-v2`, without the rows that stay where they are.
pub fn graph_mermaid() -> String {
    let mut text = String::from("stateDiagram-v2\n");
    for state in State::ALL {
        let _ = writeln!(text, "    state \"{state}\" as {state:?}");
    }
    text.push_str("    [*] --> Loading\n");
    for &Transition { from, event, when, to } in TABLE.iter().filter(|row| row.from != row.to) {
        let condition = match when {
            When::Always => String::new(),
            other => format!(" ({other})"),
        };
        let _ = writeln!(text, "    {from:?} --> {to:?}: {event}{condition}");
    }
    text.push_str("    Detached --> [*]\n");
    text
}

/// Which cause is left when a second one comes.
fn causes_markdown() -> String {
    let mut text = String::from("| first |");
    for cause in Cause::ALL {
        let _ = write!(text, " then {cause} |");
    }
    text.push_str("\n| --- |");
    text.push_str(&" --- |".repeat(Cause::ALL.len()));
    text.push('\n');
    for first in Cause::ALL {
        let _ = write!(text, "| {first} |");
        for second in Cause::ALL {
            let _ = write!(text, " {} |", if second.overtakes(*first) { second } else { first });
        }
        text.push('\n');
    }
    text
}

// The graph leaves out what stays where it is; nothing but `leave` may.
const _: () = {
    let mut at = 0;
    while at < TABLE.len() {
        let row = &TABLE[at];
        assert!(row.from as u8 != row.to as u8 || matches!(row.event, EventKind::Leave));
        at += 1;
    }
};
