//! Devices that are missing, something else, taken, dying or lying.

use std::os::unix::net::UnixListener;

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::fake::{Fake, Pretence};
use cofferdam_process_tests::host::Daemon;
use cofferdam_process_tests::nbd::{Client, Command};
use cofferdam_process_tests::process::Ended;
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{PATIENCE, until_true};

#[track_caller]
fn load(daemon: &Daemon, device: &str) -> Ended {
    daemon.load(&programs::driver(), device, "x", &[])
}

#[test]
fn what_is_no_device_is_refused_by_name_and_leaves_nothing() {
    let daemon = Daemon::start();
    load(&daemon, "vhost-user:/no/such.sock").expect(3);
    let before = daemon.census();
    // No machine has this function; one that it has would be taken from it.
    load(&daemon, "pci:fffffffe:00:04.0").expect_error(3, &["no such PCI function"]);
    load(&daemon, "pci:0000:00:04").expect_error(2, &["pci:0000:00:04.0"]);
    for wrong in ["vhost-user", "vhost-user:", "vhost-user:relative.sock", "/x.sock", ""] {
        load(&daemon, wrong).expect_error(2, &["vhost-user:/path.sock"]);
    }
    load(&daemon, "vhost-user:/no/such.sock").expect_error(3, &["/no/such.sock", "no such socket"]);

    let file = daemon.path("file");
    std::fs::write(&file, "").expect("a file");
    load(&daemon, &format!("vhost-user:{}", file.display())).expect_error(1, &["not a socket"]);
    let stale = daemon.path("stale.sock");
    drop(UnixListener::bind(&stale).expect("a socket"));
    load(&daemon, &format!("vhost-user:{}", stale.display())).expect_error(1, &["nobody listens"]);
    load(&daemon, &format!("vhost-user:{}", daemon.socket().display())).expect_error(1, &["vhost-user"]);

    let cases: [(Pretence, &[&str]); 6] = [
        (Pretence::Garbage, &["not a vhost-user device"]),
        (Pretence::Silence, &["no answer within"]),
        (Pretence::HangUp, &["closed the connection"]),
        (Pretence::DieAfter(3), &["closed the connection"]),
        (Pretence::Network, &["not a device of this driver", "features 0x240000"]),
        (Pretence::Entropy, &["not a device of this driver"]),
    ];
    for (pretence, words) in cases {
        let fake = Fake::start(pretence);
        load(&daemon, &fake.address()).expect_error(1, &[&[fake.path().to_str().expect("UTF-8")], words].concat());
    }
    assert!(daemon.bindings().is_empty());
    daemon.wait_census(&before);
    daemon.stop(PATIENCE);
}

#[test]
fn a_device_that_dies_at_any_step_of_the_load_is_noticed() {
    let daemon = Daemon::start();
    let fake = Fake::start(Pretence::Block);
    load(&daemon, &fake.address()).expect(0);
    let steps = fake.messages();
    assert!(steps > 8, "{steps}");
    daemon.unload("x", &[]).assert_nothing_left();
    std::thread::scope(|scope| {
        for messages in 1..=steps {
            let daemon = &daemon;
            scope.spawn(move || {
                let fake = Fake::start(Pretence::DieAfter(messages));
                let name = format!("x{messages}");
                let ended = daemon.load(&programs::driver(), &fake.address(), &name, &[]);
                match ended.code {
                    // All of the set-up was answered: the device died while it served.
                    Some(0) => daemon.wait_gone(&name),
                    _ => drop(ended.expect_error(1, &[fake.path().to_str().expect("UTF-8")])),
                }
            });
        }
    });
    assert!(daemon.bindings().is_empty());
    daemon.stop(PATIENCE);
}

#[test]
fn a_device_that_is_taken_is_refused_in_this_daemon_and_in_another() {
    let (daemon, other) = (Daemon::start(), Daemon::start());
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    load(&daemon, &sim.address()).expect_error(1, &["already claimed"]);
    load(&other, &sim.address()).expect_error(1, &["already claimed"]);
    let link = daemon.path("link.sock");
    std::os::unix::fs::symlink(sim.socket(), &link).expect("a link");
    load(&other, &format!("vhost-user:{}", link.display())).expect_error(1, &["already claimed"]);
    assert_eq!(Client::new(&socket).write(0, &[1; 512]), 0, "the first binding serves on");
    daemon.unload("disk", &[]).assert_clean();
    other.serve(&sim.address(), "disk", &[]);
    other.unload("disk", &[]).assert_clean();
}

#[test]
fn a_device_that_dies_in_traffic_takes_its_binding_down_and_nothing_else() {
    let daemon = Daemon::start();
    let good = Backend::sim(&["--memory", "16M"]);
    let good_socket = daemon.serve(&good.address(), "good", &[]);
    assert_eq!(Client::new(&good_socket).write(0, &[1; 512]), 0);
    daemon.wait_idle("good");
    let before = daemon.census();
    let dying = Backend::sim(&["--memory", "16M", "--fault", "die@nth=20,op=write"]);
    let socket = daemon.serve(&dying.address(), "dying", &[]);
    let mut client = Client::new(&socket);
    let survived = (0..64)
        .take_while(|n| client.send_write(n * 512, &[1; 512]).is_ok() && client.reply().is_ok_and(|r| r.error == 0));
    assert_eq!(survived.count(), 19);
    daemon.wait_gone("dying");
    daemon.process.wait_stderr("outcome=Removed clean=true leaked_bytes=0");
    assert_eq!(Client::new(&good_socket).write(0, &[1; 512]), 0);
    drop(client);
    daemon.wait_idle("good");
    daemon.wait_census(&before);
    daemon.stop(PATIENCE);
}

/// The binding must have left by itself for this reason, and the certificate's log line must be there.
#[track_caller]
fn left_by_itself(daemon: &Daemon, name: &str, reason: &str) {
    daemon.wait_gone(name);
    let fault = daemon.logged(&["binding failed", &format!("\"{name}\"")]);
    assert!(fault.contains(reason), "no {reason:?} for {name}: {fault}");
}

#[test]
fn a_device_that_breaks_the_ring_takes_its_binding_down_and_nothing_else() {
    let daemon = Daemon::start();
    let good = Backend::sim(&["--memory", "16M"]);
    let good_socket = daemon.serve(&good.address(), "good", &[]);
    for lie in ["used-id-unknown", "used-id-idle", "used-id-twice", "length-long", "used-index-jump"] {
        let sim = Backend::sim(&["--memory", "16M", "--fault", &format!("lie:{lie}@nth=3,op=read")]);
        let socket = daemon.serve(&sim.address(), lie, &[]);
        let mut client = Client::new(&socket);
        // The lie may follow a good answer; what is asked after it must not be answered by a ring that is not believed.
        for number in 0..6 {
            if client.send(Command::Read, number * 512, 512).is_err() || client.reply().is_err() {
                break;
            }
        }
        left_by_itself(&daemon, lie, "device fault");
        assert_eq!(Client::new(&good_socket).write(0, &[1; 512]), 0);
    }
    daemon.stop(PATIENCE);
}

#[test]
fn a_device_that_lies_about_itself_is_refused_or_served_within_bounds() {
    let daemon = Daemon::start();
    let lies = [
        "capacity-zero",
        "capacity-huge",
        "block-size-zero",
        "block-size-odd",
        "block-size-huge",
        "seg-max-zero",
        "seg-max-huge",
        "size-max-zero",
        "size-max-tiny",
        "queues-zero",
        "queues-huge",
        "ranges-zero",
        "topology-huge",
        "short",
        "garbage",
        "capacity-changing",
    ];
    for lie in lies {
        let sim = Backend::sim(&["--memory", "16M", "--fault", &format!("config:{lie}")]);
        let ended = load(&daemon, &sim.address());
        match ended.code {
            Some(0) => daemon.unload("x", &[]).assert_clean(),
            _ => drop(ended.expect_error(1, &["vhost-user:"])),
        }
    }
    assert!(daemon.bindings().is_empty());
    daemon.stop(PATIENCE);
}

#[test]
fn an_error_of_the_device_is_the_clients_error_and_nothing_more() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M", "--fault", "fail:io@nth=2,op=read"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    let mut client = Client::new(&socket);
    let errors: Vec<_> = (0..4).map(|_| client.call(Command::Read, 0, 512).expect("an answer").err()).collect();
    assert_eq!(errors, [None, Some(5), None, None]);
    until_true("it is answered", || daemon.binding("disk").is_some_and(|binding| binding["requests_in_flight"] == 0));
    daemon.unload("disk", &[]).assert_clean();
}

/// The ladder gives the device up itself, and whoever watches the device must not take the hang-up for a loss.
#[test]
fn an_ordinary_unload_is_no_loss_of_the_device() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    for round in 0..40 {
        daemon.serve(&sim.address(), "disk", &[]);
        daemon.unload("disk", &[]).assert_clean();
        // Nor is there a certificate that nobody has been given.
        let again = daemon.run(&["unload", "disk"]);
        assert_eq!(again.code, Some(3), "round {round}: {}", again.stdout);
    }
    let ended = daemon.stop(PATIENCE);
    let losses: Vec<_> = ended.stderr.lines().filter(|line| line.contains("device lost")).collect();
    assert!(losses.is_empty(), "losses of a device that nobody has lost: {losses:?}");
}
