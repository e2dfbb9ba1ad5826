use std::os::unix::fs::PermissionsExt;

use super::*;

const PAGE: u64 = 4096;

/// As if a folder were a hugetlbfs with pages of 4 KiB.
fn pretend() -> (tempfile::TempDir, Hugepages, Address) {
    let root = tempfile::tempdir().unwrap();
    let mount = rustix::fs::open(root.path(), FOLDER, Mode::empty()).unwrap();
    let pages = Hugepages { mount, page_bytes: PAGE, root: "/".into(), made: AtomicU32::new(0) };
    (root, pages, "0000:00:04.0".parse().unwrap())
}

fn leave(root: &Path, name: &str, bytes: usize) {
    let folder = root.join("cofferdam/0000:00:04.0");
    std::fs::create_dir_all(&folder).unwrap();
    for folder in [&root.join("cofferdam"), &folder] {
        std::fs::set_permissions(folder, PermissionsExt::from_mode(0o700)).unwrap();
    }
    std::fs::write(folder.join(name), vec![1; bytes]).unwrap();
}

fn names(root: &Path) -> Vec<String> {
    let folder = root.join("cofferdam/0000:00:04.0");
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn mounts_are_found_by_type_and_their_names_unescaped() {
    let text = b"sysfs /sys sysfs rw 0 0\nnone /huge\\040pages hugetlbfs rw,pagesize=2M 0 0\nhugetlbfs /a\\134b hugetlbfs rw 0 0\n\
        tmpfs /hugetlbfs tmpfs rw 0 0\nbroken\n";
    assert_eq!(hugetlbfs_mounts(text), ["/huge pages", "/a\\b"]);
}

#[test]
fn a_machine_without_hugetlbfs_is_told_the_command() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("proc")).unwrap();
    // One that only says that it is.
    let text = format!("none {} hugetlbfs rw 0 0\n", root.path().display());
    std::fs::write(root.path().join("proc/mounts"), text).unwrap();
    let error = Hugepages::find_under(root.path()).unwrap_err().to_string();
    assert!(error.contains("mount -t hugetlbfs"), "{error}");
}

#[test]
fn a_shortage_says_what_is_needed_what_is_free_and_the_command() {
    let (root, mut pages, address) = pretend();
    leave(root.path(), "arena.1.0", 300);
    pages.root = root.path().to_owned();
    pages.page_bytes = 2 << 20;
    let pool = root.path().join("sys/kernel/mm/hugepages/hugepages-2048kB");
    std::fs::create_dir_all(&pool).unwrap();
    std::fs::create_dir(root.path().join("proc")).unwrap();
    std::fs::write(pool.join("free_hugepages"), "3\n").unwrap();
    std::fs::write(pool.join("nr_hugepages"), "8\n").unwrap();
    for (default, file) in
        [("2048", "/proc/sys/vm/nr_hugepages"), ("1048576", "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")]
    {
        std::fs::write(root.path().join("proc/meminfo"), format!("Hugepagesize:    {default} kB\n")).unwrap();
        assert_eq!(
            pages.shortage(address, 5),
            format!(
                "5 hugepages of 2048 KiB are needed and 3 are free; echo 10 > {file} (300 bytes are in files of 0000:00:04.0 \
                 already)"
            )
        );
    }
}

#[test]
fn frames_are_read_from_the_page_table_and_checked() {
    let file = tempfile::NamedTempFile::new().unwrap();
    // Two pages of 16 KiB from address 0x8000 on, the smallest being 4 KiB: entries 8 to 15.
    let put = |entries: &[(u64, u64)]| {
        for (at, entry) in entries {
            file.as_file().write_all_at(&entry.to_ne_bytes(), at * 8).unwrap();
        }
    };
    let read = || frames(file.as_file(), 0x8000, 2, 0x4000, 0x1000);
    let soft_dirty = 1 << 55;
    put(&[(8, PRESENT | soft_dirty | 0x100), (11, PRESENT | 0x103), (12, PRESENT | 0x40), (15, PRESENT | 0x43)]);
    assert_eq!(read().unwrap(), [0x10_0000, 0x4_0000]);
    put(&[(15, PRESENT | 0x44)]);
    assert!(read().unwrap_err().to_string().contains("not in one run"));
    put(&[(12, 0x40)]);
    assert!(read().unwrap_err().to_string().contains("not in memory"));
    put(&[(12, PRESENT)]);
    let hidden = read().unwrap_err();
    assert_eq!(hidden.kind(), io::ErrorKind::PermissionDenied);
    assert!(hidden.to_string().contains("CAP_SYS_ADMIN"), "{hidden}");
    assert!(frames(file.as_file(), 1 << 40, 1, 0x4000, 0x1000).is_err(), "outside of the table");
}

#[test]
fn what_a_process_left_is_listed_and_taken_back_with_its_folder() {
    let (root, pages, address) = pretend();
    assert_eq!(pages.leftovers(address).unwrap(), []);
    assert_eq!(pages.take_back(address).unwrap(), 0);
    leave(root.path(), "arena.1.0", 300);
    leave(root.path(), "queues.1.1", 20);
    let mut left = pages.leftovers(address).unwrap();
    left.sort_by_key(|file| file.bytes);
    assert_eq!(left.iter().map(|file| file.bytes).collect::<Vec<_>>(), [20, 300]);
    assert_eq!(pages.take_back(address).unwrap(), 320);
    assert!(!root.path().join("cofferdam/0000:00:04.0").exists());
    assert!(root.path().join("cofferdam").exists());
}

#[test]
fn what_somebody_has_open_is_not_left_behind_whoever_that_is() {
    let (root, pages, address) = pretend();
    leave(root.path(), "arena.1.0", 300);
    leave(root.path(), "queues.1.1", 20);
    let file = std::fs::File::open(root.path().join("cofferdam/0000:00:04.0/arena.1.0")).unwrap();
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).unwrap();
    // As another process has it that was given it.
    let handed = file.try_clone().unwrap();
    drop(file);
    assert_eq!(pages.take_back(address).unwrap(), 20);
    assert_eq!(names(root.path()), ["arena.1.0"]);
    drop(handed);
    assert_eq!(pages.take_back(address).unwrap(), 300);
}

#[test]
fn a_file_of_another_size_of_pages_or_in_another_folder_is_not_adopted() {
    let (root, pages, address) = pretend();
    leave(root.path(), "arena.1.0", 4096);
    let file = || std::fs::File::open(root.path().join("cofferdam/0000:00:04.0/arena.1.0")).unwrap().into();
    let said = |name: &str, page_bytes| Pages { name: name.to_owned(), page_bytes, addresses: vec![0x4000] };
    for said in [said("arena.1.0", 2 * PAGE), said("../0000:00:04.0/arena.1.0", PAGE), said("queues.1.0", PAGE)] {
        assert!(matches!(pages.adopt(address, file(), &said), Err(RegionError::Io { .. })), "{said:?}");
    }
    assert!(pages.adopt("0000:00:05.0".parse().unwrap(), file(), &said("arena.1.0", PAGE)).is_err());
}

#[test]
fn a_folder_that_others_can_enter_or_that_is_a_link_is_not_trusted() {
    let (root, pages, address) = pretend();
    leave(root.path(), "arena.1.0", 300);
    std::fs::set_permissions(root.path().join("cofferdam"), PermissionsExt::from_mode(0o750)).unwrap();
    assert!(pages.leftovers(address).unwrap_err().to_string().contains("alone"));
    assert!(pages.memory(address, "arena", PAGE).is_err());
    std::fs::set_permissions(root.path().join("cofferdam"), PermissionsExt::from_mode(0o700)).unwrap();
    std::fs::rename(root.path().join("cofferdam"), root.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", root.path().join("cofferdam")).unwrap();
    assert!(pages.take_back(address).is_err());
    assert!(root.path().join("elsewhere/0000:00:04.0/arena.1.0").exists());
}

#[test]
fn memory_that_cannot_be_had_leaves_no_file() {
    let (root, mut pages, address) = pretend();
    // No page table there.
    pages.root = root.path().to_owned();
    assert!(matches!(pages.memory(address, "arena", PAGE), Err(RegionError::Io { .. })));
    assert_eq!(names(root.path()), [""; 0]);
    for bytes in [0, u64::MAX, 1 << 63] {
        assert!(matches!(pages.memory(address, "arena", bytes), Err(RegionError::Shape { .. })), "{bytes}");
    }
}

#[test]
fn names_are_plain_and_no_two_are_equal() {
    let (_root, pages, _) = pretend();
    let (first, second) = (pages.name("../a b/\0"), pages.name("../a b/\0"));
    let process = std::process::id();
    assert_eq!(first.to_str().unwrap(), format!("___a_b__.{process}.0"));
    assert_eq!(second.to_str().unwrap(), format!("___a_b__.{process}.1"));
    assert!(pages.name(&"x".repeat(5000)).as_bytes().len() < 100);
}

/// `echo 4 > /proc/sys/vm/nr_hugepages`, and a hugetlbfs mounted.
#[test]
#[ignore = "needs root, a hugetlbfs with pages of 2 MiB and two of them free; cargo xtask vm-test host_is_killed shows the same in a machine that has them"]
fn real_hugepages_have_addresses_and_go_when_they_are_revoked_and_not_before() {
    let (pages, address) = (Hugepages::find().unwrap(), "ffff:ff:1f.7".parse().unwrap());
    assert_eq!(pages.page_bytes, PREFERRED_BYTES);
    pages.take_back(address).unwrap();
    let region = pages.memory(address, "arena", PREFERRED_BYTES + 1).unwrap();
    assert_eq!((region.len(), region.page_bytes()), (2 * PREFERRED_BYTES, Some(PREFERRED_BYTES)));
    for page in [0, PREFERRED_BYTES] {
        assert!(region.address_of(page) >= PREFERRED_BYTES && region.address_of(page) % PREFERRED_BYTES == 0);
    }
    region.write_at(PREFERRED_BYTES - 1, &[1, 2]).unwrap();
    assert_eq!(pages.leftovers(address).unwrap().len(), 1);
    assert!(pages.take_back(address).is_err(), "its own");

    // Far more than there can be: an error, and neither a signal nor a page that stays taken.
    let error = std::error::Error::source(&pages.memory(address, "greedy", 1 << 40).unwrap_err()).unwrap().to_string();
    assert!(error.contains("524288 hugepages of 2048 KiB are needed") && error.contains("nr_hugepages"), "{error}");
    assert!(error.contains(&format!("({} bytes are in files", 2 * PREFERRED_BYTES)), "{error}");
    assert_eq!(pages.leftovers(address).unwrap().len(), 1);

    // Another process finds it where it is, and what is in it; elsewhere it does not take it.
    let (name, addresses) = region.pages().unwrap();
    let said =
        Pages { name: name.to_str().unwrap().to_owned(), page_bytes: PREFERRED_BYTES, addresses: addresses.to_vec() };
    let later = Hugepages::find().unwrap();
    let wrong = Pages { addresses: said.addresses.iter().rev().copied().collect(), ..said.clone() };
    assert!(later.adopt(address, region.duplicate().unwrap(), &wrong).is_err());
    let adopted = later.adopt(address, region.duplicate().unwrap(), &said).unwrap();
    assert_eq!(adopted.address_of(PREFERRED_BYTES), region.address_of(PREFERRED_BYTES));
    let mut found = [0; 2];
    adopted.read_at(PREFERRED_BYTES - 1, &mut found).unwrap();
    assert_eq!(found, [1, 2]);
    drop(region);
    assert_eq!(Hugepages::find().unwrap().take_back(address).unwrap(), 0, "it is in use");
    let region = adopted;

    // The mapping ends and the file stays, as when the process is killed.
    drop(region);
    assert_eq!(pages.leftovers(address).unwrap()[0].bytes, 2 * PREFERRED_BYTES);
    let later = Hugepages::find().unwrap();
    assert_eq!(later.take_back(address).unwrap(), 2 * PREFERRED_BYTES);

    let region = later.memory(address, "arena", 1).unwrap();
    assert!(region.revoke());
    assert_eq!(later.leftovers(address).unwrap(), []);
    later.remove_folder(address);
}
