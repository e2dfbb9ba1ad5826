//! Who holds a guard, and since when: the feature `trace-holders`.

#[cfg(not(feature = "trace-holders"))]
pub(crate) use off::{Holders, Tag};
#[cfg(feature = "trace-holders")]
pub(crate) use on::{Holders, Tag};

/// One guard that is out.
#[derive(Clone, Debug)]
pub struct Holder {
    /// The name of the thread that was let in (the guard may have moved since).
    pub thread: String,
    /// Where `admit` was called.
    pub location: &'static std::panic::Location<'static>,
    /// When.
    pub since: std::time::Instant,
}

#[cfg(not(feature = "trace-holders"))]
mod off {
    use super::Holder;

    #[derive(Debug, Default)]
    pub(crate) struct Holders {}

    #[derive(Debug)]
    pub(crate) struct Tag;

    impl Holders {
        #[inline(always)]
        pub(crate) fn enter(&self) -> Tag {
            Tag
        }

        #[inline(always)]
        pub(crate) fn leave(&self, _: &Tag) {}

        pub(crate) fn list(&self) -> Vec<Holder> {
            Vec::new()
        }
    }
}

#[cfg(feature = "trace-holders")]
mod on {
    use std::collections::BTreeMap;
    use std::panic::Location;
    use std::time::Instant;

    use super::Holder;
    use crate::sync::{Mutex, lock};

    /// Guards that are out, in the order of admission.
    #[derive(Debug, Default)]
    pub(crate) struct Holders {
        out: Mutex<(u64, BTreeMap<u64, Holder>)>,
    }

    #[derive(Debug)]
    pub(crate) struct Tag(u64);

    impl Holders {
        #[track_caller]
        pub(crate) fn enter(&self) -> Tag {
            let holder = Holder {
                thread: std::thread::current().name().unwrap_or("unnamed").to_owned(),
                location: Location::caller(),
                since: Instant::now(),
            };
            let mut out = lock(&self.out);
            out.0 += 1;
            let tag = out.0;
            out.1.insert(tag, holder);
            Tag(tag)
        }

        pub(crate) fn leave(&self, tag: &Tag) {
            lock(&self.out).1.remove(&tag.0);
        }

        pub(crate) fn list(&self) -> Vec<Holder> {
            lock(&self.out).1.values().cloned().collect()
        }
    }
}
