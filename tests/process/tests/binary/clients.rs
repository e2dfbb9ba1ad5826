//! The clients that people use, on a device that people use: qemu-storage-daemon with a raw file.

use std::path::Path;

use cofferdam_process_tests::backend::{Backend, tool};
use cofferdam_process_tests::host::{Daemon, text};
use cofferdam_process_tests::nbd::{Client, Command};
use cofferdam_process_tests::process::{Ended, Process};

const MIB: u64 = 1 << 20;

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

#[track_caller]
fn run(name: &str, arguments: &[&str]) -> Ended {
    Process::run(tool(name).args(arguments)).expect(0)
}

#[track_caller]
fn qemu_io(socket: &Path, commands: &[&str]) {
    let mut command = tool("qemu-io");
    command.args(["-f", "raw", "-t", "none"]);
    for line in commands {
        command.args(["-c", line]);
    }
    let ended = Process::run(command.arg(format!("nbd:unix:{}", socket.display()))).expect(0);
    let said = ended.stdout + &ended.stderr;
    assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
}

#[test]
fn nbdinfo_is_told_what_the_device_honours_and_no_more() {
    let daemon = Daemon::start();
    let qemu = Backend::qemu(64 * MIB, 1);
    let socket = daemon.serve(&qemu.address(), "disk", &[]);
    let info = run("nbdinfo", &["--json", &uri(&socket)]).json();
    let export = &info["exports"][0];
    assert_eq!(info["structured"], true, "{info}");
    assert_eq!(export["export-size"], 64 * MIB, "{info}");
    for can in ["can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero", "can_df"] {
        assert_eq!(export[can], true, "{can} in {info}");
    }
    for no in ["is_read_only", "can_cache", "can_fast_zero"] {
        assert_eq!(export[no], false, "{no} in {info}");
    }
    assert_eq!(export["block_size_minimum"], 512, "{info}");

    let sim = Backend::sim(&["--memory", "16M", "--read-only", "--block-size", "4096"]);
    let socket = daemon.serve(&sim.address(), "rom", &[]);
    let info = run("nbdinfo", &["--json", &uri(&socket)]).json();
    let export = &info["exports"][0];
    assert_eq!(export["is_read_only"], true, "{info}");
    for no in ["can_trim", "can_zero"] {
        assert_eq!(export[no], false, "{no} in {info}");
    }
    assert_eq!(export["block_size_minimum"], 4096, "{info}");
    daemon.unload("disk", &[]).assert_clean();
    daemon.unload("rom", &[]).assert_clean();
}

#[test]
fn nbdcopy_takes_an_image_in_and_out_unchanged() {
    let daemon = Daemon::start();
    let qemu = Backend::qemu(48 * MIB, 1);
    let socket = daemon.serve(&qemu.address(), "disk", &[]);
    let (source, copy) = (daemon.path("source.img"), daemon.path("copy.img"));
    // Data, a hole, and data that is all zeroes, so that every way of writing is taken.
    let mut image = vec![0; 48 << 20];
    for (at, byte) in image.iter_mut().enumerate().filter(|(at, _)| at >> 22 & 1 == 0) {
        *byte = (at / 509) as u8;
    }
    std::fs::write(&source, &image).expect("an image");
    let (source, copy) = (text(&source), text(&copy));
    run("nbdcopy", &["--flush", "--connections=4", "--requests=32", &source, &uri(&socket)]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &source, &text(&qemu.image())]);
    run("nbdcopy", &["--connections=4", "--requests=32", &uri(&socket), &copy]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &source, &copy]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &source, &format!("nbd:unix:{}", socket.display())]);
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn qemu_io_finds_its_patterns_again_after_fua_zeroes_and_discard() {
    let daemon = Daemon::start();
    let qemu = Backend::qemu(16 * MIB, 1);
    let socket = daemon.serve(&qemu.address(), "disk", &[]);
    qemu_io(
        &socket,
        &[
            "write -P 0x5a 0 3M",
            "write -f -P 0xa5 3M 64k",
            "read -P 0x5a 0 3M",
            "read -P 0xa5 3M 64k",
            "write -z 64k 128k",
            "read -P 0 64k 128k",
            "write -z -u 1M 64k",
            "read -P 0 1M 64k",
            "discard 2M 512k",
            "aio_write -P 0x11 8M 1M",
            "aio_write -P 0x22 9M 1M",
            "aio_flush",
            "read -P 0x11 8M 1M",
            "read -P 0x22 9M 1M",
            "write -P 0x33 16776704 512",
            "read -P 0x33 16776704 512",
            "flush",
        ],
    );
    daemon.unload("disk", &[]).assert_clean();
    let image = std::fs::read(qemu.image()).expect("the image");
    assert!(image[..1 << 16].iter().all(|byte| *byte == 0x5a), "a write is on the medium");
    assert!(
        image[3 << 20..(3 << 20) + (1 << 16)].iter().all(|byte| *byte == 0xa5),
        "a write with FUA is on the medium"
    );
}

#[test]
fn fio_verifies_what_it_wrote_at_depth_32() {
    let daemon = Daemon::start();
    let qemu = Backend::qemu(64 * MIB, 1);
    let socket = daemon.serve(&qemu.address(), "disk", &[]);
    let arguments = "--name=verify --ioengine=nbd --rw=randrw --bsrange=4k-64k --size=64M --io_size=96M --iodepth=32 \
                     --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=256 --verify_state_save=0 --fsync=64";
    let mut fio = tool("fio");
    fio.current_dir(daemon.path("")).args(arguments.split_whitespace()).arg(format!("--uri={}", uri(&socket)));
    let ended = Process::run(&mut fio).expect(0);
    assert!(ended.stdout.contains("err= 0"), "{}", ended.stdout);
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn two_queues_and_two_connections_see_one_disk_and_one_flush_covers_both() {
    let daemon = Daemon::start();
    let qemu = Backend::qemu(16 * MIB, 2);
    let socket = daemon.serve(&qemu.address(), "disk", &["--queues", "2"]);
    let (mut one, mut two) = (Client::new(&socket), Client::new(&socket));
    assert_eq!(one.write(0, &[1; 8192]), 0);
    assert_eq!(two.write(8192, &[2; 8192]), 0);
    assert_eq!(two.flush(), 0);
    let image = std::fs::read(qemu.image()).expect("the image");
    assert!(image[..8192].iter().all(|byte| *byte == 1), "a flush covers what another connection wrote");
    assert!(image[8192..16384].iter().all(|byte| *byte == 2));
    assert_eq!(two.read(0, 8192), [1; 8192]);
    assert_eq!(one.read(8192, 8192), [2; 8192]);
    assert_eq!(one.call(Command::Trim, 0, 4096).expect("an answer"), Ok(Vec::new()));
    let binding = daemon.binding("disk").expect("it serves");
    assert_eq!(binding["lanes"], 2, "{binding}");
    let handles = binding["handles"].as_array().expect("a list");
    let mut lanes: Vec<_> = handles.iter().filter_map(|handle| handle["lane"].as_u64()).collect();
    lanes.sort_unstable();
    assert_eq!(lanes, [0, 1], "connections are spread over the lanes: {binding}");
    let certificate = daemon.unload("disk", &[]);
    certificate.assert_clean();
    assert_eq!(certificate.number("handles_revoked"), 2);
}
