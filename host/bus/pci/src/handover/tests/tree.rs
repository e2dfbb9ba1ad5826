//! A tree like /sys with a kernel behind it: writes to `unbind`, `drivers_probe` and `bind` move the `driver` links, and any effect can be the last one.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cap_std::fs::Dir;
use tempfile::TempDir;

use crate::handover::{Effects, Kernel};
use crate::{Address, Roots, Sysfs};

/// Where the host is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Before effect `n` (from 0) has happened.
    Before(usize),
    /// After it has happened, before anybody is told.
    After(usize),
}

#[derive(Debug, Default)]
struct State {
    /// The driver that matches each function by its ids.
    native: BTreeMap<String, String>,
    /// Drivers that a module brings.
    modules: Vec<String>,
    /// Drivers that take nothing.
    refusing: Vec<String>,
    cut: Option<Cut>,
    effects: usize,
    is_dead: bool,
    /// Which function is unplugged before which effect.
    unplugged: Option<(usize, String)>,
    log: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Fake {
    sys: PathBuf,
    state: Mutex<State>,
}

/// Everything that a test needs; the files go when it does.
pub(crate) struct Tree {
    folder: TempDir,
    pub(crate) fake: Arc<Fake>,
}

impl Tree {
    pub(crate) fn new() -> Tree {
        let folder = tempfile::tempdir().unwrap();
        for below in [
            "sys/bus/pci/devices",
            "sys/bus/pci/drivers",
            "sys/devices/pci0000:00",
            "sys/class/block",
            "sys/class/net",
            "sys/kernel/iommu_groups",
            "proc/self/net",
            "dev",
            "run",
        ] {
            fs::create_dir_all(folder.path().join(below)).unwrap();
        }
        let sys = folder.path().join("sys");
        fs::write(sys.join("bus/pci/drivers_probe"), "").unwrap();
        fs::write(folder.path().join("proc/self/mountinfo"), "22 27 0:21 / /proc rw - proc proc rw\n").unwrap();
        fs::write(folder.path().join("proc/swaps"), "Filename Type Size Used Priority\n").unwrap();
        fs::write(folder.path().join("proc/self/net/route"), "Iface Destination Gateway Flags\n").unwrap();
        fs::write(folder.path().join("proc/self/net/ipv6_route"), "").unwrap();
        let tree = Tree { folder, fake: Arc::new(Fake { sys, state: Mutex::default() }) };
        tree.driver("virtio-pci");
        tree.driver("uio_pci_generic");
        tree.driver("vfio-pci");
        tree
    }

    /// As root would have it: what a test reads and writes is below this process's own user.
    pub(crate) fn sysfs(&self) -> Sysfs {
        Sysfs::with(self.roots(), Arc::clone(&self.fake) as Arc<dyn Effects>, self.run().display().to_string()).unwrap()
    }

    pub(crate) fn roots(&self) -> Roots {
        let below = |name: &str| self.folder.path().join(name);
        Roots { sys: below("sys"), proc: below("proc"), dev: below("dev"), run: below("run") }
    }

    pub(crate) fn sys(&self) -> PathBuf {
        self.folder.path().join("sys")
    }

    pub(crate) fn proc(&self) -> PathBuf {
        self.folder.path().join("proc")
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    pub(crate) fn root(&self) -> &Path {
        self.folder.path()
    }

    /// A driver that is loaded.
    pub(crate) fn driver(&self, name: &str) {
        self.fake.make_driver(name);
    }

    /// A driver that only a module brings.
    pub(crate) fn module(&self, name: &str) {
        let _ = fs::remove_dir_all(self.sys().join("bus/pci/drivers").join(name));
        self.fake.state.lock().unwrap().modules.push(name.to_owned());
    }

    pub(crate) fn refuse(&self, driver: &str) {
        self.fake.state.lock().unwrap().refusing.push(driver.to_owned());
    }

    /// A function like QEMU's virtio-blk; the kernel's driver has it, if it has one.
    pub(crate) fn function(&self, address: &str, class: u32, driver: Option<&str>) -> Address {
        let dir = self.sys().join("devices/pci0000:00").join(address);
        fs::create_dir_all(&dir).unwrap();
        symlink(format!("../../../devices/pci0000:00/{address}"), self.sys().join("bus/pci/devices").join(address))
            .unwrap();
        for (name, text) in [
            ("vendor", "0x1af4\n".to_owned()),
            ("device", "0x1042\n".to_owned()),
            ("subsystem_vendor", "0x1af4\n".to_owned()),
            ("subsystem_device", "0x1100\n".to_owned()),
            ("class", format!("0x{class:06x}\n")),
            ("revision", "0x01\n".to_owned()),
            ("driver_override", "(null)\n".to_owned()),
            ("reset", String::new()),
            ("resource", RESOURCE.to_owned()),
        ] {
            fs::write(dir.join(name), text).unwrap();
        }
        // Command: memory space and bus mastering on.
        fs::write(dir.join("config"), [0xf4, 0x1a, 0x42, 0x10, 0x06, 0x00, 0x10, 0x00]).unwrap();
        if let Some(driver) = driver {
            self.fake.state.lock().unwrap().native.insert(address.to_owned(), driver.to_owned());
            self.fake.bind(address, driver);
        }
        address.parse().unwrap()
    }

    /// Puts functions into an IOMMU group.
    pub(crate) fn group(&self, number: u32, kind: &str, members: &[&str]) {
        let group = self.sys().join(format!("kernel/iommu_groups/{number}"));
        fs::create_dir_all(group.join("devices")).unwrap();
        fs::write(group.join("type"), format!("{kind}\n")).unwrap();
        for member in members {
            symlink(format!("../../../../devices/pci0000:00/{member}"), group.join("devices").join(member)).unwrap();
            symlink(format!("../../../kernel/iommu_groups/{number}"), self.dir(member).join("iommu_group")).unwrap();
        }
    }

    pub(crate) fn dir(&self, address: &str) -> PathBuf {
        self.sys().join("devices/pci0000:00").join(address)
    }

    /// A device of a class somewhere below a function.
    pub(crate) fn child(&self, address: &str, below: &str, class: &str) -> PathBuf {
        let dir = self.dir(address).join(below);
        fs::create_dir_all(&dir).unwrap();
        symlink(format!("../../../../../../class/{class}"), dir.join("subsystem")).unwrap();
        dir
    }

    pub(crate) fn driver_of(&self, address: &str) -> Option<String> {
        self.fake.driver_of(address)
    }

    pub(crate) fn override_of(&self, address: &str) -> String {
        fs::read_to_string(self.dir(address).join("driver_override")).unwrap().trim().to_owned()
    }

    pub(crate) fn command_of(&self, address: &str) -> u16 {
        let config = fs::read(self.dir(address).join("config")).unwrap();
        u16::from_le_bytes([config[4], config[5]])
    }

    pub(crate) fn has_record(&self, address: &str) -> bool {
        self.run().join(format!("cofferdam/pci/{address}.json")).exists()
    }

    /// From here on the host lives until `cut`.
    pub(crate) fn live_until(&self, cut: Option<Cut>) {
        let mut state = self.fake.state.lock().unwrap();
        (state.cut, state.effects, state.is_dead) = (cut, 0, false);
        state.log.clear();
    }

    /// The function is unplugged before effect `n` from here on.
    pub(crate) fn unplug_before(&self, n: usize, address: &str) {
        self.live_until(None);
        self.fake.state.lock().unwrap().unplugged = Some((n, address.to_owned()));
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.fake.state.lock().unwrap().is_dead
    }

    /// Effects since then.
    pub(crate) fn log(&self) -> Vec<String> {
        self.fake.state.lock().unwrap().log.clone()
    }

    /// Everything below the root, as text: paths, links and contents.
    pub(crate) fn picture(&self) -> Vec<String> {
        fn walk(dir: &Path, lines: &mut Vec<String>) {
            let mut paths: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
            paths.sort();
            for path in paths {
                if path.is_symlink() {
                    lines.push(format!("{} -> {}", path.display(), fs::read_link(&path).unwrap().display()));
                } else if path.is_dir() {
                    lines.push(format!("{}/", path.display()));
                    walk(&path, lines);
                } else {
                    lines.push(format!("{}: {:?}", path.display(), fs::read(&path).unwrap()));
                }
            }
        }
        let mut lines = Vec::new();
        walk(self.root(), &mut lines);
        lines
    }
}

/// I/O, nothing, nothing, memory, 64-bit memory, its upper half.
const RESOURCE: &str = "\
0x000000000000c000 0x000000000000c07f 0x0000000000040101
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x00000000febd1000 0x00000000febd1fff 0x0000000000040200
0x000000e000000000 0x000000e000003fff 0x000000000014220c
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000000000000000 0x0000000000000000 0x0000000000000000
";

impl Fake {
    fn make_driver(&self, name: &str) {
        let dir = self.sys.join("bus/pci/drivers").join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("bind"), "").unwrap();
        fs::write(dir.join("unbind"), "").unwrap();
    }

    fn link(&self, address: &str) -> PathBuf {
        self.sys.join("devices/pci0000:00").join(address).join("driver")
    }

    fn driver_of(&self, address: &str) -> Option<String> {
        let target = fs::read_link(self.link(address)).ok()?;
        Some(target.file_name().unwrap().to_str().unwrap().to_owned())
    }

    fn bind(&self, address: &str, driver: &str) {
        symlink(format!("../../../bus/pci/drivers/{driver}"), self.link(address)).unwrap();
    }

    /// Who may have the function: the one that is named, else the one that matches.
    fn candidate(&self, address: &str) -> Option<String> {
        let only =
            fs::read_to_string(self.sys.join("devices/pci0000:00").join(address).join("driver_override")).unwrap();
        let state = self.state.lock().unwrap();
        let only = only.trim();
        let driver = if only == "(null)" { state.native.get(address).cloned() } else { Some(only.to_owned()) };
        driver
            .filter(|driver| self.sys.join("bus/pci/drivers").join(driver).is_dir() && !state.refusing.contains(driver))
    }

    /// Counts an effect; the last one is followed by none.
    fn effect(&self, what: &str, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let dead = || Err(io::Error::other("the host was killed"));
        let now = {
            let mut state = self.state.lock().unwrap();
            if state.is_dead {
                return dead();
            }
            let now = state.effects;
            state.effects += 1;
            if state.cut == Some(Cut::Before(now)) {
                state.is_dead = true;
                return dead();
            }
            if let Some((_, address)) = state.unplugged.take_if(|(n, _)| *n == now) {
                fs::remove_dir_all(self.sys.join("devices/pci0000:00").join(&address)).unwrap();
                fs::remove_file(self.sys.join("bus/pci/devices").join(&address)).unwrap();
            }
            state.log.push(what.to_owned());
            now
        };
        let answer = act();
        let mut state = self.state.lock().unwrap();
        if state.cut == Some(Cut::After(now)) {
            state.is_dead = true;
            return dead();
        }
        answer
    }

    fn play(&self, path: &str, value: &str) -> io::Result<()> {
        let value = value.trim_end();
        let no_device = || Err(io::Error::from_raw_os_error(libc::ENODEV));
        let parts: Vec<&str> = path.split('/').collect();
        match parts[..] {
            ["bus", "pci", "devices", address, "driver_override"] => {
                let text = if value.is_empty() { "(null)" } else { value };
                fs::write(
                    self.sys.join("devices/pci0000:00").join(address).join("driver_override"),
                    format!("{text}\n"),
                )
            }
            ["bus", "pci", "devices", address, "driver", "unbind"] => {
                assert_eq!(value, address, "the kernel looks the name up");
                if self.driver_of(address).is_none() {
                    return Err(io::ErrorKind::NotFound.into());
                }
                fs::remove_file(self.link(address))
            }
            ["bus", "pci", "drivers_probe"] => {
                if !self.sys.join("devices/pci0000:00").join(value).is_dir() {
                    return no_device();
                }
                if self.driver_of(value).is_none()
                    && let Some(driver) = self.candidate(value)
                {
                    self.bind(value, &driver);
                }
                Ok(())
            }
            ["bus", "pci", "drivers", driver, "bind"] => {
                if self.driver_of(value).is_some()
                    || self.candidate(value).is_some_and(|other| other != driver)
                    || self.state.lock().unwrap().refusing.iter().any(|no| no == driver)
                {
                    return no_device();
                }
                self.bind(value, driver);
                Ok(())
            }
            ["bus", "pci", "devices", _, "reset"] => {
                assert_eq!(value, "1");
                Ok(())
            }
            _ => panic!("no kernel has a use for a write to {path}"),
        }
    }
}

impl Effects for Fake {
    fn write(&self, _dir: &Dir, path: &str, value: &str) -> io::Result<()> {
        self.effect(path, || self.play(path, value))
    }

    fn write_at(&self, dir: &Dir, path: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.effect(path, || Kernel.write_at(dir, path, offset, bytes))
    }

    fn load_module(&self, module: &str) -> io::Result<()> {
        self.effect(&format!("modprobe {module}"), || {
            if !self.state.lock().unwrap().modules.iter().any(|known| known == module) {
                return Err(io::Error::other("exit status: 1"));
            }
            self.make_driver(module);
            Ok(())
        })
    }

    fn replace(&self, dir: &Dir, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.effect(&format!("put {name}"), || Kernel.replace(dir, name, bytes))
    }

    fn remove(&self, dir: &Dir, name: &str) -> io::Result<()> {
        self.effect(&format!("remove {name}"), || Kernel.remove(dir, name))
    }

    fn patience(&self, _long: Duration) -> Duration {
        // This kernel has answered when it has answered.
        Duration::ZERO
    }
}
