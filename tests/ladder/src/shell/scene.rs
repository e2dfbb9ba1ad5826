//! Clients of a binding that is in another process.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use cofferdam_process_tests::backend::{Backend, tool};
use cofferdam_process_tests::nbd::{Client, Command, EINVAL};
use cofferdam_process_tests::process::Process;
use cofferdam_process_tests::wait::until_true;

use crate::scene::answers_then_end;
use crate::shell::data::{DataClient, socket_beside};
use crate::shell::plan::Situation;
use crate::stage::command_offset;

/// Requests at once of fio and of the client that reads nothing.
const DEPTH: u64 = 32;
/// Requests that are with a device that was stopped.
const HELD: u64 = 8;

/// What has to be seen of the process under test.
pub struct View<'a> {
    /// Its id.
    pub pid: u32,
    /// What `ls --json` says of the binding, where there is a daemon.
    pub status: Option<&'a dyn Fn() -> serde_json::Value>,
}

impl View<'_> {
    fn says(&self, key: &str, value: u64) -> bool {
        self.status.is_some_and(|status| status()[key].as_u64() == Some(value))
    }

    /// Time that the port's threads have used, in clock ticks (proc(5), `stat`): fields 14 and 15, counted from behind the name.
    fn busy_ticks(&self) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten().flatten();
        let stats = tasks.filter_map(|task| fs::read_to_string(task.path().join("stat")).ok());
        let lanes = stats.filter(|stat| stat.contains("(nbd-lane"));
        lanes
            .filter_map(|stat| {
                let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
                Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
            })
            .sum()
    }
}

/// Everything that goes on.
pub struct Scene {
    connection: Option<Client>,
    /// Requests that were sent over it and not answered when the situation was there.
    sent: usize,
    fio: Option<Process>,
    data: Option<DataClient>,
}

/// Arguments of the device that the situation needs.
#[must_use]
pub fn device(situation: Situation) -> Vec<&'static str> {
    let mut arguments = vec!["--memory", "16M", "--queues", "2"];
    if matches!(situation, Situation::Fio | Situation::Mapped) {
        // So that the client's depth is with the device when the entry comes.
        arguments.extend(["--fault", "slow:1..4"]);
    }
    if situation == Situation::Lying {
        for fault in [
            "lie:answer-forgotten@nth=40,op=write,queue=0",
            "lie:answer-forgotten@nth=80,op=write,queue=0",
            "lie:notification-spurious@every=5,queue=0",
        ] {
            arguments.extend(["--fault", fault]);
        }
    }
    arguments
}

impl Scene {
    /// Brings the situation about on the first connection, whose lane is then the first.
    pub fn set(situation: Situation, socket: &Path, device: &Backend, view: &View<'_>) -> anyhow::Result<Scene> {
        let mut scene = Scene { connection: None, sent: 0, fio: None, data: None };
        if situation == Situation::Fio {
            scene.fio = Some(fio(socket));
            until_true("fio is at depth", || match view.status {
                Some(status) => {
                    let status = status();
                    let requests = status["handles"][0]["requests"].as_u64().unwrap_or(0);
                    requests > 1000 && status["requests_in_flight"].as_u64().unwrap_or(0) >= 8
                }
                // Nobody can be asked: what the port's threads do is fio's traffic.
                None => view.busy_ticks() >= 15,
            });
            return Ok(scene);
        }
        if situation == Situation::Mapped {
            scene.data = Some(DataClient::start(&socket_beside(socket))?);
            return Ok(scene);
        }
        let mut client = Client::new(socket);
        match situation {
            Situation::Idle | Situation::Fio | Situation::Mapped => ensure!(client.write(0, &[1; 512]) == 0, "a write"),
            Situation::Stuck => {
                client.send_write(command_offset("loop")?, &[0; 4096])?;
                scene.sent = 1;
                match view.status {
                    Some(_) => until_true("the guest is in the call", || view.says("calls_running", 1)),
                    // A tenth of a second and more on one write: that is the loop.
                    None => until_true("the guest loops", || view.busy_ticks() >= 15),
                }
            }
            Situation::Asleep => {
                client.send_write(command_offset("sleep")?, &[0; 4096])?;
                scene.sent = 1;
                until_true("the guest is in the call", || view.says("calls_running", 1));
            }
            Situation::Hung => {
                ensure!(client.write(0, &[1; 512]) == 0, "a write");
                device.freeze();
                for number in 0..HELD {
                    client.send_write(number * 4096, &[2; 4096])?;
                }
                // Requests of one connection are taken in their order: when this one is refused, the others are with the device.
                client.send(Command::Read, 1, 1)?;
                ensure!(client.reply()?.error == EINVAL, "a read of one byte was not refused");
                scene.sent = HELD as usize;
            }
            Situation::NeverReads => {
                for number in 0..DEPTH {
                    client.send(Command::Read, number * 4096, 256 << 10)?;
                }
                scene.sent = DEPTH as usize;
                // The answers fill the socket: it is readable from the first one on.
                until_true("answers come", || client.stream.peek_some());
            }
            Situation::HalfWrite => {
                ensure!(client.write(0, &[1; 512]) == 0, "a write");
                let mut bytes = client.header(Command::Write, 0, 256 << 10);
                bytes.resize(bytes.len() + 100_000, 7);
                client.stream.write_all(&bytes)?;
                scene.sent = 1;
            }
            Situation::Lying => {
                for number in 0..96 {
                    client.send_write(number * 4096, &[3; 4096])?;
                }
                for _ in 0..94 {
                    let error = client.reply()?.error;
                    ensure!(error == 0, "a write was answered with error {error}");
                }
                scene.sent = 2;
            }
        }
        scene.connection = Some(client);
        Ok(scene)
    }

    /// After the end: clients were told and cut off, and nobody was shown wrong data.
    pub fn end(mut self) -> anyhow::Result<()> {
        if let Some(connection) = &mut self.connection {
            answers_then_end(connection, self.sent)?;
        }
        if let Some(data) = self.data.take() {
            data.end()?;
        }
        if let Some(mut fio) = self.fio.take() {
            let ended = fio.end_within(Duration::from_secs(10)).context("fio goes on")?;
            let said = ended.stdout + &ended.stderr;
            ensure!(said.contains("err=") || said.contains("error"), "fio does not say what ended it: {said}");
            ensure!(ended.code != Some(0), "fio noticed nothing: {said}");
            for wrong in ["verify failed", "verify: bad", "bad magic", "bad header", "Invalid or incomplete multibyte"]
            {
                ensure!(!said.contains(wrong), "fio was shown wrong data: {said}");
            }
        }
        Ok(())
    }
}

/// Whether something can be read without waiting.
trait PeekSome {
    fn peek_some(&self) -> bool;
}

impl PeekSome for std::os::unix::net::UnixStream {
    fn peek_some(&self) -> bool {
        let mut wait = [rustix::event::PollFd::new(self, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(rustix::event::poll(&mut wait, Some(&now)), Ok(1))
    }
}

/// fio on the first half of the disk (commands of the guest are on the other), until it is stopped by an error.
fn fio(socket: &Path) -> Process {
    let folder: PathBuf = socket.parent().map(Path::to_owned).unwrap_or_default();
    let mut fio = tool("fio");
    fio.current_dir(folder).args(
        "--name=verify --ioengine=nbd --rw=randrw --bsrange=4k-64k --size=8M --time_based --runtime=60 --iodepth=32 \
         --verify=crc32c --verify_fatal=1 --verify_backlog=64 --verify_state_save=0"
            .split_whitespace(),
    );
    Process::start(fio.arg(format!("--uri=nbd+unix:///?socket={}", socket.display())))
}
