//! What `submit` and `complete` answer, copied out of the guest into a vector that is used again.
//!
//! The generated functions make a new `Vec` for every call. wasmtime's own `WasmList` makes none, but refers to memory of the guest, and a call runs the guest's
//! post-return function before it returns: what is read afterwards was freed. So the words are copied where they are lifted, before post-return.
#![allow(unsafe_code)]

use std::cell::RefCell;

use wasmtime::component::__internal::{CanonicalAbiInfo, InstanceType, InterfaceType, LiftContext};
use wasmtime::component::{ComponentType, Func, Lift, Lower, TypedFunc, WasmList};
use wasmtime::{AsContext, AsContextMut, Result};

use crate::service::{MAX_BATCH_REQUESTS, MAX_CHAIN_WORDS};

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

    fn keep(cx: &mut LiftContext<'_>, list: &WasmList<u32>) -> Result<Lifted> {
        WORDS.with_borrow_mut(|words| {
            words.clear();
            if list.len() <= MOST {
                u32::linear_lift_into_from_memory(cx, list, words)?;
            }
            Ok(Lifted { len: list.len() })
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

// SAFETY: both ways lift a `WasmList<u32>`, which checks pointer, length and alignment.
unsafe impl Lift for Lifted {
    fn linear_lift_from_flat(cx: &mut LiftContext<'_>, ty: InterfaceType, from: &Self::Lower) -> Result<Self> {
        let list = WasmList::linear_lift_from_flat(cx, ty, from)?;
        Lifted::keep(cx, &list)
    }

    fn linear_lift_from_memory(cx: &mut LiftContext<'_>, ty: InterfaceType, bytes: &[u8]) -> Result<Self> {
        let list = WasmList::linear_lift_from_memory(cx, ty, bytes)?;
        Lifted::keep(cx, &list)
    }
}

/// An export `func(list<T>) -> list<u32>`, whose type was compared once.
pub(crate) struct Words<T> {
    func: Func,
    marker: std::marker::PhantomData<fn(T)>,
}

impl<T> Words<T>
where
    for<'a> &'a [T]: Lower,
{
    /// Compares the type.
    pub(crate) fn new(store: impl AsContext, func: Func) -> Result<Words<T>> {
        func.typed::<(&[T],), (Lifted,)>(store)?;
        Ok(Words { func, marker: std::marker::PhantomData })
    }

    /// Calls it; the words are in [`WORDS`].
    pub(crate) fn call(&self, store: impl AsContextMut, words: &[T]) -> Result<Lifted> {
        // SAFETY: `new` compared the types; that of a reference does not depend on its lifetime.
        let func = unsafe { TypedFunc::<(&[T],), (Lifted,)>::new_unchecked(self.func) };
        func.call(store, (words,)).map(|(lifted,)| lifted)
    }
}
