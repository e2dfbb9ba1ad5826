//! `docs/WRITING-A-DRIVER.md`, carried out: its files written, its commands run, from nothing to a driver that serves. Nothing is fetched.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cofferdam_process_tests::process::Process;
use cofferdam_process_tests::programs;

/// Whether there is a port `fifo:` to serve at; until then its part of a command is left out, and what reads from it.
const HAS_FIFO: bool = true;
/// It compiles a crate natively and for Wasm, with all that the SDK needs.
const BOUND: Duration = Duration::from_secs(300);

/// What stands in front of the document's commands: the first that fails is the last, and what runs in the background ends with the shell.
pub(crate) const BEGIN: &str = r#"set -eu -o pipefail
trap 'running=$(jobs -p); [ -z "$running" ] || kill $running || true; wait' EXIT
ready() {
    for _ in $(seq 400); do
        if grep -qE '^(ready |cofferdam daemon on )' "$1"; then return; fi
        sleep 0.05
    done
    cat "$1" >&2
    return 1
}
"#;

/// A block of the document.
struct Block<'a> {
    language: &'a str,
    /// The file that it is text of.
    path: Option<&'a str>,
    text: String,
}

fn blocks(document: &str) -> Vec<Block<'_>> {
    let mut blocks = Vec::new();
    let mut lines = document.lines();
    while let Some(line) = lines.next() {
        let Some(head) = line.strip_prefix("```") else { continue };
        let (language, path) = head.split_once(' ').map_or((head, None), |(language, path)| (language, Some(path)));
        let text =
            lines.by_ref().take_while(|line| *line != "```").fold(String::new(), |text, line| text + line + "\n");
        blocks.push(Block { language, path, text });
    }
    blocks
}

/// The document as a program for bash.
fn script(document: &str) -> String {
    let mut script = BEGIN.to_owned();
    let (mut files, mut background) = (HashSet::new(), 0);
    for Block { language, path, text } in blocks(document) {
        if let Some(path) = path {
            let how = if files.insert(path) { "cat >" } else { "(echo; cat) >>" };
            let _ =
                writeln!(script, "mkdir -p \"$(dirname {path})\"\n{how} {path} <<'END OF BLOCK'\n{text}END OF BLOCK");
        }
        if language != "console" {
            continue;
        }
        for command in text.lines().filter_map(|line| line.strip_prefix("$ ")) {
            let mut command = command.to_owned();
            if !HAS_FIFO {
                command = command.replace(" --port \"fifo:$PWD/random\"", "");
                if command.starts_with("head --bytes 16 random") {
                    continue;
                }
            }
            let _ = writeln!(script, "printf '%s\\n' {}", quoted(&format!("$ {command}")));
            match command.strip_suffix(" &") {
                // A reader waits for what it says; so does the shell.
                Some(command) => {
                    background += 1;
                    let log = format!("background-{background}.log");
                    let _ = writeln!(script, "{command} > {log} 2>&1 &\nready {log}");
                }
                None => drop(writeln!(script, "{command}")),
            }
        }
    }
    script
}

pub(crate) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// bash in the checkout, with nothing of this test's own environment but where Rust is.
fn shell(script: &Path, temporary: &Path, root: &Path) -> Command {
    let mut bash = Command::new("bash");
    bash.arg(script).current_dir(root).env_clear();
    for name in ["PATH", "HOME", "CARGO_HOME", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN", "COFFERDAM_RUST_LIBRARY"] {
        bash.envs(std::env::var_os(name).map(|value| (name, value)));
    }
    bash.env("TMPDIR", temporary).env("CARGO_NET_OFFLINE", "true").env("XDG_CACHE_HOME", temporary);
    bash
}

#[test]
fn the_document_about_drivers_ends_in_a_driver_that_serves() {
    let root: PathBuf = programs::root();
    let document = std::fs::read_to_string(root.join("docs/WRITING-A-DRIVER.md")).expect("the document");
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("document.sh");
    std::fs::write(&program, script(&document)).expect("a file");
    let ended = Process::run_for(&mut shell(&program, folder.path(), &root), BOUND).expect(0);
    for words in [
        // Its tests, natively.
        "test result: ok. 4 passed",
        // The component.
        "  service   entropy\n  devices   virtio:4\n",
        "rng0  ",
        "certificate: rng0 (my-rng.wasm on vhost-user:",
        "  left      nothing\n",
    ] {
        assert!(ended.stdout.contains(words), "{words:?} is not in\n{}\n{}", ended.stdout, ended.stderr);
    }
}

#[test]
fn the_driver_of_the_document_is_the_one_that_is_shipped() {
    let root = programs::root();
    let document = std::fs::read_to_string(root.join("docs/WRITING-A-DRIVER.md")).expect("the document");
    let shipped = std::fs::read_to_string(root.join("guest-drivers/virtio-rng/src/lib.rs")).expect("the driver");
    let code: HashSet<&str> = shipped.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let blocks = blocks(&document);
    let parts: Vec<&Block<'_>> = blocks.iter().filter(|block| block.path == Some("src/lib.rs")).collect();
    assert!(parts.len() > 3, "{} blocks", parts.len());
    for line in parts.iter().flat_map(|part| part.text.lines()) {
        assert!(line.trim_start().starts_with("//") || code.contains(line), "the shipped driver has no line {line:?}");
    }
}

#[test]
fn a_command_that_fails_is_the_last_of_the_script() {
    let script = script("```console\n$ echo one && false\nprinted\n$ echo two\n```\n");
    let ended = Process::run(Command::new("bash").arg("-c").arg(script)).expect(1);
    assert_eq!(ended.stdout, "$ echo one && false\none\n");
}
