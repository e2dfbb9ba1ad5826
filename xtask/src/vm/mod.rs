//! `cargo xtask vm-test`: real PCI devices, in virtual machines.
//!
//! | module | about |
//! | --- | --- |
//! | [`topology`] | the machines and their devices |
//! | [`programs`], [`kernel`] | what comes from Debian: unpacked into `target/vm`, not installed |
//! | [`initramfs`], [`cpio`] | what a machine boots into |
//! | [`qemu`], [`qmp`] | a run of QEMU, which is watched, and asked for what the scenarios want done to their machine |
//! | [`report`] | what the test program says |
//!
//! The test program and the scenarios are the crate `tests/vm`, whose document says how to write one. A machine boots once for all scenarios of its topology. The processor is
//! emulated (TCG), the same everywhere; KVM is used only if asked for, because what opens as `/dev/kvm` is not always one that boots.

mod cpio;
mod initramfs;
mod kernel;
mod programs;
mod qemu;
mod qmp;
mod report;
mod topology;

use crate::{build, guests, interrupt, packages, step, workspace};
use anyhow::{Context, Result, bail, ensure};
use kernel::Kernel;
use programs::Programs;
use qemu::{Start, Verdict};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};
use topology::{TOPOLOGIES, Topology};

/// Machines that run at the same time.
const AT_ONCE: usize = 2;

/// What may be said on the command line.
#[derive(clap::Args, Default)]
pub(crate) struct Options {
    /// Also run the scenarios that take long.
    #[arg(long)]
    long: bool,
    /// Only say which scenarios there are.
    #[arg(long)]
    list: bool,
    /// What runs the machine's code. KVM has to work here, which is more than that /dev/kvm opens.
    #[arg(long, value_enum, default_value_t)]
    accel: Accelerator,
    /// Run only the scenarios whose name contains this.
    filter: Option<String>,
}

/// What runs the machine's code.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq)]
enum Accelerator {
    /// QEMU's emulation.
    #[default]
    Tcg,
    /// The processor itself.
    Kvm,
}

impl Options {
    /// What `cargo xtask test` runs.
    pub(crate) fn all(long: bool) -> Options {
        Options { long, ..Options::default() }
    }
}

/// A scenario as the test program lists it.
struct Listed {
    topology: String,
    name: String,
    long: bool,
}

/// A machine and how many scenarios run in it.
struct Boot {
    topology: &'static Topology,
    count: usize,
}

/// Builds what is needed and runs the scenarios.
pub(crate) fn run(options: &Options) -> Result<()> {
    interrupt::watch()?;
    build::programs(&["cofferdam", "cofferdam-conformance", "cofferdam-vm-guest"])?;
    if options.list {
        for Listed { topology, name, long } in listed()? {
            println!("{topology:<6} {name}{}", if long { " (long)" } else { "" });
        }
        return Ok(());
    }
    packages::ensure()?;
    build::drivers()?;
    guests::build_test_guests()?;
    println!("{}", tests(options)?);
    Ok(())
}

/// Runs the scenarios with what is built, and gives the totals in words.
pub(crate) fn tests(options: &Options) -> Result<String> {
    let begin = Instant::now();
    let boots = plan(&listed()?, options)?;
    let folder = workspace::target().join("vm");
    std::fs::create_dir_all(&folder)?;
    let programs = Programs::get()?;
    let kernel = Kernel::get(&programs)?;
    let initramfs = folder.join("initramfs.cpio");
    let bytes = initramfs::write(&initramfs, &kernel, &programs)?;
    let accelerator = match options.accel {
        Accelerator::Tcg => "tcg",
        Accelerator::Kvm => "kvm",
    };
    step::announce(&format!(
        "virtual machines: {accelerator}, {}, Linux {}, initramfs of {} MiB, ready after {}",
        qemu::version()?,
        kernel.release,
        bytes >> 20,
        step::seconds(begin.elapsed()),
    ));

    let queue = Mutex::new(boots.into_iter());
    let verdicts = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().ok().and_then(|mut boots| boots.next());
                    let Some(boot) = next else { break };
                    let verdict = one(&boot, options, accelerator, &kernel.vmlinux, &initramfs, &folder);
                    if let Ok(mut verdicts) = verdicts.lock() {
                        verdicts.push((boot, verdict));
                    }
                }
            });
        }
    });
    let verdicts = verdicts.into_inner().ok().context("a machine's thread panicked")?;
    interrupt::check()?;
    conclude(verdicts, begin.elapsed())
}

/// Asks the test program.
fn listed() -> Result<Vec<Listed>> {
    let text = step::output(Command::new(workspace::program("cofferdam-vm-guest")).arg("--list"))?;
    let parse = |line: &str| {
        let mut words = line.split(' ').map(str::to_owned);
        Some(Listed { topology: words.next()?, name: words.next()?, long: words.next()? == "long" })
    };
    text.lines().map(|line| parse(line).with_context(|| format!("the test program lists {line:?}"))).collect()
}

/// The machines that hold something to run.
fn plan(listed: &[Listed], options: &Options) -> Result<Vec<Boot>> {
    if let Some(stray) = listed.iter().find(|scenario| Topology::named(&scenario.topology).is_none()) {
        bail!("{} wants a topology {} which there is not", stray.name, stray.topology);
    }
    let filter = options.filter.as_deref().unwrap_or_default();
    // It becomes a word of the kernel's command line, where names of scenarios fit.
    let is_plain = filter.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    ensure!(is_plain, "{filter}: names of scenarios have letters, digits and underscores");
    let takes = |scenario: &&Listed| scenario.name.contains(filter) && (options.long || !scenario.long);
    let count =
        |topology: &Topology| listed.iter().filter(takes).filter(|scenario| scenario.topology == topology.name).count();
    let boots = TOPOLOGIES.iter().map(|topology| Boot { topology, count: count(topology) });
    let boots: Vec<_> = boots.filter(|boot| boot.count > 0).collect();
    ensure!(
        !boots.is_empty(),
        "no scenario has {filter:?} in its name; `cargo xtask vm-test --list` says which there are"
    );
    Ok(boots)
}

/// Boots one machine.
fn one(
    boot: &Boot,
    options: &Options,
    accelerator: &str,
    vmlinux: &Path,
    initramfs: &Path,
    folder: &Path,
) -> Result<Verdict> {
    let mut arguments = boot.topology.name.to_owned();
    if options.long {
        arguments += " --long";
    }
    if let Some(filter) = &options.filter {
        arguments += &format!(" --only {filter}");
    }
    let (topology, long) = (boot.topology, options.long);
    let mut verdict =
        qemu::run(&Start { topology, accelerator, vmlinux, initramfs, arguments: &arguments, long, folder })?;
    let ran = verdict.report.passed + verdict.report.failed;
    if verdict.failure.is_none() && ran != boot.count {
        verdict.failure = Some(format!("{} scenarios were to run, {ran} did", boot.count));
    }
    Ok(verdict)
}

/// Shows the logs of what failed and adds up.
fn conclude(verdicts: Vec<(Boot, Result<Verdict>)>, took: Duration) -> Result<String> {
    let (mut passed, mut failures, mut boots) = (0, Vec::new(), Vec::new());
    for (Boot { topology, .. }, verdict) in verdicts {
        let name = topology.name;
        match verdict {
            Ok(Verdict { report, failure, log }) => {
                passed += report.passed;
                boots.extend(report.boot.map(|boot| format!("{name} booted in {}", step::seconds(boot))));
                if let Some(why) = failure {
                    let text = String::from_utf8_lossy(&std::fs::read(&log).unwrap_or_default()).into_owned();
                    println!(
                        "---- {name}: {why}; {} ----\n{}\n---- end of {name} ----",
                        log.display(),
                        text.trim_end()
                    );
                    failures.push(format!("{name}: {why}"));
                }
            }
            Err(error) => failures.push(format!("{name}: {error:#}")),
        }
    }
    let summary = format!("{passed} scenarios passed in {}; {}", step::seconds(took), boots.join(", "));
    match failures.as_slice() {
        [] => Ok(summary),
        failures => bail!("{}; {summary}", failures.join("; ")),
    }
}
