//! The words of `submit` and `complete`: written into the guest's window, and copied out of the guest into a vector that is used again.
//!
//! The generated functions would call the guest's allocator for every list that goes in and make a new `Vec` for every one that comes out. Here a call passes one
//! integer: the words are written while it is lowered, to the place that the guest named (`wit/block.wit`, "The window"). wasmtime's own `WasmList` makes no `Vec`
//! either, but refers to memory of the guest, and a guest may have a post-return function, which runs before the call returns: what is read afterwards may be
//! freed. So the words are copied where they are lifted, before post-return.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::mem::MaybeUninit;

use wasmtime::component::__internal::{CanonicalAbiInfo, InstanceType, InterfaceType, LiftContext, LowerContext};
use wasmtime::component::{ComponentType, Func, Lift, Lower, TypedFunc, WasmList};
use wasmtime::{AsContext, AsContextMut, Result, bail, format_err};

use crate::service::{MAX_BATCH_REQUESTS, MAX_CHAIN_WORDS, WINDOW_ALIGN_BYTES, WINDOW_BYTES};

/// No answer has more words; of one that does, only the number is kept.
const MOST: usize = MAX_BATCH_REQUESTS * MAX_CHAIN_WORDS;

thread_local! {
    /// The words that were lifted last on this thread. Between lifting and [`Lifted::take`] only post-return runs, which cannot call out of the guest.
    static WORDS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// A `list<u32>` that was lifted into [`WORDS`].
pub(crate) struct Lifted {
    len: usize,
}

impl Lifted {
    /// Puts the words in `out`, whose memory is used for the next ones. How many there were: over [`MOST`], they are not there.
    pub(crate) fn take(self, out: &mut Vec<u32>) -> usize {
        WORDS.with_borrow_mut(|words| std::mem::swap(words, out));
        self.len
    }

    /// Copies `len` words at `pointer` of `memory`, if they lie there.
    fn keep(memory: &[u8], pointer: u32, len: u32) -> Result<Lifted> {
        let len = len as usize;
        WORDS.with_borrow_mut(|words| {
            words.clear();
            if len <= MOST {
                let bytes = memory.get(pointer as usize..).and_then(|rest| rest.get(..len * size_of::<u32>()));
                let bytes =
                    bytes.ok_or_else(|| format_err!("{len} words at {pointer:#x} reach beyond the driver's memory"))?;
                if !pointer.is_multiple_of(align_of::<u32>() as u32) {
                    bail!("a list of words at {pointer:#x}, which is not aligned");
                }
                words.extend(bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)));
            }
            Ok(Lifted { len })
        })
    }
}

// SAFETY: every item is that of `WasmList<u32>`.
unsafe impl ComponentType for Lifted {
    type Lower = <WasmList<u32> as ComponentType>::Lower;

    const ABI: CanonicalAbiInfo = <WasmList<u32> as ComponentType>::ABI;

    fn typecheck(ty: &InterfaceType, types: &InstanceType<'_>) -> Result<()> {
        WasmList::<u32>::typecheck(ty, types)
    }
}

// SAFETY: what is lifted is the pair of a `list<u32>` in this memory model, and its words are read through a slice of the guest's memory.
unsafe impl Lift for Lifted {
    fn linear_lift_from_flat(_: &mut LiftContext<'_>, _: InterfaceType, _: &Self::Lower) -> Result<Self> {
        // The canonical ABI returns one value flat at most, and a list is two.
        bail!("a list is not returned flat")
    }

    fn linear_lift_from_memory(cx: &mut LiftContext<'_>, _: InterfaceType, bytes: &[u8]) -> Result<Self> {
        let ([pointer, len], []) = bytes.as_chunks() else { bail!("{} bytes are not a list", bytes.len()) };
        Lifted::keep(cx.memory(), u32::from_le_bytes(*pointer), u32::from_le_bytes(*len))
    }
}

/// Where a guest has its words written: an offset into its memory, aligned; whether the memory is that large is looked at whenever something is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window(u32);

impl Window {
    /// `None` for an offset that is not aligned.
    pub(crate) fn at(offset: u32) -> Option<Window> {
        offset.is_multiple_of(WINDOW_ALIGN_BYTES).then_some(Window(offset))
    }

    /// Writes `words` to the beginning of the window in `memory`, little-endian.
    fn write<W: Word>(self, memory: &mut [u8], words: &[W]) -> Result<()> {
        let Window(offset) = self;
        let window = memory
            .get_mut(offset as usize..)
            .and_then(|rest| rest.first_chunk_mut::<WINDOW_BYTES>())
            .ok_or_else(|| format_err!("the window at {offset:#x} reaches beyond the driver's memory"))?;
        let place = window
            .get_mut(..size_of_val(words))
            .ok_or_else(|| format_err!("the host has {} bytes for a window of {WINDOW_BYTES}", size_of_val(words)))?;
        W::put(words, place);
        Ok(())
    }
}

/// An integer that crosses in a window.
pub(crate) trait Word: Copy + Send + Sync {
    /// Writes `words` to `place`, which is just as long.
    fn put(words: &[Self], place: &mut [u8]);
}

impl Word for u64 {
    fn put(words: &[u64], place: &mut [u8]) {
        for (word, place) in words.iter().zip(place.as_chunks_mut().0) {
            *place = word.to_le_bytes();
        }
    }
}

impl Word for u32 {
    fn put(words: &[u32], place: &mut [u8]) {
        for (word, place) in words.iter().zip(place.as_chunks_mut().0) {
            *place = word.to_le_bytes();
        }
    }
}

/// A `u32` whose lowering writes the words that it counts.
struct Counted<'a, W> {
    count: u32,
    words: &'a [W],
    window: Window,
}

impl<W: Word> Counted<'_, W> {
    fn write<T>(&self, cx: &mut LowerContext<'_, T>) -> Result<()> {
        // Never without a memory: the functions answer a list, so their canonical options name one. If they did not, the slice would be empty.
        self.window.write(cx.as_slice_mut(), self.words)
    }
}

// SAFETY: every item is that of `u32`.
unsafe impl<W: Word> ComponentType for Counted<'_, W> {
    type Lower = <u32 as ComponentType>::Lower;

    const ABI: CanonicalAbiInfo = <u32 as ComponentType>::ABI;
    const MAY_REQUIRE_REALLOC: bool = <u32 as ComponentType>::MAY_REQUIRE_REALLOC;

    fn typecheck(ty: &InterfaceType, types: &InstanceType<'_>) -> Result<()> {
        u32::typecheck(ty, types)
    }
}

// SAFETY: both ways lower a `u32`, which initializes `dst`. What is written besides lies in the guest's memory, through a slice of it.
unsafe impl<W: Word> Lower for Counted<'_, W> {
    fn linear_lower_to_flat<T>(
        &self,
        cx: &mut LowerContext<'_, T>,
        ty: InterfaceType,
        dst: &mut MaybeUninit<Self::Lower>,
    ) -> Result<()> {
        self.write(cx)?;
        self.count.linear_lower_to_flat(cx, ty, dst)
    }

    fn linear_lower_to_memory<T>(&self, cx: &mut LowerContext<'_, T>, ty: InterfaceType, offset: usize) -> Result<()> {
        self.write(cx)?;
        self.count.linear_lower_to_memory(cx, ty, offset)
    }
}

/// An export `func(count: u32) -> list<u32>` that reads words from the window, whose type was compared once.
pub(crate) struct Words<W> {
    func: Func,
    marker: std::marker::PhantomData<fn(W)>,
}

impl<W: Word> Words<W> {
    /// Compares the type.
    pub(crate) fn new(store: impl AsContext, func: Func) -> Result<Words<W>> {
        func.typed::<(Counted<'_, W>,), (Lifted,)>(store)?;
        Ok(Words { func, marker: std::marker::PhantomData })
    }

    /// Writes `words` to the window and calls with `count`; the answer is in [`WORDS`].
    pub(crate) fn call(&self, store: impl AsContextMut, window: Window, words: &[W], count: usize) -> Result<Lifted> {
        // More than the window holds is refused where it is written, so nothing that large is ever passed.
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        // SAFETY: `new` compared the types; that of a reference does not depend on its lifetime.
        let func = unsafe { TypedFunc::<(Counted<'_, W>,), (Lifted,)>::new_unchecked(self.func) };
        func.call(store, (Counted { count, words, window },)).map(|(lifted,)| lifted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_copied_if_it_lies_inside_the_memory() {
        let memory: Vec<u8> = (0..64).collect();
        let lift = |pointer, len| {
            let mut out = Vec::new();
            Lifted::keep(&memory, pointer, len).map(|lifted| (lifted.take(&mut out), out))
        };
        assert_eq!(lift(56, 2).unwrap(), (2, vec![0x3b3a_3938, 0x3f3e_3d3c]));
        assert_eq!(lift(64, 0).unwrap(), (0, vec![]));
        assert_eq!(lift(0, MOST as u32 + 1).unwrap(), (MOST + 1, vec![]));
        for (pointer, len) in [(60, 2), (64, 1), (68, 0), (u32::MAX - 3, 2), (2, 1), (63, 0)] {
            assert!(lift(pointer, len).is_err(), "{pointer} {len}");
        }
    }

    #[test]
    fn words_are_written_inside_the_window_alone() {
        let mut memory = vec![0xee; WINDOW_BYTES + 24];
        Window::at(16).unwrap().write(&mut memory, &[0x0807_0605_0403_0201_u64]).unwrap();
        assert_eq!(memory[16..24], [1, 2, 3, 4, 5, 6, 7, 8]);
        Window::at(8).unwrap().write(&mut memory, &[0x0403_0201_u32]).unwrap();
        assert_eq!(memory[8..16], [1, 2, 3, 4, 0xee, 0xee, 0xee, 0xee]);
        Window::at(16).unwrap().write(&mut memory, &[7_u32; WINDOW_BYTES / 4]).unwrap();
        assert_eq!(memory[WINDOW_BYTES + 16..], [0xee; 8]);
    }

    #[test]
    fn a_window_that_is_not_whole_inside_memory_is_not_written() {
        let mut memory = vec![0xee; WINDOW_BYTES + 24];
        for offset in [32, 1 << 20, u32::MAX - 7] {
            assert!(Window::at(offset).unwrap().write(&mut memory, &[0_u64]).is_err(), "{offset}");
        }
        assert!(Window::at(0).unwrap().write(&mut [], &[0_u64]).is_err());
        assert!(Window::at(0).unwrap().write(&mut memory, &[0_u32; WINDOW_BYTES / 4 + 1]).is_err());
        assert!(memory.iter().all(|byte| *byte == 0xee));
        assert_eq!((Window::at(4), Window::at(12), Window::at(u32::MAX)), (None, None, None));
    }
}
