//! Machine code is read back only where nobody else could have written it, and a bad entry costs a compilation and nothing else.

mod support;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use cofferdam_runtime::{LaneDriver, Module, Runtime, RuntimeConfig};
use support::{Guest, requests, spec};
use tempfile::TempDir;

fn runtime(dir: &Path) -> Runtime {
    Runtime::new(RuntimeConfig { cache_dir: Some(dir.to_owned()), cache_entries: 3, ..RuntimeConfig::default() })
        .unwrap()
}

/// A private cache with one entry in it.
fn filled() -> (TempDir, PathBuf, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("below").join("cache");
    assert!(!load(&dir).info().from_cache);
    let entry = entries(&dir).pop().expect("an entry was written");
    (home, dir, entry)
}

fn load(dir: &Path) -> Module {
    runtime(dir).load(&Guest::default().component()).unwrap()
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[track_caller]
fn assert_works(module: &Module) {
    let mut out = Vec::new();
    module.instantiate(spec()).unwrap().submit(&requests(1), &mut out).unwrap();
    assert_eq!(out, [7, 0x10000, 0x13]);
}

#[test]
fn the_second_load_takes_the_code_from_the_cache() {
    let (_home, dir, entry) = filled();
    assert_eq!((mode(&dir), mode(&entry)), (0o700, 0o600));
    let module = load(&dir);
    assert!(module.info().from_cache);
    assert_works(&module);
    assert_eq!(entries(&dir), [entry]);
}

#[test]
fn a_damaged_entry_is_compiled_again_and_replaced() {
    let (_home, dir, entry) = filled();
    let good = fs::read(&entry).unwrap();
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let cases = [
        Vec::new(),
        b"cofferdam-cwasm1".to_vec(),
        good[..good.len() / 2].to_vec(),
        flipped,
        [good.clone(), vec![0]].concat(),
    ];
    for (number, bytes) in cases.into_iter().enumerate() {
        fs::write(&entry, bytes).unwrap();
        let module = load(&dir);
        assert!(!module.info().from_cache, "case {number}");
        assert_works(&module);
        assert!(load(&dir).info().from_cache, "case {number}: the entry was replaced");
    }
}

#[test]
fn an_entry_of_another_component_is_not_taken() {
    let (_home, dir, entry) = filled();
    let other = Guest { pages: 3, ..Guest::default() }.component();
    runtime(&dir).load(&other).unwrap();
    let stranger = entries(&dir).into_iter().find(|path| *path != entry).unwrap();
    fs::copy(&stranger, &entry).unwrap();
    assert!(!load(&dir).info().from_cache);
}

#[test]
fn an_entry_or_directory_that_others_can_reach_is_not_used() {
    let (_home, dir, entry) = filled();
    fs::set_permissions(&entry, Permissions::from_mode(0o620)).unwrap();
    assert!(!load(&dir).info().from_cache, "an entry that the group can write");
    fs::set_permissions(&entry, Permissions::from_mode(0o600)).unwrap();
    assert!(load(&dir).info().from_cache);
    for bits in [0o770, 0o702, 0o1777] {
        fs::set_permissions(&dir, Permissions::from_mode(bits)).unwrap();
        let module = load(&dir);
        assert!(!module.info().from_cache, "a directory of mode {bits:o}");
        assert_works(&module);
    }
}

#[test]
fn what_belongs_to_someone_else_is_not_used() {
    let nobody = Some(65_534);
    let (_home, dir, entry) = filled();
    if !rustix::process::geteuid().is_root() {
        // Giving a file away takes root; the root directory is always somebody else's for everyone else.
        assert!(!load(Path::new("/")).info().from_cache);
        return;
    }
    std::os::unix::fs::chown(&entry, nobody, None).unwrap();
    assert!(!load(&dir).info().from_cache, "somebody else's entry");
    assert!(load(&dir).info().from_cache, "it was replaced by our own");
    std::os::unix::fs::chown(&dir, nobody, None).unwrap();
    let module = load(&dir);
    assert!(!module.info().from_cache, "somebody else's directory");
    assert_works(&module);
}

#[test]
fn links_and_pipes_are_not_followed() {
    let (_home, dir, entry) = filled();
    let moved = dir.join("moved");
    fs::rename(&entry, &moved).unwrap();
    symlink(&moved, &entry).unwrap();
    assert!(!load(&dir).info().from_cache, "an entry that is a link");
    fs::remove_file(&entry).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &entry,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    assert!(!load(&dir).info().from_cache, "an entry that is a pipe");

    let link = dir.with_file_name("link");
    symlink(&dir, &link).unwrap();
    assert!(load(&dir).info().from_cache);
    assert!(!load(&link).info().from_cache, "a directory that is a link");
}

#[test]
fn a_cache_that_cannot_be_made_is_done_without() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("file");
    fs::write(&file, "").unwrap();
    assert_works(&load(&file));
    assert_works(&load(&file.join("below")));
}

#[test]
fn the_cache_keeps_so_many_entries_and_no_more() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("cache");
    let runtime = runtime(&dir);
    for pages in 2..8 {
        runtime.load(&Guest { pages, ..Guest::default() }.component()).unwrap();
    }
    assert_eq!(entries(&dir).len(), 3);
}
