//! The table of invariants in docs/ARCHITECTURE.md: whatever it names exists.

use super::sources::sources;
use std::collections::BTreeSet;

/// Those that the design gives numbers to; more may follow.
const NUMBERED: &[(char, u32)] = &[('G', 9), ('L', 7), ('D', 2)];

struct Row {
    number: String,
    files: Vec<String>,
    tests: Vec<String>,
    /// Why there is no test.
    excuse: Option<String>,
}

/// What stands between backticks.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn rows() -> Vec<Row> {
    let path = crate::workspace::root().join("docs/ARCHITECTURE.md");
    let text = std::fs::read_to_string(path).expect("docs/ARCHITECTURE.md");
    let (_, table) = text.split_once("## Invariants").expect("a section on invariants");
    let rows =
        table.lines().skip_while(|line| !line.starts_with("| ---")).skip(1).take_while(|line| line.starts_with('|'));
    rows.map(|line| {
        let cells: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        assert_eq!(cells.len(), 5, "{line}");
        let excuse = cells[4].strip_prefix("none: ").map(str::to_owned);
        Row { number: cells[0].to_owned(), files: quoted(cells[3]), tests: quoted(cells[4]), excuse }
    })
    .collect()
}

/// A test function, one of the gate's models, or a scenario of a virtual machine.
fn name_of_test(line: &str) -> Option<&str> {
    if let Some(rest) = line.strip_prefix("fn ") {
        return rest.split(['(', '<']).next();
    }
    if let Some(rest) = line.strip_prefix("Scenario::new(") {
        return rest.split('"').nth(3);
    }
    line.strip_prefix("name: \"")?.strip_suffix("\",")
}

#[test]
fn the_table_of_invariants_names_files_and_tests_that_exist() {
    let sources = sources();
    let functions: BTreeSet<&str> = sources
        .iter()
        .filter(|(name, _)| name.ends_with(".rs"))
        .flat_map(|(_, text)| text.lines())
        .filter_map(|line| name_of_test(line.trim_start()))
        .collect();
    let mut wrong = Vec::new();
    for row in rows() {
        for file in &row.files {
            if !sources.iter().any(|(name, _)| name == file) {
                wrong.push(format!("{}: no file {file}", row.number));
            }
        }
        for test in &row.tests {
            if !functions.contains(test.as_str()) {
                wrong.push(format!("{}: no test {test}", row.number));
            }
        }
        if row.tests.is_empty() && row.excuse.is_none() {
            wrong.push(format!("{}: neither a test nor a reason why there is none", row.number));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_number_of_the_design_and_every_one_cited_is_in_the_table() {
    let known: BTreeSet<String> = rows().into_iter().map(|row| row.number).collect();
    let mut wanted: BTreeSet<String> =
        NUMBERED.iter().flat_map(|(letter, last)| (1..=*last).map(move |n| format!("{letter}{n}"))).collect();
    let letters: BTreeSet<char> = known.iter().filter_map(|number| number.chars().next()).collect();
    for (_, text) in sources().iter().filter(|(name, _)| name.ends_with(".rs") && name.starts_with("host/")) {
        for comment in text.lines().filter_map(|line| line.split_once("//")).map(|(_, comment)| comment) {
            let words = comment.split(|c: char| !c.is_ascii_alphanumeric());
            wanted.extend(words.filter(|word| is_number(word, &letters)).map(str::to_owned));
        }
    }
    let missing: Vec<_> = wanted.difference(&known).collect();
    assert!(missing.is_empty(), "cited and not in docs/ARCHITECTURE.md: {missing:?}");
}

/// A letter of the table and a small number: `G4`, not `V1_2` or `D3D12`.
fn is_number(word: &str, letters: &BTreeSet<char>) -> bool {
    let mut chars = word.chars();
    let letter = chars.next().is_some_and(|letter| letters.contains(&letter));
    let digits = chars.as_str();
    letter && (1..=2).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit())
}
