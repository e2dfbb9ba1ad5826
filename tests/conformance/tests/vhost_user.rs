//! The suite over vhost-user: on the sim behind its socket, and on the real `qemu-storage-daemon`.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_conformance::{Bed, Device, Wish};
use cofferdam_sim::{OnDeath, Options, Profile, Sim, Storage};

struct SimBackend;

impl Bed for SimBackend {
    fn name(&self) -> &'static str {
        "sim behind vhost-user"
    }

    fn device(&self, wish: &Wish) -> anyhow::Result<Option<Device>> {
        // vhost-user does not tell the largest ring, so a small one cannot be asked for.
        if wish.ring_entries.is_some() {
            return Ok(None);
        }
        let mut profile = Profile { read_only: wish.read_only, queues: wish.queues, ..Profile::default() };
        if wish.plain_ring {
            profile.event_idx = false;
            profile.indirect = false;
        }
        let sim = Sim::new(Options { profile, storage: Storage::Memory(wish.capacity_bytes), ..Options::default() })?;
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("sim.sock");
        let server = sim.serve(&socket, OnDeath::ServeAgain)?;
        let transport = Box::new(VhostUser::connect(&address(&socket))?);
        Ok(Some(Device { transport, keep: Box::new((server, sim, directory)) }))
    }
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
        if wish.plain_ring || wish.ring_entries.is_some() {
            return Ok(None);
        }
        let directory = tempfile::tempdir()?;
        let (image, socket) = (directory.path().join("disk.img"), directory.path().join("blk.sock"));
        std::fs::File::create(&image)?.set_len(wish.capacity_bytes)?;
        let read_only = if wish.read_only { "on" } else { "off" };
        let writable = if wish.read_only { "off" } else { "on" };
        let child = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={},discard=unmap,read-only={read_only}", image.display()))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable={writable},num-queues={}",
                socket.display(),
                wish.queues
            ))
            .stdin(Stdio::null())
            .spawn()
            .context("qemu-storage-daemon (Debian package qemu-utils or qemu-system-common)")?;
        let process = Process(child);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !socket.exists() {
            anyhow::ensure!(Instant::now() < deadline, "qemu-storage-daemon does not start");
            std::thread::yield_now();
        }
        let transport = Box::new(VhostUser::connect(&address(&socket))?);
        Ok(Some(Device { transport, keep: Box::new((process, directory)) }))
    }
}

fn address(socket: &Path) -> String {
    format!("vhost-user:{}", socket.display())
}

#[test]
fn a_block_driver_conforms_on_the_sim_behind_vhost_user() -> anyhow::Result<()> {
    assert_eq!(cofferdam_conformance::run(&SimBackend)?, 19);
    Ok(())
}

#[test]
fn a_block_driver_conforms_on_qemu_storage_daemon() -> anyhow::Result<()> {
    assert_eq!(cofferdam_conformance::run(&Qemu)?, 18);
    Ok(())
}
