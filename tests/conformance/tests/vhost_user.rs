//! The suite over vhost-user: on the sim behind its socket, and on the real `qemu-storage-daemon`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use cofferdam_bus_vhost_user::{ConnectError, VhostUser};
use cofferdam_conformance::{Bed, Device, Wish};

struct SimBackend;

impl Bed for SimBackend {
    fn name(&self) -> &'static str {
        "sim behind vhost-user"
    }

    fn device(&self, wish: &Wish) -> anyhow::Result<Option<Device>> {
        // vhost-user does not tell the largest ring, so a small one cannot be asked for.
        // Neither backend can be told to keep a ring feature back.
        if wish.plain_ring {
            return Ok(None);
        }
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("sim.sock");
        let mut command = Command::new(release_binary("cofferdam-sim-blk"));
        command.arg("--socket").arg(&socket);
        command.arg("--memory").arg(wish.capacity_bytes.to_string());
        command.arg("--queues").arg(wish.queues.to_string());
        if wish.read_only {
            command.arg("--read-only");
        }
        let process = start(&mut command, &socket)?;
        let transport = Box::new(connect(&socket)?);
        Ok(Some(Device { transport, capacity_bytes: wish.capacity_bytes, keep: Box::new((process, directory)) }))
    }
}

/// The device has a process of its own: in this one, its mappings of the shared memory would be found as the binding's residue.
fn release_binary(name: &str) -> PathBuf {
    cofferdam_conformance::driver_path("../release").join(name)
}

/// Starts a backend and waits until its socket is there.
fn start(command: &mut Command, socket: &Path) -> anyhow::Result<Process> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
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
        if wish.plain_ring {
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
        let transport = Box::new(connect(&socket)?);
        Ok(Some(Device { transport, capacity_bytes: wish.capacity_bytes, keep: Box::new((process, directory)) }))
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
    assert_eq!(cofferdam_conformance::run(&SimBackend)?, 21);
    Ok(())
}

#[test]
fn a_block_driver_conforms_on_qemu_storage_daemon() -> anyhow::Result<()> {
    assert_eq!(cofferdam_conformance::run(&Qemu)?, 21);
    Ok(())
}
