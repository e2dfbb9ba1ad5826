//! What the kernel does with a function: what would break if it were taken away.
//!
//! Block devices and network interfaces are found by walking the function's own directory for whatever belongs to the classes `block` and `net`, however deep (a disk behind
//! a virtio device, a namespace behind an NVMe controller, a stick behind a USB host). What cannot be looked at counts as used: a hand-over fails closed.

use std::collections::BTreeSet;
use std::fmt;

use cap_std::fs::{Dir, MetadataExt, OpenOptions, OpenOptionsExt};
use rustix::fs::{Dev, OFlags, major, minor};

use super::{Sysfs, attribute, is_name, link_name, list};
use crate::Address;

/// How deep below a function its devices may be (a disk behind four USB hubs is 14 deep).
const MAX_DEPTH: usize = 24;
/// Entries of directories that are looked at below one function.
const MAX_ENTRIES: usize = 50_000;
/// Interfaces stacked on interfaces that are followed.
const MAX_UPPERS: usize = 256;

/// One thing that the kernel uses a function for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// A file system on it is mounted.
    Mounted {
        /// The block device.
        device: String,
        /// Where.
        at: String,
    },
    /// Memory is swapped to it.
    Swap {
        /// The block device.
        device: String,
    },
    /// Another block device is made of it: device-mapper, md, bcache.
    Holder {
        /// The block device.
        device: String,
        /// What is made of it.
        holder: String,
    },
    /// A loop device is on it.
    Loop {
        /// The block device.
        device: String,
        /// The loop device.
        by: String,
    },
    /// The default route goes through it.
    DefaultRoute {
        /// The interface that the route names: the function's own, or one made of it.
        interface: String,
        /// IPv6, not IPv4.
        is_ipv6: bool,
    },
    /// Something has it for itself that no table here shows: a mount in another namespace, a program.
    Exclusive {
        /// The block device.
        device: String,
    },
    /// What is below the function could not all be looked at.
    Unknown,
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Use::Mounted { device, at } => write!(f, "{device} is mounted at {at}"),
            Use::Swap { device } => write!(f, "{device} is swap space"),
            Use::Holder { device, holder } => write!(f, "{device} is part of {holder}"),
            Use::Loop { device, by } => write!(f, "{device} is behind {by}"),
            Use::DefaultRoute { interface, is_ipv6: false } => write!(f, "the default route goes through {interface}"),
            Use::DefaultRoute { interface, is_ipv6: true } => {
                write!(f, "the IPv6 default route goes through {interface}")
            }
            Use::Exclusive { device } => write!(f, "{device} is held by a mount in another namespace or by a program"),
            Use::Unknown => f.write_str("what is below it could not all be looked at"),
        }
    }
}

/// A block device below a function.
struct Block {
    name: String,
    /// `major:minor`.
    dev: String,
    holders: Vec<String>,
}

#[derive(Default)]
struct Found {
    blocks: Vec<Block>,
    interfaces: Vec<String>,
    entries: usize,
    is_cut: bool,
}

pub(super) fn of(sysfs: &Sysfs, address: Address, thoroughly: bool) -> Vec<Use> {
    let Ok(dir) = sysfs.function_dir(address) else { return Vec::new() };
    let mut found = Found::default();
    walk(sysfs, &dir, 0, &mut found);
    let mut uses: BTreeSet<Use> = BTreeSet::new();
    if found.is_cut {
        uses.insert(Use::Unknown);
    }
    if !found.blocks.is_empty() {
        block_uses(sysfs, &found.blocks, &mut uses);
    }
    if !found.interfaces.is_empty() {
        routes(sysfs, &found.interfaces, &mut uses);
    }
    if thoroughly && uses.is_empty() {
        let held = found.blocks.iter().filter(|block| is_held(sysfs, block));
        uses.extend(held.map(|block| Use::Exclusive { device: block.name.clone() }));
    }
    uses.into_iter().collect()
}

fn walk(sysfs: &Sysfs, dir: &Dir, depth: usize, found: &mut Found) {
    let Ok(entries) = dir.entries() else {
        found.is_cut = true;
        return;
    };
    for entry in entries {
        found.entries += 1;
        if found.entries > MAX_ENTRIES || depth >= MAX_DEPTH {
            found.is_cut = true;
            return;
        }
        let Ok(entry) = entry else {
            found.is_cut = true;
            return;
        };
        // Links lead elsewhere: out of the function's own directory.
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let Some(name) = entry.file_name().into_string().ok().filter(|name| is_name(name)) else {
            found.is_cut = true;
            continue;
        };
        let Ok(below) = entry.open_dir() else {
            found.is_cut = true;
            continue;
        };
        match link_name(&below, "subsystem").as_deref() {
            Some("block") => found.blocks.extend(block(sysfs, &below, &name)),
            Some("net") => found.interfaces.push(name),
            _ => {}
        }
        walk(sysfs, &below, depth + 1, found);
    }
}

/// One block device. A path of a multi-path NVMe namespace (`nvme0c1n2`) stands for the namespace itself (`nvme0n2`), which is not below any function.
fn block(sysfs: &Sysfs, dir: &Dir, name: &str) -> Vec<Block> {
    let whole = |dir: &Dir, name: &str| {
        let dev = attribute(dir, "dev")?;
        let holders = list(dir, "holders", 64).map(|(names, _)| names).unwrap_or_default();
        Some(Block { name: name.to_owned(), dev, holders })
    };
    let mut blocks: Vec<Block> = whole(dir, name).into_iter().collect();
    let Some(head) = nvme_head(name) else { return blocks };
    let Ok(dir) = sysfs.sys.open_dir(format!("class/block/{head}")) else { return blocks };
    blocks.extend(whole(&dir, &head));
    for (part, part_dir) in list(&dir, ".", 512)
        .map(|(names, _)| names)
        .unwrap_or_default()
        .iter()
        .filter_map(|part| Some((part, dir.open_dir(part).ok()?)))
    {
        if part_dir.exists("partition") {
            blocks.extend(whole(&part_dir, part));
        }
    }
    blocks
}

fn nvme_head(name: &str) -> Option<String> {
    let (subsystem, rest) = name.strip_prefix("nvme")?.split_once('c')?;
    let (controller, namespace) = rest.split_once('n')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    [subsystem, controller, namespace].into_iter().all(is_number).then(|| format!("nvme{subsystem}n{namespace}"))
}

fn block_uses(sysfs: &Sysfs, blocks: &[Block], uses: &mut BTreeSet<Use>) {
    // The kernel writes a slash in a device's name as an exclamation mark in sysfs.
    let by_path = |path: &str| {
        let name = unescape(path).strip_prefix("/dev/").map(|name| name.replace('/', "!"))?;
        blocks.iter().find(|block| block.name == name)
    };
    for line in sysfs.table("self/mountinfo").lines() {
        // proc_pid_mountinfo(5): id, parent, major:minor, root, mount point, ..., "-", type, source. File systems with devices of their own (btrfs) only tell by the source.
        let words: Vec<&str> = line.split(' ').collect();
        let (Some(dev), Some(at)) = (words.get(2), words.get(4)) else { continue };
        let source = words.iter().position(|word| *word == "-").and_then(|dash| words.get(dash + 2));
        let block = blocks.iter().find(|block| block.dev == **dev).or_else(|| source.and_then(|path| by_path(path)));
        if let Some(block) = block {
            uses.insert(Use::Mounted { device: block.name.clone(), at: unescape(at) });
        }
    }
    for line in sysfs.table("swaps").lines().skip(1) {
        if let Some(block) = line.split_whitespace().next().and_then(by_path) {
            uses.insert(Use::Swap { device: block.name.clone() });
        }
    }
    for block in blocks {
        let holder = |holder: &String| Use::Holder { device: block.name.clone(), holder: holder.clone() };
        uses.extend(block.holders.iter().map(holder));
    }
    let all = list(&sysfs.sys, "class/block", MAX_ENTRIES).map(|(names, _)| names).unwrap_or_default();
    for name in all.iter().filter(|name| name.starts_with("loop")) {
        let behind = attribute(&sysfs.sys, format!("class/block/{name}/loop/backing_file"));
        if let Some(block) = behind.as_deref().and_then(by_path) {
            uses.insert(Use::Loop { device: block.name.clone(), by: name.clone() });
        }
    }
}

/// Blank, tab, line feed and backslash are written in octal in these tables.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (written, meant)| text.replace(written, meant))
}

/// linux/route.h: the route is up; the route refuses.
const RTF_UP: u64 = 0x1;
const RTF_REJECT: u64 = 0x200;

fn routes(sysfs: &Sysfs, interfaces: &[String], uses: &mut BTreeSet<Use>) {
    let mine = with_uppers(sysfs, interfaces, uses);
    let counts =
        |flags: &str| u64::from_str_radix(flags, 16).is_ok_and(|flags| flags & RTF_UP != 0 && flags & RTF_REJECT == 0);
    for line in sysfs.table("self/net/route").lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [interface, "00000000", _, flags, _, _, _, "00000000", ..] = words[..]
            && counts(flags)
            && mine.contains(interface)
        {
            uses.insert(Use::DefaultRoute { interface: interface.to_owned(), is_ipv6: false });
        }
    }
    for line in sysfs.table("self/net/ipv6_route").lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [to, "00", _, _, _, _, _, _, flags, interface] = words[..]
            && to.bytes().all(|byte| byte == b'0')
            && counts(flags)
            && mine.contains(interface)
        {
            uses.insert(Use::DefaultRoute { interface: interface.to_owned(), is_ipv6: true });
        }
    }
}

/// The interfaces and whatever is made of them: bridges, bonds, VLANs.
fn with_uppers(sysfs: &Sysfs, interfaces: &[String], uses: &mut BTreeSet<Use>) -> BTreeSet<String> {
    let mut all: BTreeSet<String> = BTreeSet::new();
    let mut left: Vec<String> = interfaces.to_vec();
    while let Some(name) = left.pop() {
        if all.len() >= MAX_UPPERS {
            uses.insert(Use::Unknown);
            break;
        }
        if all.insert(name.clone()) {
            let entries =
                list(&sysfs.sys, format!("class/net/{name}"), MAX_UPPERS).map(|(names, _)| names).unwrap_or_default();
            left.extend(entries.iter().filter_map(|entry| entry.strip_prefix("upper_")).map(str::to_owned));
        }
    }
    all
}

/// Whether somebody holds the block device exclusively: file systems, swap, device-mapper and md do, in whatever namespace (open(2), `O_EXCL` without `O_CREAT`).
fn is_held(sysfs: &Sysfs, block: &Block) -> bool {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags((OFlags::EXCL | OFlags::NONBLOCK).bits() as i32);
    let path = block.name.replace('!', "/");
    let is_it = sysfs.dev.metadata(&path).is_ok_and(|node| {
        let dev = node.rdev() as Dev;
        format!("{}:{}", major(dev), minor(dev)) == block.dev
    });
    is_it && sysfs.dev.open_with(&path, &options).is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}
