//! The tour of `README.md`, typed from its first command to its last.
//!
//! What a person does with it is done here too: what goes to the background is waited for until it is ready, what serves in the foreground gets a signal, and what wants a terminal gets one
//! from `expect`. Only where files are is another place than `/tmp`.

use std::fmt::Write as _;
use std::process::Command;
use std::time::Duration;

use cofferdam_process_tests::process::Process;
use cofferdam_process_tests::programs;

use crate::authoring::{BEGIN, quoted};

/// It has 1 GiB of disk made, 20 MB of randomness read, and nothing that waits for a time to pass.
const BOUND: Duration = Duration::from_secs(180);

/// The calling thread, and what it starts, see a network of their own from here on: the tour has fixed TCP ports and makes an interface.
#[expect(deprecated, reason = "unsafe for descriptor tables alone, which are not unshared here")]
fn own_network() {
    rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).expect("these tests run as root");
}

/// More of the shell that types.
const HELPERS: &str = r#"ip link set lo up
says() {
    for _ in $(seq 400); do
        if grep -q "$2" "$1"; then return; fi
        sleep 0.05
    done
    cat "$1" >&2
    return 1
}
at_work() {
    for _ in $(seq 400); do
        if cofferdam handles disk0 --json | grep -Eq '"requests": ?[1-9]'; then return; fi
        sleep 0.05
    done
    cat "$1" >&2
    return 1
}
there() {
    for _ in $(seq 400); do
        if [ -e "$1" ]; then return; fi
        sleep 0.05
    done
    echo "no $1" >&2
    return 1
}
"#;

/// The commands of the console blocks of a text, without prompts and comments.
fn commands(text: &str) -> Vec<String> {
    let mut commands: Vec<String> = Vec::new();
    let (mut inside, mut goes_on) = (false, false);
    for line in text.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if let Some(command) = line.strip_prefix("$ ").filter(|_| inside) {
            commands.push(command.to_owned());
        } else if let Some(last) = commands.last_mut().filter(|_| inside && goes_on) {
            last.push('\n');
            last.push_str(line);
        }
        goes_on = line.ends_with('\\');
    }
    let bare = |command: &String| command.split(" # ").next().unwrap_or_default().trim_end().to_owned();
    commands.iter().map(bare).collect()
}

/// A command on a terminal: what is said to it comes back, and Ctrl-] ends it. The terminal itself echoes nothing.
fn on_a_terminal(command: &str) -> String {
    // The terminal of `run` is raw when it says how it ends.
    let first = if command.starts_with("cofferdam run") { "expect -ex {Ctrl-] unloads.}\n" } else { "" };
    let script = format!(
        "set timeout 20\nset stty_init -echo\nexpect_before timeout {{ exit 9 }} eof {{ exit 8 }}\nspawn -noecho sh -c {{exec {command}}}\n{first}\
         send said\nexpect -ex said\nsend \\x1d\nexpect_before\nexpect eof\nexit [lindex [wait] 3]\n"
    );
    format!("expect -c {}", quoted(&script))
}

/// The commands as a script for bash.
fn script(commands: &[String], folder: &str) -> String {
    let mut script = BEGIN.to_owned() + HELPERS;
    for (number, command) in commands.iter().enumerate() {
        let command = command.replace("/tmp/", &format!("{folder}/"));
        // The test is root.
        let command = command.strip_prefix("sudo ").unwrap_or(&command);
        let log = format!("{folder}/{number}.log");
        let _ = writeln!(script, "printf '%s\\n' {}", quoted(&format!("$ {command}")));
        let typed = match command.strip_suffix(" &") {
            Some(device) if device.starts_with("qemu-storage-daemon") => {
                format!("{device} > {log} 2>&1 &\nthere {folder}/disk.sock")
            }
            Some(load) if load.starts_with("fio") => {
                format!("{load} > {log} 2>&1 &\nload=$! load_log={log}\nat_work {log}")
            }
            Some(command) => format!("{command} > {log} 2>&1 &\nready {log}"),
            None if command.starts_with("socat") || command.ends_with("--port stdio") => on_a_terminal(command),
            None if command.split(' ').take(2).any(|word| word == "run") => {
                format!(
                    "{command} > {log} 2>&1 &\nrun=$!\nsays {log} 'Ctrl-C unloads'\nkill $run\nwait $run\ncat {log}"
                )
            }
            // Of so much true randomness some blocks fail, which it says with 1.
            None if command.starts_with("rngtest") => format!("{command} 2>&1 || [ $? = 1 ]"),
            // fio gets errors, and never wrong data.
            None if command.starts_with("cofferdam unload disk0") => {
                format!(
                    "{command}\nif wait $load; then echo 'fio has noticed nothing' >&2; exit 1; fi\n\
                     if grep 'verify: bad' $load_log; then exit 1; fi"
                )
            }
            None => command.to_owned(),
        };
        let _ = writeln!(script, "{typed}");
    }
    script
}

#[test]
fn the_tour_of_the_readme_can_be_typed_from_its_first_command_to_its_last() {
    own_network();
    let readme = std::fs::read_to_string(programs::root().join("README.md")).expect("the document");
    let tour = readme.split("\n## ").find_map(|part| part.strip_prefix("A tour\n")).expect("a tour");
    let commands = commands(tour);
    assert!(commands.len() > 25, "{commands:#?}");
    for driver in ["virtio-blk", "virtio-net", "virtio-console", "virtio-rng"] {
        assert!(commands.iter().any(|command| command.contains(&format!("{driver}.wasm"))), "no {driver} in the tour");
    }
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("tour.sh");
    std::fs::write(&path, script(&commands, &folder.path().display().to_string())).expect("a file");
    let mut bash = Command::new("bash");
    bash.arg(&path).current_dir(programs::root()).env_remove("COFFERDAM_SOCKET");
    bash.env("XDG_CACHE_HOME", programs::cache()).env("CARGO_NET_OFFLINE", "true");
    let ended = Process::run_for(&mut bash, BOUND).expect(0);
    ended.assert_no_panic();
    for words in [
        "export-size: 1073741824",
        "certificate: disk0 (virtio-blk.wasm on vhost-user:",
        "certificate: rng0 (virtio-rng.wasm on vhost-user:",
        "FIPS 140-2 successes: 79",
        "certificate: tty0 (virtio-console.wasm on vhost-user:",
        "certificate: virtio-net",
    ] {
        assert!(ended.stdout.contains(words), "{words:?} is not in\n{}\n{}", ended.stdout, ended.stderr);
    }
    let (certificates, clean) =
        (ended.stdout.matches("certificate: ").count(), ended.stdout.matches("  left      nothing").count());
    assert!(certificates >= 6 && clean == certificates, "{clean} of {certificates} are clean\n{}", ended.stdout);
}

#[test]
fn commands_are_read_with_what_belongs_to_them() {
    let text =
        "$ no\n```console\n$ one \\\n    --two    # three\nsaid\n\n$ four &   # five\n```\n$ no\n```\n$ no\n```\n";
    assert_eq!(commands(text), ["one \\\n    --two", "four &"]);
}
