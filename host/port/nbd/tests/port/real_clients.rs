//! The clients that people use. A missing tool is a failure that names its Debian package.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use cofferdam_port_nbd::NbdOptions;
use cofferdam_port_nbd::service::IoOp;

use crate::mock::{Mock, Served, eventually, geometry};

/// Runs a tool under a time limit, and returns its output if it succeeded.
fn run(package: &str, tool: &str, arguments: &[&str]) -> Output {
    let output = Command::new("timeout").arg("20").arg(tool).args(arguments).output().expect("coreutils' timeout runs");
    assert_ne!(output.status.code(), Some(127), "'{tool}' is missing: install the package {package}");
    assert!(
        output.status.success(),
        "{tool} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn uri(path: &Path) -> String {
    format!("nbd+unix:///?socket={}", path.display())
}

#[test]
fn nbdinfo_sees_what_the_device_honours() {
    let served = Served::ordinary();
    let info = run("libnbd-bin", "nbdinfo", &["--json", &uri(&served.path)]);
    let info: String = String::from_utf8_lossy(&info.stdout).split_whitespace().collect();
    for expected in [
        "\"protocol\":\"newstyle-fixed\"",
        "\"structured\":true",
        "\"export-size\":4194304",
        "\"is_read_only\":false",
        "\"can_flush\":true",
        "\"can_fua\":true",
        "\"can_multi_conn\":true",
        "\"can_trim\":true",
        "\"can_zero\":true",
        "\"can_df\":true",
        "\"can_fast_zero\":false",
        "\"can_cache\":false",
        "\"block_size_minimum\":512",
        "\"block_size_preferred\":4096",
        "\"block_size_maximum\":33554432",
        "\"description\":\"memory\"",
    ] {
        assert!(info.contains(expected), "{expected} in {info}");
    }
    let list = run("libnbd-bin", "nbdinfo", &["--list", &uri(&served.path)]);
    assert!(String::from_utf8_lossy(&list.stdout).contains("export=\"disk\""));
    served.finish();

    let mut poor = geometry(1 << 20);
    (poor.read_only, poor.can_flush, poor.can_discard, poor.can_write_zeroes) = (true, false, false, false);
    let served = Served::new(Mock::new(poor, 1, 1 << 20), NbdOptions::default());
    let info = run("libnbd-bin", "nbdinfo", &["--json", &uri(&served.path)]);
    let info: String = String::from_utf8_lossy(&info.stdout).split_whitespace().collect();
    for expected in [
        "\"is_read_only\":true",
        "\"can_flush\":false",
        "\"can_fua\":false",
        "\"can_trim\":false",
        "\"can_zero\":false",
    ] {
        assert!(info.contains(expected), "{expected} in {info}");
    }
    served.finish();
}

#[test]
fn nbdcopy_takes_an_image_in_and_out() {
    let served = Served::new(Mock::new(geometry(16 << 20), 2, 8 << 20), NbdOptions::default());
    let directory = tempfile::tempdir().expect("a directory");
    let (source, copy) = (directory.path().join("source"), directory.path().join("copy"));
    let mut image = vec![0; 16 << 20];
    for (at, byte) in image.iter_mut().enumerate().filter(|(at, _)| at >> 20 & 1 == 0) {
        *byte = (at / 77) as u8;
    }
    std::fs::File::create(&source).and_then(|mut file| file.write_all(&image)).expect("written");
    let (source, copy_name) = (source.display().to_string(), copy.display().to_string());
    run("libnbd-bin", "nbdcopy", &["--connections=4", "--requests=32", "--flush", &source, &uri(&served.path)]);
    assert!(*served.mock.0.medium.lock().expect("not poisoned") == image, "the medium is the image");
    assert!(served.mock.asked().iter().any(|asked| asked.op == IoOp::Flush));
    run("libnbd-bin", "nbdcopy", &["--connections=4", "--requests=32", &uri(&served.path), &copy_name]);
    assert!(std::fs::read(&copy).expect("read") == image, "the copy is the image");
    served.finish();
}

#[test]
fn qemu_io_writes_with_fua_zeroes_discards_and_reads_back() {
    let served = Served::ordinary();
    let path = format!("nbd:unix:{}", served.path.display());
    let commands = [
        "write -f -P 0x5a 0 1M",
        "read -P 0x5a 0 1M",
        "write -z 64k 64k",
        "read -P 0 64k 64k",
        "write -z -u 128k 512",
        "discard 1M 1M",
        "read -P 0xdd 1M 1M",
        "write -P 0x11 2M 2M",
        "read -P 0x11 2M 2M",
        "flush",
    ];
    let mut arguments = vec!["-f", "raw", "-t", "none"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(&path);
    let output = run("qemu-utils", "qemu-io", &arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(!text.contains("failed") && !text.contains("error"), "{text}");
    assert!(served.mock.asked().iter().any(|asked| asked.op == IoOp::Discard));
    served.finish();
}

/// What ESHUTDOWN is called by the C library.
const SHUTDOWN: &str = "Cannot send after transport endpoint shutdown";

/// Starts a tool under a time limit.
fn start(tool: &str, arguments: &[&str]) -> Child {
    let mut command = Command::new("timeout");
    command.arg("20").arg(tool).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("coreutils' timeout runs")
}

/// Both of its outputs, and that it failed by itself.
fn failure(child: Child) -> String {
    let output = child.wait_with_output().expect("it ends");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.status.code() != Some(124), "{}: {text}", output.status);
    text
}

/// One of two clients is revoked in the middle of its work: it says why it failed, the other one's copy is whole.
#[test]
fn a_revoked_nbdcopy_and_qemu_io_say_why_and_others_do_not_notice() {
    type Arguments = fn(&Path) -> Vec<String>;
    // A client that has the processor taken from it for longer than its linger, and then sends something, finds a closed connection before it has read why. So it is a medium
    // of which nbdcopy reads all at once, and each is revoked when the device has everything that it is going to ask for.
    let revoked: [(&str, usize, Arguments); 2] = [
        ("nbdcopy", 4, |path| vec!["--connections=1".into(), uri(path), "null:".into()]),
        ("qemu-io", 1, |path| {
            let path = format!("nbd:unix:{}", path.display());
            ["-f", "raw", "-t", "none", "-c", "write -P 1 0 64k", &path].map(String::from).to_vec()
        }),
    ];
    for (tool, pieces, arguments) in revoked {
        let served = Served::new(Mock::new(geometry(256 << 10), 1, 4 << 20), NbdOptions::default());
        served.mock.set(|s| &s.slow, true);
        let arguments = arguments(&served.path);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let victim = start(tool, &arguments);
        eventually("all of its requests are with the device", || served.mock.in_flight() == pieces);
        // What comes now is not held, so the other one works while the victim waits.
        served.mock.set(|s| &s.slow, false);
        let directory = tempfile::tempdir().expect("a directory");
        let copy = directory.path().join("copy");
        let other = start("nbdcopy", &["--connections=1", &uri(&served.path), &copy.display().to_string()]);
        served.mock.revoke_handle(0);
        served.mock.fail_revoked();
        let text = failure(victim);
        assert!(text.contains(SHUTDOWN), "{tool}: {text}");
        let other = other.wait_with_output().expect("it ends");
        assert!(other.status.success(), "{}", String::from_utf8_lossy(&other.stderr));
        assert!(std::fs::read(&copy).expect("read") == *served.mock.0.medium.lock().expect("not poisoned"));
        served.finish();
    }
}

#[test]
fn fio_verifies_at_depth() {
    let served = Served::new(Mock::new(geometry(16 << 20), 1, 4 << 20), NbdOptions::default());
    let uri = format!("--uri={}", uri(&served.path));
    // By default fio leaves a file of its verification state in the working directory.
    let output = run(
        "fio",
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            "--bsrange=4k-256k",
            "--size=16M",
            "--iodepth=32",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--verify_state_save=0",
        ],
    );
    assert!(String::from_utf8_lossy(&output.stdout).contains("err= 0"));
    served.finish();
}
