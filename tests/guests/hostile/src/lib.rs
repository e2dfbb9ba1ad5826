//! Block drivers that misbehave, one behaviour each, around a driver that does not (`cofferdam-virtio-blk`).
//!
//! `behaviours.txt` lists them. All are compiled into one module, because compiling sixty would take minutes: the build makes one component
//! of each line by writing the behaviour's name over [`MARKER`]'s last bytes (`xtask`'s module `guests::hostile`).
//!
//! Natively nothing is exported, and the tests here only hold the list against the code.

mod control;
mod lane;
#[cfg(target_family = "wasm")]
mod place;

pub use control::Hostile;
pub use lane::{COMMANDS, COMMANDS_OFFSET, HostileLane};

/// Bytes of [`MARKER`] before the name.
pub const PREFIX: &[u8; 32] = b"cofferdam-hostile-guest-behaves:";

/// The prefix and then the behaviour's name, padded with spaces: what the build looks for and writes over.
pub static MARKER: [u8; 64] = *b"cofferdam-hostile-guest-behaves:well-behaved                    ";

/// The behaviour of this module: its line's name in `behaviours.txt`.
#[must_use]
pub fn behaviour() -> &'static str {
    // The compiler must not take the bytes for the constant that it sees.
    let marker: &'static [u8; 64] = std::hint::black_box(&MARKER);
    std::str::from_utf8(&marker[PREFIX.len()..]).unwrap_or_default().trim_end()
}

/// Never returns. The host ends it.
pub(crate) fn spin() -> ! {
    loop {
        std::hint::black_box(());
    }
}

/// Allocates until the host ends it.
pub(crate) fn eat() -> ! {
    let mut eaten = Vec::new();
    loop {
        eaten.push(vec![1_u8; 1 << 20]);
        std::hint::black_box(&eaten);
    }
}

/// Recurses until the host ends it.
#[allow(unconditional_recursion, reason = "that is what it is for")]
pub(crate) fn recurse(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 64]);
    recurse(depth + 1).wrapping_add(frame[(depth % 64) as usize])
}

cofferdam_sdk::export_block_driver!(Hostile, devices: [cofferdam_sdk::DeviceId::virtio(2)], crate::place::window, crate::place::answer);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_behaviour_is_in_the_code_and_fits_the_marker() {
        let code = concat!(include_str!("control.rs"), include_str!("lane.rs"), include_str!("place.rs"));
        let list = include_str!("../behaviours.txt");
        let names: Vec<_> = list
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        for name in &names {
            assert!(name.len() <= MARKER.len() - PREFIX.len(), "{name} is too long");
            assert!(*name == "well-behaved" || code.contains(&format!("{name:?}")), "{name} is in no code");
        }
        assert!(names.len() > 50);
        assert_eq!(behaviour(), "well-behaved");
    }
}
