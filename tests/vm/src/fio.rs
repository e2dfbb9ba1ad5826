//! fio over NBD: what a host's clients do while a scenario takes something away from them.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::program::Running;
use crate::vm::Vm;

/// How long a run to the end may take.
const VERIFY_LIMIT: Duration = Duration::from_secs(120);

/// What each job has of the disk, from its start on.
const JOB_MIB: u32 = 2;

/// Where the load of `jobs` jobs ends, in MiB: what lies behind is not its.
#[must_use]
pub const fn end_mib(jobs: u32) -> u32 {
    jobs * JOB_MIB
}

/// What fio says of data that is not what it wrote.
const WRONG: &[&str] = &["verify failed", "verify: bad", "bad magic", "bad header", "Invalid or incomplete multibyte"];

fn line(socket: &str, jobs: u32, more: &str) -> Vec<String> {
    // The kernel's clock: the processor's, which fio would calibrate, is an emulated one.
    let common = "fio --name=load --ioengine=nbd --clocksource=clock_gettime --iodepth=16 --verify=crc32c --verify_fatal=1 --verify_state_save=0";
    let mut line: Vec<String> = format!("{common} {more}").split_whitespace().map(str::to_owned).collect();
    line.push(format!("--uri=nbd+unix:///?socket={socket}"));
    line.extend([format!("--numjobs={jobs}"), format!("--size={JOB_MIB}m"), format!("--offset_increment={JOB_MIB}m")]);
    line
}

/// Each of `jobs` jobs, with a connection of its own, writes all that it has of the disk, 4 KiB at a time, and reads it back.
///
/// # Errors
/// When something else comes back, or it does not end.
pub fn verify(vm: &Vm, socket: &str, jobs: u32) -> Result<()> {
    vm.run_within(VERIFY_LIMIT, line(socket, jobs, "--rw=randwrite --bs=4k --do_verify=1"))?.success()?;
    Ok(())
}

/// How many requests each job of [`verify`] makes.
pub const VERIFY_REQUESTS: u64 = 2 * JOB_MIB as u64 * 256;

/// Jobs that read, write and check, until somebody takes the disk away.
#[derive(Debug)]
pub struct Load(Running);

impl Load {
    /// Starts `jobs` of them.
    ///
    /// # Errors
    /// When fio does not start.
    pub fn start(vm: &Vm, socket: &str, jobs: u32) -> Result<Load> {
        // Far longer than a scenario: it never ends well.
        let more = "--rw=randrw --bsrange=4k-16k --verify_backlog=64 --time_based --runtime=6000";
        vm.spawn("fio", line(socket, jobs, more)).map(Load)
    }

    /// An error unless it runs.
    ///
    /// # Errors
    /// What it has said.
    pub fn goes_on(&mut self) -> Result<()> {
        ensure!(self.0.is_alive()?, "fio has ended: {}{}", self.0.stdout(), self.0.stderr());
        Ok(())
    }

    /// The end after the disk was taken away: an error that it tells, within `limit`, and no wrong data before. What it said.
    ///
    /// # Errors
    /// When it goes on, noticed nothing or was shown something wrong.
    pub fn ends_with_an_error(self, limit: Duration) -> Result<Told> {
        let output = self.0.finish(limit)?.refusal()?;
        let said = format!("{}{}", output.stdout, output.stderr);
        ensure!(said.contains("err=") || said.contains("error"), "fio does not say what ended it: {said}");
        let wrong = WRONG.iter().find(|wrong| said.contains(**wrong));
        ensure!(wrong.is_none(), "fio was shown wrong data: {said}");
        // Not counted by the handles that were revoked: emulated, a gate takes tens of milliseconds to close, and who is refused meanwhile may have left by then.
        let clients = said.lines().filter(|line| line.starts_with("fio: pid=") && line.contains("err=")).count();
        Ok(Told { said, clients })
    }
}

/// How a load ended.
#[derive(Debug)]
pub struct Told {
    /// What fio said.
    pub said: String,
    /// How many of its clients were told with an error.
    pub clients: usize,
}
