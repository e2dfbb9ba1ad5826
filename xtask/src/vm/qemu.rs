//! One run of QEMU: start, watch, verdict.
//!
//! The first serial port is the log, a file that is read while it grows. The second carries QMP commands of the test program, one line of JSON each, and the answers.
//! The verdict is QEMU's exit status, by `isa-debug-exit`.

use super::qmp::Qmp;
use super::report::Report;
use super::topology::{MEMORY_MIB, Topology};
use crate::process::Process;
use crate::{interrupt, step};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PROGRAM: &str = "qemu-system-x86_64";

/// Statuses with which `isa-debug-exit` ends QEMU (`tests/vm/src/verdict.rs`).
const GOOD: i32 = 33;
const BAD: i32 = 35;

/// Of every machine. The clock arguments are for a processor that is emulated; nobody watches for lockups, because on a loaded host there are some.
const KERNEL: &str = "console=ttyS0 panic=-1 quiet no_timer_check clocksource=acpi_pm tsc=unstable mitigations=off nowatchdog \
    rcupdate.rcu_cpu_stall_suppress=1 cofferdam.vm-test";

/// How long the serial line may be silent. The longest waits inside are shorter.
const SILENCE: Duration = Duration::from_secs(300);

/// How long a machine may run, and how long with the long scenarios.
const WALL: Duration = Duration::from_secs(900);
const WALL_LONG: Duration = Duration::from_secs(3600);

/// How often the log and the process are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// How long QEMU may take to open its sockets.
const OPEN: Duration = Duration::from_secs(60);

/// Longest command from inside, in bytes.
const MAX_COMMAND_BYTES: usize = 1 << 20;

/// What a machine is started with.
pub(super) struct Start<'a> {
    /// Its devices.
    pub(super) topology: &'static Topology,
    /// `tcg` or `kvm`.
    pub(super) accelerator: &'a str,
    /// The kernel, uncompressed.
    pub(super) vmlinux: &'a Path,
    /// The archive that it boots into.
    pub(super) initramfs: &'a Path,
    /// Arguments of the test program.
    pub(super) arguments: &'a str,
    /// Whether it runs long scenarios.
    pub(super) long: bool,
    /// Where images and logs go.
    pub(super) folder: &'a Path,
}

/// How a run ended.
pub(super) struct Verdict {
    /// What was read from the log.
    pub(super) report: Report,
    /// Why it is no success.
    pub(super) failure: Option<String>,
    /// The serial log.
    pub(super) log: PathBuf,
}

/// `QEMU emulator version 10.0.2 (Debian ...)`.
pub(super) fn version() -> Result<String> {
    let text = step::output(Command::new(PROGRAM).arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Runs a machine to its end.
pub(super) fn run(start: &Start<'_>) -> Result<Verdict> {
    let name = start.topology.name;
    let log = start.folder.join("logs").join(name).with_extension("log");
    // In the system's folder for such things: the path of a socket may have 107 bytes.
    let work = TempDir::with_prefix("cofferdam-vm-")?;
    let mut report = Report::new(name);
    let mut machine = Machine::start(start, &log, work)?;
    let failure = match machine.watch(&mut report, start.long) {
        Ok(status) => judge(status, &report).map(|failure| match status {
            // Ended by itself or by a signal: only QEMU can say why.
            Some(GOOD | BAD) => failure,
            _ => failure + &machine.process.last_words(),
        }),
        Err(error) => Some(format!("{error:#}{}", machine.process.last_words())),
    };
    Ok(Verdict { report, failure, log })
}

fn judge(status: Option<i32>, report: &Report) -> Option<String> {
    match status {
        Some(GOOD) if report.errors > 0 => Some("something went wrong outside of the scenarios".to_owned()),
        Some(GOOD) if report.is_complete && report.failed == 0 && report.passed > 0 => None,
        Some(GOOD) => Some("the verdict is good and the log is not".to_owned()),
        Some(BAD) if report.failed > 0 => Some(format!("{} scenarios failed", report.failed)),
        Some(BAD) => Some("the test program failed".to_owned()),
        status => Some(format!("the machine ended without a verdict (QEMU's status {status:?})")),
    }
}

/// A running QEMU, which ends when this is dropped.
struct Machine {
    process: Process,
    qmp: Qmp,
    outside: UnixStream,
    /// What has come on `outside` and is not yet a whole line.
    pending: Vec<u8>,
    log: File,
    /// What has come in the log and is not yet a whole line.
    tail: Vec<u8>,
    _work: TempDir,
}

impl Machine {
    fn start(start: &Start<'_>, log: &Path, work: TempDir) -> Result<Machine> {
        std::fs::create_dir_all(log.parent().unwrap_or(Path::new("/")))?;
        File::create(log)?;
        let (qmp, outside) = (work.path().join("qmp"), work.path().join("outside"));
        let socket = |id: &str, path: &Path| format!("socket,id={id},path={},server=on,wait=off", path.display());
        let kernel = format!("{KERNEL} {} -- {}", start.topology.kernel.join(" "), start.arguments);

        let mut qemu = Command::new(PROGRAM);
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-machine",
            "q35,kernel-irqchip=split",
        ]);
        qemu.args(match start.accelerator {
            "kvm" => ["-accel", "kvm", "-cpu", "host"],
            // One thread for both processors: with one for each, QEMU 10.0 was seen to abort (`iotlb_to_section`, when a function comes or goes) and to lose an interrupt for good. The
            // machines run side by side, so the cores are busy all the same.
            _ => ["-accel", "tcg,thread=single", "-cpu", "max"],
        });
        qemu.args(["-smp", "2", "-m"]).arg(MEMORY_MIB.to_string());
        qemu.arg("-kernel").arg(start.vmlinux).arg("-initrd").arg(start.initramfs).args(["-append", &kernel]);
        qemu.args(["-chardev", &format!("file,id=log,path={}", log.display()), "-serial", "chardev:log"]);
        qemu.args(["-chardev", &socket("outside", &outside), "-serial", "chardev:outside"]);
        qemu.args(["-chardev", &socket("qmp", &qmp), "-mon", "chardev=qmp,mode=control"]);
        qemu.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x01"]);
        qemu.args(start.topology.devices(&start.folder.join("disks").join(start.topology.name), work.path())?);

        let mut process = Process::start("qemu", &mut qemu, work.path())?;
        let stream = connect(&mut process, "the second serial port", &outside)?;
        let qmp = connect(&mut process, "the monitor", &qmp)?;
        stream.set_read_timeout(Some(LOOK))?;
        stream.set_write_timeout(Some(OPEN))?;
        Ok(Machine {
            process,
            qmp: Qmp::new(qmp)?,
            outside: stream,
            pending: Vec::new(),
            log: File::open(log)?,
            tail: Vec::new(),
            _work: work,
        })
    }

    /// Serves it until it ends, and gives QEMU's exit status.
    fn watch(&mut self, report: &mut Report, long: bool) -> Result<Option<i32>> {
        let begin = Instant::now();
        let mut heard = begin;
        let wall = if long { WALL_LONG } else { WALL };
        loop {
            interrupt::check()?;
            self.serve()?;
            let ended = self.process.wait_for_end(Duration::ZERO)?;
            if self.read_log(report)? {
                heard = Instant::now();
            }
            if let Some(status) = ended {
                return Ok(status.code());
            }
            if heard.elapsed() > SILENCE {
                bail!("nothing on the serial line for {}", step::seconds(SILENCE));
            }
            if begin.elapsed() > wall {
                bail!("still running after {}", step::seconds(wall));
            }
        }
    }

    /// Waits a moment for a command from inside, and has it executed.
    fn serve(&mut self) -> Result<()> {
        let mut buffer = [0; 4096];
        match self.outside.read(&mut buffer) {
            // QEMU is about to end.
            Ok(0) => self.process.wait_for_end(LOOK).map(drop)?,
            Ok(length) => self.pending.extend_from_slice(&buffer[..length]),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => self.process.wait_for_end(LOOK).map(drop)?,
            Err(error) => return Err(error).context("the second serial port"),
        }
        if self.pending.len() > MAX_COMMAND_BYTES {
            bail!("a command of more than {MAX_COMMAND_BYTES} bytes");
        }
        while let Some(line) = take_line(&mut self.pending) {
            let answer = match serde_json::from_slice::<Value>(&line) {
                Ok(command) => self.qmp.execute(&command)?,
                Err(error) => json!({ "error": { "desc": format!("not JSON: {error}") } }),
            };
            self.outside.write_all(format!("{answer}\n").as_bytes()).context("the second serial port")?;
        }
        Ok(())
    }

    /// Passes what is new in the log on, line by line; tells whether anything is.
    fn read_log(&mut self, report: &mut Report) -> Result<bool> {
        let before = self.tail.len();
        self.log.read_to_end(&mut self.tail)?;
        let is_new = self.tail.len() > before;
        while let Some(line) = take_line(&mut self.tail) {
            report.line(&String::from_utf8_lossy(&line));
        }
        Ok(is_new)
    }
}

/// Connects to a socket as soon as QEMU listens; it is there a moment before.
fn connect(process: &mut Process, what: &str, path: &Path) -> Result<UnixStream> {
    let mut stream = None;
    process.wait_until(&format!("{what} is open"), OPEN, |_| {
        stream = UnixStream::connect(path).ok();
        stream.is_some()
    })?;
    stream.with_context(|| what.to_owned())
}

/// Takes the first line out, without its end.
fn take_line(bytes: &mut Vec<u8>) -> Option<Vec<u8>> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let mut line: Vec<u8> = bytes.drain(..=end).collect();
    line.pop();
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_good_status_with_a_complete_log_is_a_success() {
        let mut report = Report::new("uio");
        assert!(judge(Some(GOOD), &report).is_some());
        report.line("test one ... ok (0.1 s)");
        assert!(judge(Some(GOOD), &report).is_some());
        report.line("vm result: ok. 1 passed; 0 failed");
        assert!(judge(Some(GOOD), &report).is_none());
        report.line("vm error: insmod");
        assert!(judge(Some(GOOD), &report).is_some());
        for status in [Some(BAD), Some(0), Some(1), None] {
            assert!(judge(status, &report).is_some());
        }
    }
}
