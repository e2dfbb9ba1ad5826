//! The drivers that misbehave: one module, and one component for every line of `tests/guests/hostile/behaviours.txt`.
//!
//! The module reads its behaviour's name from a static. Compiling it once and writing every name over that static takes a second; sixty
//! builds with a feature each would take minutes.

use anyhow::{Context, Result, bail};

/// The crate.
pub(super) const PACKAGE: &str = "guest-hostile";

const LIST: &str = include_str!("../../../tests/guests/hostile/behaviours.txt");

/// What the static begins with, and how many bytes of name follow; as in the crate.
const PREFIX: &[u8] = b"cofferdam-hostile-guest-behaves:";
const NAME_BYTES: usize = 32;

/// Every behaviour with its core module.
pub(super) fn variants(core: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
    let mut places = core.windows(PREFIX.len()).enumerate().filter(|(_, window)| *window == PREFIX);
    let (at, _) = places.next().context("the hostile guest has no marker")?;
    if places.next().is_some() {
        bail!("the hostile guest has two markers");
    }
    let name_at = at + PREFIX.len();
    let variant = |name: &str| {
        let mut module = core.to_vec();
        let place = module.get_mut(name_at..name_at + NAME_BYTES).context("the marker is cut off")?;
        if name.len() > NAME_BYTES {
            bail!("{name} is longer than {NAME_BYTES} bytes");
        }
        place.fill(b' ');
        place[..name.len()].copy_from_slice(name.as_bytes());
        Ok((name.to_owned(), module))
    };
    names().map(variant).collect()
}

fn names() -> impl Iterator<Item = &'static str> {
    LIST.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_whitespace().next())
}
