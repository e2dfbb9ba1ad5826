//! What a count costs, against everything else that could keep a module from being unloaded
//! under its users. `cargo bench -p cofferdam-gate` prints a table.
//!
//! Arguments: `--json PATH` writes a list of `{"case","threads","gates","ns"}`; `--quick` runs
//! fewer rounds.
//!
//! How it is measured: one slice of about a millisecond per case and round, the cases of a
//! round one after the other, the cost of the empty loop taken off, and the median of the
//! rounds. Threads are tied to cores of their own. Cases that never block are measured in
//! processor time of their thread, so that other load on the machine does not count as theirs
//! (it lowers contention, which flatters the cases that share a line and not the gate); cases
//! that may block are measured by the wall clock. Latencies are single events by the wall clock.

mod cases;
mod latency;
mod report;

use report::{Report, Row};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let portable = arguments.iter().any(|argument| argument == "--portable-child");
    let json = arguments
        .iter()
        .position(|argument| argument == "--json")
        .map(|at| arguments.get(at + 1).unwrap_or_else(|| panic!("--json needs a path")).clone());
    let rounds = if quick { 15 } else { 75 };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if portable {
        // The same gate in its portable form: this process was told so by its environment.
        for row in cases::measure(&cases::gate_cases(), cores, rounds) {
            println!("{} {} {} {}", row.case, row.threads, row.gates, row.ns);
        }
        return;
    }
    eprintln!("mechanism: {} ({})", cofferdam_gate::mechanism(), cofferdam_gate::mechanism_reason());
    let mut rows = cases::measure(&cases::all_cases(), cores, rounds);
    rows.extend(portable_rows(quick));
    rows.extend(latency::measure(if quick { 300 } else { 2000 }));
    let report = Report::new(rows, cores);
    report.print();
    if let Some(path) = json {
        report.write_json(&path).unwrap_or_else(|error| panic!("cannot write {path}: {error}"));
    }
}

/// Runs this program again with the portable form forced.
fn portable_rows(quick: bool) -> Vec<Row> {
    let program = std::env::current_exe().expect("this program has a path");
    let mut command = std::process::Command::new(program);
    command.arg("--portable-child").env(cofferdam_gate::MECHANISM_VARIABLE, "xadd");
    if quick {
        command.arg("--quick");
    }
    let output = command.output().expect("the child starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("the child writes text");
    let rows = text.lines().map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        Row {
            case: format!("{}-xadd", words[0]),
            threads: words[1].parse().expect("a number"),
            gates: words[2].parse().expect("a number"),
            ns: words[3].parse().expect("a number"),
        }
    });
    rows.collect()
}
