//! The suite over vhost-user: on the sim behind its socket, and on the real `qemu-storage-daemon`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use cofferdam_bus_vhost_user::{ConnectError, VhostUser};
use cofferdam_conformance::{Bed, Class, Device, Lever, Wish};
use cofferdam_manager::Transport;

struct SimBackend;

impl Bed for SimBackend {
    fn name(&self) -> &'static str {
        "sim behind vhost-user"
    }

    fn device(&self, wish: &Wish) -> anyhow::Result<Option<Device>> {
        // Of a link that goes down the front end is not told: the library behind the socket has no message for it.
        if wish.levers && wish.class != Class::Stream {
            return Ok(None);
        }
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("sim.sock");
        let program = if wish.class == Class::Block { "cofferdam-sim-blk" } else { "cofferdam-sim" };
        let mut command = Command::new(release_binary(program));
        match wish.class {
            Class::Block => {
                command.arg("--memory").arg(wish.capacity_bytes.to_string());
                command.arg("--queues").arg(wish.queues.to_string());
                command.args(wish.read_only.then_some("--read-only"));
            }
            Class::Net => {
                command.arg("net").arg("--mtu").arg(wish.mtu.to_string());
                command.arg("--pairs").arg(wish.queues.to_string());
                command.args((wish.offloads == Some(false)).then_some("--no-offloads"));
                command.args(wish.single_buffers.then_some("--no-mergeable"));
            }
            Class::Stream => {
                command.arg("console").args(wish.levers.then_some("--orders"));
                (1..wish.ports).for_each(|port| {
                    command.arg("--port").arg(format!("port{port}"));
                });
            }
            Class::Entropy => {
                command.arg("rng").arg("--seed").arg(fastrand::u64(..).to_string());
            }
        }
        command.arg("--socket").arg(&socket).args(wish.plain_ring.then_some("--plain-ring"));
        let mut process = start(&mut command, &socket)?;
        let orders = process.0.stdin.take().context("no standard input")?;
        Ok(Some(Device {
            pull: Some(Box::new(move |lever| order(&orders, lever))),
            ..served(wish, socket, process, directory)
        }))
    }
}

/// Has the other side of a console do it.
fn order(mut orders: &ChildStdin, lever: Lever) {
    let line = match lever {
        Lever::Open(true) => "open 0".to_owned(),
        Lever::Open(false) => "close 0".to_owned(),
        Lever::Size(columns, rows) => format!("size {columns} {rows}"),
        Lever::Plug(true) => "plug 1".to_owned(),
        Lever::Plug(false) => "unplug 1".to_owned(),
        Lever::Link(_) => return,
    };
    // Should the process be gone, what the case waits for does not come.
    let _ = writeln!(orders, "{line}");
}

/// The device behind `socket`, as long as its process runs.
fn served(wish: &Wish, socket: PathBuf, mut process: Process, directory: tempfile::TempDir) -> Device {
    let connect = move || Ok(Box::new(connect(&socket)?) as Box<dyn Transport>);
    let verdict = move || {
        let ended = process.0.try_wait()?;
        drop(directory);
        anyhow::ensure!(ended.is_none(), "the backend has ended: {ended:?}");
        Ok(())
    };
    Device::new(wish, connect, verdict)
}

/// The device has a process of its own: in this one, its mappings of the shared memory would be found as the binding's residue.
fn release_binary(name: &str) -> PathBuf {
    cofferdam_conformance::driver_path("../release").join(name)
}

/// Starts a backend and waits until its socket is there.
fn start(command: &mut Command, socket: &Path) -> anyhow::Result<Process> {
    let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
    let mut process = Process(child.with_context(|| {
        format!(
            "{}: run 'cargo xtask build', or install the Debian package that has it",
            command.get_program().display()
        )
    })?);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !socket.exists() {
        anyhow::ensure!(process.0.try_wait()?.is_none(), "{} ended at once", command.get_program().display());
        anyhow::ensure!(Instant::now() < deadline, "{} does not start", command.get_program().display());
        std::thread::yield_now();
    }
    Ok(process)
}

struct Qemu;

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Bed for Qemu {
    fn name(&self) -> &'static str {
        "qemu-storage-daemon"
    }

    fn device(&self, wish: &Wish) -> anyhow::Result<Option<Device>> {
        // It cannot be told to keep a ring feature back.
        if wish.class != Class::Block || wish.plain_ring {
            return Ok(None);
        }
        let directory = tempfile::tempdir()?;
        let (image, socket) = (directory.path().join("disk.img"), directory.path().join("blk.sock"));
        std::fs::File::create(&image)?.set_len(wish.capacity_bytes)?;
        let read_only = if wish.read_only { "on" } else { "off" };
        let writable = if wish.read_only { "off" } else { "on" };
        let mut command = Command::new("qemu-storage-daemon");
        command.arg("--blockdev").arg(format!(
            "driver=file,node-name=disk,filename={},discard=unmap,read-only={read_only}",
            image.display()
        ));
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable={writable},num-queues={}",
            socket.display(),
            wish.queues
        ));
        let process = start(&mut command, &socket)?;
        Ok(Some(served(wish, socket, process, directory)))
    }
}

/// A backend's socket file is there a moment before anybody listens on it.
fn connect(socket: &Path) -> anyhow::Result<VhostUser> {
    let address = format!("vhost-user:{}", socket.display());
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match VhostUser::connect(&address) {
            Err(ConnectError::NobodyListens(_)) if Instant::now() < deadline => std::thread::yield_now(),
            result => return Ok(result?),
        }
    }
}

#[test]
fn a_block_driver_conforms_on_the_sim_behind_vhost_user() -> anyhow::Result<()> {
    assert_eq!(cofferdam_conformance::run(&SimBackend, Class::Block)?, 34);
    Ok(())
}

#[test]
fn a_net_driver_conforms_on_the_sim_behind_vhost_user() -> anyhow::Result<()> {
    assert_eq!(cofferdam_conformance::run(&SimBackend, Class::Net)?, 42);
    Ok(())
}

#[test]
fn a_stream_driver_conforms_on_the_sim_behind_vhost_user() -> anyhow::Result<()> {
    assert_eq!(cofferdam_conformance::run(&SimBackend, Class::Stream)?, 40);
    Ok(())
}

#[test]
fn an_entropy_driver_conforms_on_the_sim_behind_vhost_user() -> anyhow::Result<()> {
    assert_eq!(cofferdam_conformance::run(&SimBackend, Class::Entropy)?, 28);
    Ok(())
}

#[test]
fn a_block_driver_conforms_on_qemu_storage_daemon() -> anyhow::Result<()> {
    assert_eq!(cofferdam_conformance::run(&Qemu, Class::Block)?, 32);
    Ok(())
}
