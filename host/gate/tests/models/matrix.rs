//! Runs models against mutants, each pair in a process of its own.

use std::collections::BTreeMap;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use cofferdam_gate::model::{MUTANTS, Mechanism, Mutant, configure};

use crate::batches;
use crate::scenes::{self, Scene};

const MECHANISMS: [Mechanism; 2] = [Mechanism::Rseq, Mechanism::Xadd];
/// The child explored everything and found nothing.
const SURVIVED: i32 = 0;
/// The child panicked: the model failed.
const KILLED: i32 = 101;

/// One run of one model.
#[derive(Clone, Copy)]
struct Run {
    scene: &'static Scene,
    mechanism: Mechanism,
    mutant: Option<Mutant>,
    /// What must come out, if anything must.
    expected: Option<i32>,
}

pub(crate) fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "child") {
        child(&arguments[1..]);
        return ExitCode::SUCCESS;
    }
    let long = arguments.iter().any(|argument| argument == "--long");
    let filters: Vec<&String> = arguments.iter().filter(|word| !word.starts_with("--")).collect();
    let runs: Vec<Run> = scenes()
        .filter(|scene| filters.is_empty() || filters.iter().any(|word| scene.name.contains(*word)))
        .flat_map(|scene| plan(scene, long))
        .collect();
    let outcomes = run_all(&runs, long);
    report(&runs, &outcomes, filters.is_empty())
}

/// Every model.
fn scenes() -> impl Iterator<Item = &'static Scene> {
    scenes::SCENES.iter().chain(batches::SCENES)
}

/// The runs of one model.
fn plan(scene: &'static Scene, long: bool) -> Vec<Run> {
    let mut runs = Vec::new();
    for mechanism in MECHANISMS {
        runs.push(Run { scene, mechanism, mutant: None, expected: Some(SURVIVED) });
        for mutant in MUTANTS {
            let kills = scene.kills.iter().any(|kill| kill.0 == *mutant && kill.1.is_none_or(|only| only == mechanism));
            if kills || long {
                let expected = kills.then_some(KILLED);
                runs.push(Run { scene, mechanism, mutant: Some(*mutant), expected });
            }
        }
    }
    runs
}

/// Runs them, as many at once as there are cores; answers exit code and what was said.
fn run_all(runs: &[Run], long: bool) -> Vec<(i32, String, f64)> {
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(BTreeMap::new());
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Relaxed);
                    let Some(run) = runs.get(at) else { return };
                    let outcome = run_one(run, long);
                    outcomes.lock().expect("no worker panics").insert(at, outcome);
                }
            });
        }
    });
    outcomes.into_inner().expect("no worker panics").into_values().collect()
}

fn run_one(run: &Run, long: bool) -> (i32, String, f64) {
    let begun = Instant::now();
    let mutant = run.mutant.map_or_else(|| "none".to_owned(), |mutant| format!("{mutant:?}"));
    let output = Command::new(std::env::current_exe().expect("this program has a path"))
        .args(["child", run.scene.name, &format!("{:?}", run.mechanism), &mutant])
        .arg(if long { "long" } else { "short" })
        .stdin(Stdio::null())
        .output()
        .expect("the child starts");
    // A panic while loom unwinds its threads aborts: a failed model as well.
    let code = match output.status.code() {
        Some(code) => code,
        None => KILLED,
    };
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    (code, said, begun.elapsed().as_secs_f64())
}

fn child(arguments: &[String]) {
    let [scene, mechanism, mutant, length] = arguments else { panic!("four words") };
    let scene = scenes().find(|known| known.name == scene).expect("a model of this name");
    let mechanism = MECHANISMS.into_iter().find(|known| format!("{known:?}") == *mechanism);
    let mutant = MUTANTS.iter().copied().find(|known| format!("{known:?}") == *mutant);
    configure(mechanism.expect("a mechanism of this name"), mutant);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(scene.preemptions + usize::from(length == "long"));
    builder.max_branches = 100_000;
    static EXPLORED: AtomicUsize = AtomicUsize::new(0);
    let act = scene.act;
    builder.check(move || {
        EXPLORED.fetch_add(1, Relaxed);
        act();
    });
    println!("explored {}", EXPLORED.load(Relaxed));
}

/// Prints the table; fails when a model failed or a mutant lived.
fn report(runs: &[Run], outcomes: &[(i32, String, f64)], whole: bool) -> ExitCode {
    let mut bad = 0;
    let mut killers: BTreeMap<String, Vec<String>> = BTreeMap::new();
    println!("\nmodel                              mechanism        mutant                      outcome");
    for (run, (code, said, seconds)) in runs.iter().zip(outcomes) {
        let mutant = run.mutant.map_or_else(|| "-".to_owned(), |mutant| format!("{mutant:?}"));
        let outcome = match *code {
            SURVIVED => said.lines().rfind(|line| line.starts_with("explored")).unwrap_or("?"),
            KILLED if run.mutant.is_some() => "killed",
            _ => "FAILED",
        };
        let wrong = run.expected.is_some_and(|expected| expected != *code) || (*code != SURVIVED && *code != KILLED);
        println!(
            "{:34} {:16} {:27} {outcome} in {seconds:.2} s{}",
            run.scene.name,
            run.mechanism.as_str(),
            mutant,
            if wrong { "  <-- WRONG" } else { "" },
        );
        if wrong {
            bad += 1;
            println!("{}", said.lines().take(12).collect::<Vec<_>>().join("\n"));
        }
        if run.mutant.is_some() && *code == KILLED {
            let by = format!("{} ({})", run.scene.name, run.mechanism);
            killers.entry(mutant).or_default().push(by);
        }
    }
    println!("\nmutants and the models that kill them:");
    for mutant in MUTANTS {
        let name = format!("{mutant:?}");
        let by = killers.get(&name).map_or_else(|| "NOBODY".to_owned(), |by| by.join(", "));
        println!("  {name:27} {by}");
        if whole && !killers.contains_key(&name) {
            bad += 1;
        }
    }
    println!("\n{} runs, {bad} wrong", runs.len());
    if bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
