//! A console whose other end is a console of the kernel's, on which a person can log in: `console0` is ours, `console1` the kernel's.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::host::{Host, MODEST, cofferdam, device, nothing_is_claimed};
use crate::pci::{CONSOLE0, Function};
use crate::program::Running;
use crate::terminal::Terminal;
use crate::vm::{SHORT, Vm};

const DRIVER: &str = "/drivers/virtio-console.wasm";

/// Where port 0, a console, and port 1 are served.
const CONSOLE: &str = "/run/tty0";
const SERIAL: &str = "/run/tty1";

const PASSWORD: &str = "cofferdam";

const PASTE_BYTES: usize = 10 << 20;

/// What is read of it at a time.
const PIECE_BYTES: usize = 64 << 10;

/// How long a paste may take.
const PASTE_LIMIT: Duration = Duration::from_secs(240);

/// Loads the driver with both ports served.
fn load(vm: &Vm, via: &str) -> Result<(Function, Host)> {
    let console = CONSOLE0.function()?;
    let host = Host::start(vm)?;
    let (device, ports) = (device(&console), [format!("pty:{CONSOLE}"), format!("pty:{SERIAL},port=1")]);
    let line = ["load", DRIVER, "--device", &device, via, "--name", "tty", "--port", &ports[0], "--port", &ports[1]];
    // A lane for each port.
    cofferdam(vm, &[&line[..], &["--queues", "2", "--json"], MODEST].concat())?.success()?;
    ensure!(port_of_kernel("console0")?.is_none(), "the kernel still has the port");
    Ok((console, host))
}

/// Unloads it; the links are gone, and the kernel has the device.
fn unload(vm: &Vm, host: Host) -> Result<()> {
    let certificate = host.unload(vm, "tty")?;
    ensure!(certificate["outcome"] == "unloaded", "{certificate}");
    for link in [CONSOLE, SERIAL] {
        ensure!(std::fs::symlink_metadata(link).is_err(), "{link} is still there");
    }
    nothing_is_claimed()?;
    host.end()?;
    kernel_serves(vm)
}

/// Port 1 of a console of the kernel's (`/dev/vport1p1`), by the name that QEMU gave it.
fn port_of_kernel(console: &str) -> Result<Option<PathBuf>> {
    let name = format!("org.cofferdam.{console}.1");
    for entry in std::fs::read_dir("/sys/class/virtio-ports")? {
        let folder = entry?.path();
        if std::fs::read_to_string(folder.join("name")).is_ok_and(|text| text.trim_end() == name) {
            return Ok(folder.file_name().map(|name| Path::new("/dev").join(name)));
        }
    }
    Ok(None)
}

/// The kernel's driver has both ends and passes bytes. What an earlier scenario left on the way is read with them.
fn kernel_serves(vm: &Vm) -> Result<()> {
    const WORD: &str = "the kernel has it again\n";
    let there = || Ok(port_of_kernel("console0")?.is_some_and(|path| path.exists()));
    vm.wait_until("the kernel serves the console again", SHORT, there)?;
    let open = |console| Terminal::open(port_of_kernel(console)?.context("no port")?);
    let (mut near, mut far) = (open("console0")?, open("console1")?);
    far.say(WORD.as_bytes(), SHORT)?;
    near.hears(WORD, SHORT)?;
    near.say(WORD.as_bytes(), SHORT)?;
    far.hears(WORD, SHORT)?;
    Ok(())
}

/// The kernel's terminal (`hvc1`) at the other end: while `console0` is ours there is one that opens.
fn terminal_of_kernel() -> Result<String> {
    let names = (0..8).map(|number| format!("hvc{number}"));
    let there: Vec<_> = names.filter(|name| Terminal::open(format!("/dev/{name}")).is_ok()).collect();
    ensure!(there.len() == 1, "terminals of the kernel: {there:?}");
    Ok(there.concat())
}

/// busybox's `getty` on a terminal, which asks for a name and hands over to `login`.
struct Getty {
    shell: Running,
}

impl Getty {
    fn start(vm: &Vm, terminal: &str) -> Result<Getty> {
        let hash = vm.run(["mkpasswd", "-m", "sha256", PASSWORD])?.success()?.stdout;
        std::fs::write("/etc/shadow", format!("root:{}:20000::::::\n", hash.trim_end()))?;
        // A session of its own, as a terminal that controls one needs it.
        let line = format!("setsid getty -L 0 {terminal} vt100 & echo $!; wait $!");
        Ok(Getty { shell: vm.spawn("getty", ["sh", "-c", &line])? })
    }

    /// Who has logged in logs out.
    fn ends(mut self, vm: &Vm) -> Result<()> {
        vm.wait_until("the session ends", SHORT, || Ok(!self.shell.is_alive()?))
    }
}

impl Drop for Getty {
    fn drop(&mut self) {
        let session = self.shell.stdout().trim().parse().ok().and_then(rustix::process::Pid::from_raw);
        if let Some(session) = session.filter(|_| self.shell.is_alive().unwrap_or(true)) {
            // It is not of the shell's group; the kernel hangs up whatever else it has started.
            let _ = rustix::process::kill_process(session, rustix::process::Signal::KILL);
        }
    }
}

/// Whether a program of this name is in the foreground of its terminal (proc(5), `stat`: the group of the process, and that in the foreground).
fn is_in_foreground(name: &str) -> bool {
    let stats = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    stats.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok()).any(|stat| {
        let Some((head, tail)) = stat.rsplit_once(") ") else { return false };
        let fields: Vec<_> = tail.split(' ').collect();
        head.ends_with(&format!("({name}")) && fields.len() > 5 && fields[2] == fields[5]
    })
}

/// A person logs in over the terminal, with a wrong password first, works, interrupts, leaves; then the unload hangs up.
fn login(vm: &mut Vm, via: &str) -> Result<()> {
    let (_console, host) = load(vm, via)?;
    let mut terminal = Terminal::open(CONSOLE)?;
    let hvc = terminal_of_kernel()?;
    let getty = Getty::start(vm, &hvc)?;
    vm.step(&format!("loaded; getty on {hvc}"));
    for (password, answer) in [("wrong", "Login incorrect"), (PASSWORD, "# ")] {
        terminal.hears("login: ", SHORT)?;
        terminal.say(b"root\r", SHORT)?;
        terminal.hears("Password: ", SHORT)?;
        terminal.say(format!("{password}\r").as_bytes(), SHORT)?;
        // It may be shown: busybox's login asks first and hides then.
        terminal.hears(answer, SHORT)?;
        vm.step(&format!("{password}: {answer}"));
    }
    terminal.say(b"tty; echo answer-$((6 * 7))\r", SHORT)?;
    let said = terminal.hears("answer-42", SHORT)?;
    ensure!(said.contains(&format!("/dev/{hvc}")), "the session is on another terminal: {said:?}");
    terminal.say(b"sleep 1000\r", SHORT)?;
    // Before it is there the shell may take the interrupt for its own, and wait for it all the same.
    vm.wait_until("sleep is in the foreground", SHORT, || Ok(is_in_foreground("sleep")))?;
    terminal.say(b"\x03", SHORT)?;
    terminal.hears("# ", SHORT)?;
    terminal.say(b"echo code-$?-\r", SHORT)?;
    terminal.hears("code-130-", SHORT)?;
    vm.step("Ctrl-C; exit");
    terminal.say(b"exit\r", SHORT)?;
    getty.ends(vm)?;
    unload(vm, host)?;
    terminal.hangs_up(SHORT)
}

pub(super) fn login_on_uio(vm: &mut Vm) -> Result<()> {
    login(vm, "--uio")
}

pub(super) fn login_on_vfio(vm: &mut Vm) -> Result<()> {
    login(vm, "--vfio")
}

/// The same noise for every run.
fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8 ^ (at >> 16) as u8).collect()
}

fn paste(vm: &mut Vm, via: &str) -> Result<()> {
    paste_while(vm, via, 0, |_, _| Ok(()))
}

/// Both sides write at the same time, and each reads what the other wrote. Something is done so many times meanwhile, when as large a part of it is there on either side.
pub(super) fn paste_while(
    vm: &mut Vm,
    via: &str,
    times: usize,
    mut meanwhile: impl FnMut(&mut Vm, &mut Host) -> Result<()>,
) -> Result<()> {
    let (_console, mut host) = load(vm, via)?;
    let far = port_of_kernel("console1")?.context("no port")?;
    let (sent, back) = ("/tmp/sent", "/tmp/back");
    let (noise, other) = (noise(PASTE_BYTES), noise(PASTE_BYTES + 1)[1..].to_vec());
    std::fs::write(sent, &other)?;
    // One opening for both ways: the kernel gives a port to one.
    let line = format!("exec 3<>{}; head -c {PASTE_BYTES} <&3 >{back} & cat {sent} >&3; wait", far.display());
    let mut shell = vm.spawn("far", ["sh", "-c", &line])?;
    let terminal = Terminal::open(SERIAL)?;
    let (mut writer, mut reader) = (terminal.again()?, terminal);
    let come = AtomicUsize::new(0);
    let (wrote, read, done) = std::thread::scope(|scope| {
        let writing = scope.spawn(|| writer.say(&noise, PASTE_LIMIT));
        let reading = scope.spawn(|| -> Result<Vec<u8>> {
            let mut all = Vec::with_capacity(PASTE_BYTES);
            while all.len() < PASTE_BYTES {
                all.extend(reader.takes(PIECE_BYTES, PASTE_LIMIT)?);
                come.store(all.len(), Ordering::Relaxed);
            }
            Ok(all)
        });
        let there = || [come.load(Ordering::Relaxed), std::fs::metadata(back).map_or(0, |file| file.len() as usize)];
        let done = (1..=times).try_for_each(|turn| {
            let part = PASTE_BYTES * turn / (times + 2);
            vm.wait_until("a part of it", PASTE_LIMIT, || Ok(there().iter().all(|bytes| *bytes >= part)))?;
            vm.step(&format!("{:?} bytes are there", there()));
            ensure!(turn > 1 || there().iter().all(|bytes| *bytes < PASTE_BYTES), "one way has ended: {:?}", there());
            meanwhile(vm, &mut host)
        });
        (writing.join(), reading.join(), done)
    });
    done?;
    wrote.map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    let read = read.map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    ensure!(read == other, "differs at {:?}", read.iter().zip(&other).position(|(one, other)| one != other));
    vm.step(&format!("{PASTE_BYTES} bytes came from the other end"));
    vm.wait_until("the other end has read all", PASTE_LIMIT, || Ok(!shell.is_alive()?))?;
    let read = std::fs::read(back)?;
    ensure!(read == noise, "{} bytes, {:?}", read.len(), read.iter().zip(&noise).position(|(one, other)| one != other));
    vm.step("and as many went there");
    for file in [sent, back] {
        std::fs::remove_file(file)?;
    }
    drop(writer);
    unload(vm, host)?;
    reader.hangs_up(SHORT)
}

pub(super) fn paste_on_uio(vm: &mut Vm) -> Result<()> {
    paste(vm, "--uio")
}

pub(super) fn paste_on_vfio(vm: &mut Vm) -> Result<()> {
    paste(vm, "--vfio")
}

/// The other end writes without an end and nobody reads: the host does not grow, the writer is held back, and an unload in the middle of it leaves nothing.
fn flood(vm: &mut Vm, via: &str) -> Result<()> {
    let (_console, host) = load(vm, via)?;
    let far = port_of_kernel("console1")?.context("no port")?;
    let mut flood = vm.spawn("flood", ["dd", "if=/dev/zero", &format!("of={}", far.display()), "bs=16k"])?;
    let mut terminal = Terminal::open(SERIAL)?;
    terminal.takes(64 * 1024, SHORT)?;
    let before = written(flood.id())?;
    let resident = resident_kib(host.process.id())?;
    // Nothing moves when nothing was written between two looks that are far apart for a processor, even one that is emulated.
    let mut last = (before, std::time::Instant::now());
    vm.wait_until("the writer is held back", SHORT, || {
        let now = written(flood.id())?;
        if now != last.0 {
            last = (now, std::time::Instant::now());
        }
        Ok(last.1.elapsed() > Duration::from_millis(500))
    })?;
    let (stood, grown) = (last.0, resident_kib(host.process.id())?.saturating_sub(resident));
    vm.step(&format!("the writer stands after {stood} bytes; the host grew by {grown} KiB"));
    ensure!(grown < 1024, "the host grew by {grown} KiB");
    terminal.takes(1 << 20, SHORT)?;
    vm.wait_until("the writer goes on", SHORT, || Ok(written(flood.id())? > stood))?;
    vm.step("read 1 MiB, the writer went on; unload");
    let certificate = host.unload(vm, "tty")?;
    ensure!(certificate["outcome"] == "unloaded", "{certificate}");
    ensure!(flood.is_alive()?, "the writer ended");
    terminal.hangs_up(SHORT)?;
    flood.kill(SHORT)?;
    nothing_is_claimed()?;
    host.end()?;
    vm.step("unloaded");
    kernel_serves(vm)
}

/// Bytes that a process has written.
fn written(process: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/io"))?;
    let value = text.lines().find_map(|line| line.strip_prefix("wchar: ")).context("no wchar")?;
    Ok(value.parse()?)
}

/// Memory of a process in KiB.
fn resident_kib(process: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let value = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(value.trim().trim_end_matches(" kB").parse()?)
}

pub(super) fn flood_on_uio(vm: &mut Vm) -> Result<()> {
    flood(vm, "--uio")
}

pub(super) fn flood_on_vfio(vm: &mut Vm) -> Result<()> {
    flood(vm, "--vfio")
}
