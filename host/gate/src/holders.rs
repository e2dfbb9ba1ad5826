//! Who holds a guard or a batch of them, and since when: the feature `trace-holders`.

#[cfg(not(feature = "trace-holders"))]
pub(crate) use off::{Holders, Tag};
#[cfg(feature = "trace-holders")]
pub(crate) use on::{Holders, Tag};

/// One guard that is out, or one batch of them.
#[derive(Clone, Debug)]
pub struct Holder {
    /// The name of the thread that was let in (the guard may have moved since).
    pub thread: String,
    /// Where `admit` or `admit_many` was called.
    pub location: &'static std::panic::Location<'static>,
    /// When. Of batches that were joined, the first of them is named, whether or not what is still
    /// out came with it.
    pub since: std::time::Instant,
    /// Operations that are out.
    pub count: u32,
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
        pub(crate) fn enter(&self, _: u32) -> Tag {
            Tag
        }

        #[inline(always)]
        pub(crate) fn leave(&self, _: &Tag, _: u32) {}

        #[inline(always)]
        pub(crate) fn join(&self, _: &mut Tag, _: &Tag) {}

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

    /// Guards and batches that are out, in the order of admission.
    #[derive(Debug, Default)]
    pub(crate) struct Holders {
        out: Mutex<(u64, BTreeMap<u64, Holder>)>,
    }

    #[derive(Debug)]
    pub(crate) struct Tag(u64);

    impl Holders {
        #[track_caller]
        pub(crate) fn enter(&self, count: u32) -> Tag {
            let holder = Holder {
                thread: std::thread::current().name().unwrap_or("unnamed").to_owned(),
                location: Location::caller(),
                since: Instant::now(),
                count,
            };
            let mut out = lock(&self.out);
            out.0 += 1;
            let tag = out.0;
            if count > 0 {
                out.1.insert(tag, holder);
            }
            Tag(tag)
        }

        pub(crate) fn leave(&self, tag: &Tag, count: u32) {
            let mut out = lock(&self.out);
            if let Some(holder) = out.1.get_mut(&tag.0) {
                holder.count = holder.count.saturating_sub(count);
                if holder.count == 0 {
                    out.1.remove(&tag.0);
                }
            }
        }

        /// What `other` names goes on under `tag`, which becomes that of the earlier one that has
        /// anything out.
        pub(crate) fn join(&self, tag: &mut Tag, other: &Tag) {
            let mut out = lock(&self.out);
            let Some(joined) = out.1.remove(&other.0) else { return };
            match out.1.remove(&tag.0) {
                None => {
                    tag.0 = other.0;
                    out.1.insert(tag.0, joined);
                }
                Some(own) => {
                    let count = own.count.saturating_add(joined.count);
                    let first = if other.0 < tag.0 { joined } else { own };
                    tag.0 = tag.0.min(other.0);
                    out.1.insert(tag.0, Holder { count, ..first });
                }
            }
        }

        pub(crate) fn list(&self) -> Vec<Holder> {
            lock(&self.out).1.values().cloned().collect()
        }
    }
}
