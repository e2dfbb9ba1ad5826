//! Hand-overs on a tree with a kernel behind it.

use std::fs;

use self::tree::{Cut, Tree};
use super::*;

pub(crate) mod tree;

const DISK: &str = "0000:00:04.0";
const STORAGE: u32 = 0x01_00_00;

fn operator(force: bool) -> HandoverOptions {
    HandoverOptions { force, by: By::Operator }
}

fn load(sysfs: &Sysfs) -> HandoverOptions {
    HandoverOptions { force: false, by: By::load(sysfs) }
}

fn bind(tree: &Tree, via: Via, options: &HandoverOptions) -> Result<Handover, PciError> {
    let sysfs = tree.sysfs();
    let claim = Claim::take(&sysfs, DISK.parse().unwrap(), "test").unwrap();
    hand_over(&sysfs, &claim, via, options)
}

fn unbind(tree: &Tree, options: &HandoverOptions) -> Result<Report, PciError> {
    let sysfs = tree.sysfs();
    let claim = Claim::take(&sysfs, DISK.parse().unwrap(), "test").unwrap();
    give_back(&sysfs, &claim, options)
}

fn disk() -> Tree {
    let tree = Tree::new();
    tree.function(DISK, STORAGE, Some("virtio-pci"));
    tree
}

#[track_caller]
fn assert_home(tree: &Tree) {
    assert_eq!(tree.driver_of(DISK).as_deref(), Some("virtio-pci"));
    assert_eq!(tree.override_of(DISK), "(null)");
    assert!(!tree.has_record(DISK), "a function that is as it was has no record");
}

#[track_caller]
fn assert_away(tree: &Tree, via: Via) {
    assert_eq!(tree.driver_of(DISK).as_deref(), Some(via.driver()));
    assert_eq!(tree.override_of(DISK), via.driver());
    assert!(tree.has_record(DISK));
}

#[test]
fn a_function_goes_and_comes_back_as_it_was_and_silent() {
    let tree = disk();
    let handover = bind(&tree, Via::Uio, &operator(false)).unwrap();
    assert!(!handover.was_there);
    assert_away(&tree, Via::Uio);
    let record = record(&tree.sysfs(), DISK.parse().unwrap()).unwrap().unwrap();
    assert_eq!((record.driver.as_deref(), record.driver_override, record.by), (Some("virtio-pci"), None, By::Operator));
    assert_eq!(tree.command_of(DISK), 0x0006, "handing over touches no register");
    let report = unbind(&tree, &operator(false)).unwrap();
    assert_eq!((report.driver.as_deref(), report.is_silent), (Some("virtio-pci"), Some(true)));
    assert_eq!(tree.command_of(DISK), 0x0002, "bus mastering is off, the rest of the command register as it was");
    assert_home(&tree);
}

#[test]
fn the_record_comes_first_and_goes_last() {
    let tree = disk();
    tree.live_until(None);
    bind(&tree, Via::Uio, &operator(false)).unwrap();
    let log = tree.log();
    assert_eq!(log.first().unwrap(), &format!("put {DISK}.json"), "{log:?}");
    tree.live_until(None);
    unbind(&tree, &operator(false)).unwrap();
    let log = tree.log();
    assert_eq!(log.last().unwrap(), &format!("remove {DISK}.json"), "{log:?}");
    let config = log.iter().position(|path| path.ends_with("/config")).unwrap();
    let probe = log.iter().position(|path| path.ends_with("/drivers_probe")).unwrap();
    assert!(config < probe, "silent before another driver has it: {log:?}");
}

/// Every place at which a host that does `act` can be killed.
fn cuts(prepare: impl Fn() -> Tree, act: impl Fn(&Tree)) -> Vec<Cut> {
    let tree = prepare();
    tree.live_until(None);
    act(&tree);
    let effects = tree.log().len();
    assert!(effects >= 3, "{:?}", tree.log());
    (0..effects).flat_map(|n| [Cut::Before(n), Cut::After(n)]).collect()
}

#[test]
fn a_hand_over_that_is_killed_anywhere_is_finished_by_a_second_one_or_taken_back() {
    let prepare = || {
        let tree = disk();
        tree.module("vfio-pci");
        tree.group(3, "DMA-FQ", &[DISK]);
        tree
    };
    let go = |tree: &Tree| drop(bind(tree, Via::Vfio, &operator(false)));
    for cut in cuts(prepare, go) {
        for finishes in [true, false] {
            let tree = prepare();
            tree.live_until(Some(cut));
            go(&tree);
            assert!(tree.is_dead(), "{cut:?}");
            tree.live_until(None);
            if finishes {
                bind(&tree, Via::Vfio, &operator(false)).unwrap_or_else(|error| panic!("{cut:?}: {error}"));
                assert_away(&tree, Via::Vfio);
            }
            unbind(&tree, &operator(false)).unwrap_or_else(|error| panic!("{cut:?}: {error}"));
            assert_home(&tree);
        }
    }
}

#[test]
fn a_return_that_is_killed_anywhere_is_finished_by_a_second_one_or_taken_back() {
    let prepare = || {
        let tree = disk();
        bind(&tree, Via::Uio, &operator(false)).unwrap();
        tree
    };
    let go = |tree: &Tree| drop(unbind(tree, &operator(false)));
    for cut in cuts(prepare, go) {
        for finishes in [true, false] {
            let tree = prepare();
            tree.live_until(Some(cut));
            go(&tree);
            assert!(tree.is_dead(), "{cut:?}");
            tree.live_until(None);
            if !finishes {
                bind(&tree, Via::Uio, &operator(false)).unwrap_or_else(|error| panic!("{cut:?}: {error}"));
                assert_eq!(tree.driver_of(DISK).as_deref(), Some("uio_pci_generic"), "{cut:?}");
            }
            unbind(&tree, &operator(false)).unwrap_or_else(|error| panic!("{cut:?}: {error}"));
            assert_home(&tree);
        }
    }
}

#[test]
fn killed_anywhere_the_original_override_and_no_driver_come_back_too() {
    let prepare = || {
        let tree = Tree::new();
        tree.function(DISK, STORAGE, None);
        fs::write(tree.dir(DISK).join("driver_override"), "none\n").unwrap();
        tree
    };
    for cut in cuts(prepare, |tree| drop(bind(tree, Via::Uio, &operator(false)))) {
        let tree = prepare();
        tree.live_until(Some(cut));
        drop(bind(&tree, Via::Uio, &operator(false)));
        tree.live_until(None);
        bind(&tree, Via::Uio, &operator(false)).unwrap();
        assert_away(&tree, Via::Uio);
        unbind(&tree, &operator(false)).unwrap();
        assert_eq!((tree.driver_of(DISK), tree.override_of(DISK).as_str()), (None, "none"), "{cut:?}");
        assert!(!tree.has_record(DISK));
    }
}

#[test]
fn both_commands_can_be_given_again() {
    let tree = disk();
    bind(&tree, Via::Uio, &operator(false)).unwrap();
    let again = bind(&tree, Via::Uio, &operator(false)).unwrap();
    assert!(again.steps.is_empty() && !again.was_there, "{again:?}");
    unbind(&tree, &operator(false)).unwrap();
    let again = unbind(&tree, &operator(false)).unwrap();
    assert!(again.steps.is_empty() && !again.is_kept, "{again:?}");
    assert_home(&tree);
}

#[test]
fn a_load_gives_back_what_it_took_and_leaves_what_an_operator_bound() {
    let tree = disk();
    let load = load(&tree.sysfs());
    bind(&tree, Via::Uio, &load).unwrap();
    assert!(!unbind(&tree, &load).unwrap().is_kept);
    assert_home(&tree);
    bind(&tree, Via::Uio, &operator(false)).unwrap();
    bind(&tree, Via::Uio, &load).unwrap();
    assert!(unbind(&tree, &load).unwrap().is_kept);
    assert_away(&tree, Via::Uio);
    unbind(&tree, &operator(false)).unwrap();
    assert_home(&tree);
}

#[test]
fn what_a_killed_load_had_goes_back_by_an_operators_hand() {
    let tree = disk();
    let dead = HandoverOptions { force: false, by: By::Load(ProcessId { pid: 4_000_000, start: Some(7) }) };
    bind(&tree, Via::Uio, &dead).unwrap();
    let report = unbind(&tree, &operator(false)).unwrap();
    assert_eq!((report.is_silent, tree.command_of(DISK)), (Some(true), 0x0002));
    assert_home(&tree);
}

#[test]
fn a_load_silences_what_a_killed_load_left_running_on_uio_and_the_function_is_its_own() {
    let tree = disk();
    let dead = HandoverOptions { force: false, by: By::Load(ProcessId { pid: 4_000_000, start: Some(7) }) };
    bind(&tree, Via::Uio, &dead).unwrap();
    assert_eq!(tree.command_of(DISK), 0x0006, "it masters the bus");
    let load = load(&tree.sysfs());
    let taken = bind(&tree, Via::Uio, &load).unwrap();
    assert_eq!((taken.was_there, taken.is_silent, tree.command_of(DISK)), (false, Some(true), 0x0002));
    assert_eq!(record(&tree.sysfs(), DISK.parse().unwrap()).unwrap().unwrap().by, load.by);
    unbind(&tree, &load).unwrap();
    assert_home(&tree);
}

#[test]
fn a_function_that_the_kernel_drives_is_not_touched_by_a_hand_over_that_is_refused() {
    let tree = disk();
    tree.group(3, "DMA", &[DISK]);
    tree.live_until(None);
    assert!(matches!(bind(&tree, Via::Uio, &load(&tree.sysfs())), Err(PciError::Unusable { .. })));
    assert_eq!((tree.log().len(), tree.command_of(DISK)), (0, 0x0006), "{:?}", tree.log());
}

#[test]
fn from_uio_to_vfio_the_way_home_is_kept() {
    let tree = disk();
    bind(&tree, Via::Uio, &operator(false)).unwrap();
    tree.group(3, "identity", &[DISK]);
    bind(&tree, Via::Vfio, &operator(false)).unwrap();
    assert_away(&tree, Via::Vfio);
    unbind(&tree, &operator(false)).unwrap();
    assert_home(&tree);
}

#[test]
fn what_somebody_else_bound_is_used_and_left_alone_unless_forced() {
    let tree = Tree::new();
    tree.function(DISK, STORAGE, Some("uio_pci_generic"));
    let load = load(&tree.sysfs());
    assert!(bind(&tree, Via::Uio, &load).unwrap().was_there);
    assert!(!tree.has_record(DISK));
    assert!(unbind(&tree, &load).unwrap().is_kept);
    assert!(matches!(unbind(&tree, &operator(false)), Err(PciError::Unusable { .. })));
    assert_eq!(tree.driver_of(DISK).as_deref(), Some("uio_pci_generic"));
    fs::write(tree.dir(DISK).join("driver_override"), "uio_pci_generic\n").unwrap();
    unbind(&tree, &operator(true)).unwrap();
    assert_eq!(tree.override_of(DISK), "(null)");
}

#[test]
fn a_driver_that_does_not_take_the_function_costs_it_nothing() {
    let tree = disk();
    tree.refuse("uio_pci_generic");
    let error = bind(&tree, Via::Uio, &operator(false)).unwrap_err();
    assert!(
        matches!(&error, PciError::Unusable { why, .. } if why.contains("uio_pci_generic has not taken it")),
        "{error}"
    );
    assert_home(&tree);
}

#[test]
fn a_module_that_cannot_be_loaded_is_named_with_its_command() {
    let tree = disk();
    fs::remove_dir_all(tree.sys().join("bus/pci/drivers/uio_pci_generic")).unwrap();
    let error = bind(&tree, Via::Uio, &operator(false)).unwrap_err();
    assert!(error.to_string().contains("modprobe uio_pci_generic"), "{error}");
    assert_home(&tree);
}

#[test]
fn an_old_driver_that_does_not_take_it_back_leaves_the_record_and_a_later_call_goes_on() {
    let tree = disk();
    bind(&tree, Via::Uio, &operator(false)).unwrap();
    fs::remove_dir_all(tree.sys().join("bus/pci/drivers/virtio-pci")).unwrap();
    assert!(unbind(&tree, &operator(false)).unwrap_err().to_string().contains("modprobe virtio-pci"));
    assert!(tree.has_record(DISK));
    tree.driver("virtio-pci");
    unbind(&tree, &operator(false)).unwrap();
    assert_home(&tree);
}

#[test]
fn an_old_driver_that_matches_no_id_is_asked_by_name() {
    let tree = disk();
    tree.driver("by-hand");
    fs::remove_file(tree.dir(DISK).join("driver")).unwrap();
    std::os::unix::fs::symlink("../../../bus/pci/drivers/by-hand", tree.dir(DISK).join("driver")).unwrap();
    tree.live_until(None);
    bind(&tree, Via::Uio, &operator(false)).unwrap();
    // Nothing matches by itself now, as with an id that was given by new_id.
    tree.refuse("virtio-pci");
    unbind(&tree, &operator(false)).unwrap();
    assert_eq!(tree.driver_of(DISK).as_deref(), Some("by-hand"));
}

#[test]
fn a_function_that_is_in_use_is_refused_with_the_reason_unless_forced() {
    let tree = disk();
    let dir = tree.child(DISK, "virtio1/block/vda", "block");
    fs::write(dir.join("dev"), "254:0\n").unwrap();
    let mounts = "30 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n";
    fs::write(tree.proc().join("self/mountinfo"), mounts).unwrap();
    let before = tree.picture();
    let refused = bind(&tree, Via::Uio, &operator(false)).unwrap_err();
    assert!(matches!(&refused, PciError::InUse { why, .. } if why == "vda is mounted at /"), "{refused}");
    let changed: Vec<_> = tree.picture().into_iter().filter(|line| !before.contains(line)).collect();
    assert!(
        changed.iter().all(|line| line.contains("/run/cofferdam")),
        "only the claim left its directory: {changed:?}"
    );
    bind(&tree, Via::Uio, &operator(true)).unwrap();
    assert_away(&tree, Via::Uio);
}

#[test]
fn a_dry_run_says_what_an_operator_would_type_and_changes_nothing() {
    let tree = disk();
    tree.module("uio_pci_generic");
    let (sysfs, address) = (tree.sysfs(), DISK.parse().unwrap());
    let before = tree.picture();
    let steps = plan_hand_over(&sysfs, address, Via::Uio, &operator(false)).unwrap();
    assert_eq!(tree.picture(), before);
    let root = tree.root().display();
    let device = format!("{root}/sys/bus/pci/devices/{DISK}");
    let record = format!("{root}/run/cofferdam/pci/{DISK}.json");
    let text: Vec<String> = steps.iter().map(ToString::to_string).collect();
    assert_eq!(
        text,
        [
            format!("# remember in {record}: virtio-pci, driver_override none"),
            "modprobe uio_pci_generic".to_owned(),
            format!("echo 'uio_pci_generic' > {device}/driver_override"),
            format!("echo {DISK} > {device}/driver/unbind"),
            format!("echo {DISK} > {root}/sys/bus/pci/drivers_probe"),
            format!("readlink {device}/driver   # now uio_pci_generic"),
        ]
    );
    assert_eq!(steps, without_time(bind(&tree, Via::Uio, &operator(false)).unwrap().steps, &steps), "the same steps");
    let before = tree.picture();
    let text: Vec<String> =
        plan_give_back(&sysfs, address, &operator(false)).unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(tree.picture(), before);
    assert_eq!(
        text,
        [
            format!("echo {DISK} > {device}/driver/unbind"),
            format!("setpci -s {DISK} COMMAND=0:4   # bus mastering off, and read back"),
            format!("echo 1 > {device}/reset"),
            format!("# free what a killed host left in hugepages, cofferdam/{DISK}"),
            format!("echo > {device}/driver_override"),
            format!("echo {DISK} > {root}/sys/bus/pci/drivers_probe"),
            format!("readlink {device}/driver   # now virtio-pci"),
            format!("rm {record}"),
        ]
    );
}

/// The record's time is taken when the plan is made.
fn without_time(mut steps: Vec<Step>, like: &[Step]) -> Vec<Step> {
    if let (Some(Step::Record { record, .. }), Some(Step::Record { record: other, .. })) =
        (steps.first_mut(), like.first())
    {
        record.unix_s = other.unix_s;
    }
    steps
}

#[test]
fn another_function_in_the_same_place_has_nothing_to_do_with_the_record() {
    let tree = disk();
    bind(&tree, Via::Uio, &operator(false)).unwrap();
    // Unplugged, and another one plugged in.
    fs::remove_dir_all(tree.dir(DISK)).unwrap();
    fs::remove_file(tree.sys().join("bus/pci/devices").join(DISK)).unwrap();
    let gone = unbind(&tree, &operator(false)).unwrap();
    assert_eq!((gone.driver, gone.is_silent), (None, Some(true)), "what is out of the machine is silent");
    assert!(!tree.has_record(DISK));
    assert!(matches!(unbind(&tree, &operator(false)), Err(PciError::NotFound(_))));
    tree.function(DISK, STORAGE, Some("virtio-pci"));
    bind(&tree, Via::Uio, &operator(false)).unwrap();
    fs::remove_dir_all(tree.dir(DISK)).unwrap();
    fs::remove_file(tree.sys().join("bus/pci/devices").join(DISK)).unwrap();
    tree.function(DISK, STORAGE, None);
    fs::write(tree.dir(DISK).join("device"), "0x1041\n").unwrap();
    tree.live_until(None);
    unbind(&tree, &operator(false)).unwrap();
    assert_eq!(tree.log(), [format!("remove {DISK}.json")], "the record goes, the other function is left alone");
}

#[test]
fn a_function_that_is_unplugged_anywhere_in_its_return_goes_back_to_nobody() {
    let away = || {
        let tree = disk();
        bind(&tree, Via::Uio, &load(&tree.sysfs())).unwrap();
        tree.live_until(None);
        tree
    };
    let tree = away();
    unbind(&tree, &load(&tree.sysfs())).unwrap();
    // The last one is the record's removal, which needs no function.
    for n in 0..tree.log().len() {
        let tree = away();
        tree.unplug_before(n, DISK);
        let report = unbind(&tree, &load(&tree.sysfs())).unwrap_or_else(|error| panic!("{n}: {error}"));
        assert_eq!(report.driver, None, "{n}");
        assert!(!tree.has_record(DISK), "{n}");
    }
}

#[test]
fn nothing_is_asked_of_a_function_that_is_out_of_the_machine_and_still_listed() {
    let tree = disk();
    bind(&tree, Via::Uio, &operator(false)).unwrap();
    fs::write(tree.dir(DISK).join("config"), [0xff; 64]).unwrap();
    tree.live_until(None);
    let report = unbind(&tree, &operator(false)).unwrap();
    assert_eq!((report.driver, report.is_silent), (None, Some(true)));
    assert_eq!(tree.override_of(DISK), "(null)");
    assert!(!tree.has_record(DISK));
    let log = tree.log();
    let asked = ["reset", "config", "drivers_probe"].iter().any(|file| log.iter().any(|path| path.ends_with(file)));
    assert!(!asked, "{log:?}");
}

#[test]
fn a_function_whose_bus_mastering_stays_on_goes_back_and_frees_nothing() {
    let tree = disk();
    bind(&tree, Via::Uio, &operator(false)).unwrap();
    // All that can be read is shorter than the command register.
    fs::write(tree.dir(DISK).join("config"), [0xf4, 0x1a, 0x42]).unwrap();
    let report = unbind(&tree, &operator(false)).unwrap();
    assert_eq!((report.is_silent, report.freed_bytes), (Some(false), 0));
    assert_home(&tree);
}

#[test]
fn a_damaged_record_is_told_of_and_never_followed() {
    let hostile = [
        "".to_owned(),
        "{".to_owned(),
        "x".repeat(100_000),
        record_with("0000:00:05.0", "virtio-pci"),
        record_with(DISK, "../../../../devices/pci0000:00/0000:00:04.0"),
        record_with(DISK, ".."),
        record_with(DISK, "a\\nb"),
    ];
    for text in hostile {
        let tree = disk();
        bind(&tree, Via::Uio, &operator(false)).unwrap();
        let path = tree.run().join(format!("cofferdam/pci/{DISK}.json"));
        fs::write(&path, &text).unwrap();
        let error = unbind(&tree, &operator(false)).unwrap_err();
        assert!(error.to_string().contains("damaged"), "{text:.80}: {error}");
        assert_eq!(tree.driver_of(DISK).as_deref(), Some("uio_pci_generic"));
        unbind(&tree, &operator(true)).unwrap();
        assert_eq!(tree.driver_of(DISK).as_deref(), Some("virtio-pci"));
        assert!(!path.exists(), "{text:.80}");
    }
}

fn record_with(address: &str, driver: &str) -> String {
    format!(
        r#"{{"address":"{address}","vendor":6900,"device":4162,"driver":"{driver}","driver_override":null,"via":"uio","by":"operator","unix_s":1}}"#
    )
}

#[test]
fn a_directory_that_others_may_write_is_not_trusted() {
    use std::os::unix::fs::PermissionsExt;
    let tree = disk();
    bind(&tree, Via::Uio, &operator(false)).unwrap();
    fs::set_permissions(tree.run().join("cofferdam/pci"), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(unbind(&tree, &operator(false)), Err(PciError::Io { .. })));
    assert_eq!(tree.driver_of(DISK).as_deref(), Some("uio_pci_generic"));
}
