//! The example does what it says, on a device in a process of its own.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

struct Device(Child);

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_example_loads_uses_and_unloads_a_driver() {
    let target = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target");
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("disk.sock");
    let mut device = Command::new(target.join("release/cofferdam-sim-blk"))
        .args(["--memory", "8M", "--socket"])
        .arg(&socket)
        .stdout(Stdio::piped())
        .spawn()
        .expect("target/release/cofferdam-sim-blk: run 'cargo xtask build' first");
    let mut ready = String::new();
    BufReader::new(device.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    let _device = Device(device);

    let output = Command::new(env!("CARGO_BIN_EXE_cofferdam-example-embed"))
        .arg(target.join("drivers/virtio-blk.wasm"))
        .arg(format!("vhost-user:{}", socket.display()))
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains("32 blocks written, flushed and read back"), "{out}");
    assert!(out.contains("\"outcome\": \"unloaded\""), "{out}");
}
