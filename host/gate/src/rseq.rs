//! Counting on the current core by restartable sequences, rseq(2), on x86-64.
//!
//! A section looks at one or two words and, if they are as expected, adds a number to a counter
//! of the core it runs on, with one ordinary instruction. When the thread is preempted, moved or
//! signalled between `start` and `commit`, or when a closer issues `membarrier(2)` in its RSEQ
//! flavour, the kernel sends it to the abort handler, and it starts again. So
//! - no other thread of the same core runs between the choice of the core and the add:
//!   the add needs no `lock` prefix (G4);
//! - looking and counting are one step as seen by a closer: after the barrier a section has
//!   either committed, and the closer sees the count, or it looks again, and sees the new word
//!   (G1). The plain flavour of the barrier would let a section that has looked go on to count.
#![allow(unsafe_code)]

use std::arch::asm;
use std::sync::atomic::{AtomicIsize, AtomicU32, Ordering::Relaxed};

use crate::cells::Cells;
use crate::count::By;
use crate::sync::atomic::AtomicU64;

/// What a section came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The words were as expected and the number was added to the counter.
    Counted,
    /// A word was not as expected; nothing was written.
    Refused,
    /// This thread has no rseq registration, or its core has no row; nothing was written.
    Homeless,
}

/// Bytes from the thread pointer to the thread's rseq area. Set before the first section runs.
static AREA: AtomicIsize = AtomicIsize::new(0);
/// Cores that have a row. Zero sends every section to `Outcome::Homeless`.
static LIMIT: AtomicU32 = AtomicU32::new(0);

/// Finds the area that the C library registered. `Err` says why sections cannot be used.
pub(crate) fn prepare() -> Result<(), &'static str> {
    // SAFETY: the names are NUL-terminated; a symbol that is not there gives null.
    let (offset, size) = unsafe {
        (
            libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>(),
            libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()).cast::<u32>(),
        )
    };
    if offset.is_null() || size.is_null() {
        return Err("the C library knows no rseq");
    }
    // SAFETY: glibc documents these symbols as constants of these types (glibc manual,
    // "Restartable Sequences").
    let (offset, size) = unsafe { (*offset, *size) };
    if size == 0 {
        return Err("the C library did not register rseq");
    }
    AREA.store(offset, Relaxed);
    LIMIT.store(crate::cpu::cores(), Relaxed);
    // This thread: negative means that registration failed.
    let cpu: i32;
    // SAFETY: reads `cpu_id` at offset 4 of this thread's rseq area, which glibc keeps in the
    // thread's control block for as long as the thread lives.
    unsafe {
        asm!("mov {cpu:e}, dword ptr fs:[{area} + 4]", cpu = out(reg) cpu, area = in(reg) offset,
            options(nostack, readonly, preserves_flags));
    }
    if cpu < 0 { Err("the kernel refused rseq") } else { Ok(()) }
}

/// One section: `$look` compares, then `$by` is added to a counter in the row of the core. Where
/// `$by` is known when this is compiled, one of the two forms is left.
///
/// Layout of the area (`struct rseq`): `cpu_id` at 4, `rseq_cs` at 8. Layout of the descriptor
/// (`struct rseq_cs`): version, flags, start, length up to the commit, abort address. The
/// kernel wants the signature 0x53053053 in the four bytes before the abort address.
macro_rules! section {
    ($cells:expr, $column:expr, $by:expr, $look:tt, $($operands:tt)*) => {
        match $by {
            // A register less, which makes a pair of calls cheaper by a fifth.
            By::One => section!(@ $cells, $column,
                "inc qword ptr [{counter} + {tmp} + {column}]", $look,
                $($operands)*
            ),
            By::Many(number) => section!(@ $cells, $column,
                "add qword ptr [{counter} + {tmp} + {column}], {number}", $look,
                number = in(reg) u64::from(number),
                $($operands)*
            ),
        }
    };
    (@ $cells:expr, $column:expr, $add:literal, [$($look:literal),*], $($operands:tt)*) => {
        asm!(
            ".pushsection __rseq_cs, \"aw\"",
            ".balign 32",
            "771:",
            ".long 0, 0",
            ".quad 772f, 773f - 772f, 774f",
            ".popsection",
            "mov {area}, qword ptr [rip + {offset}]",
            "775:",
            "lea {tmp}, [rip + 771b]",
            "mov qword ptr fs:[{area} + 8], {tmp}",
            "772:", // start
            "mov {tmp:e}, dword ptr fs:[{area} + 4]",
            "cmp {tmp:e}, dword ptr [rip + {limit}]", // unsigned: also catches negative numbers
            "jae {homeless}",
            $($look,)*
            "shl {tmp}, 12", // STRIDE_BYTES
            $add,
            "773:", // committed
            ".pushsection __rseq_failure, \"ax\"",
            ".byte 0x0f, 0xb9, 0x3d",
            ".long 0x53053053",
            "774:",
            "jmp 775b",
            ".popsection",
            tmp = out(reg) _,
            area = out(reg) _,
            offset = sym AREA,
            limit = sym LIMIT,
            counter = in(reg) $cells.first_row(),
            column = const $column * size_of::<u64>(),
            homeless = label { return Outcome::Homeless },
            $($operands)*
            options(nostack),
        )
    };
}

const _: () = assert!(crate::cells::STRIDE_BYTES == 1 << 12);

/// Adds `by` to the counter `COLUMN` of the current core.
#[inline(always)]
pub(crate) fn add<const COLUMN: usize, const N: usize>(cells: Cells<N>, by: By) -> Outcome {
    const { assert!(COLUMN < N) };
    // SAFETY: `{counter} + (cpu << 12) + 8 * COLUMN` is inside the mapping, by the invariant of
    // `Cells`, because the section checks cpu < LIMIT = cores() < rows(), and COLUMN < N. Only sections of this core
    // write there while this one runs, and it is restarted if it does not run through; a plain
    // add to an aligned word is what other cores see as one atomic store. Inputs are not
    // changed between start and commit, so starting again is sound. The area belongs to this
    // thread and outlives it. Flags and `tmp` are clobbered; the stack is not touched.
    unsafe { section!(cells, COLUMN, by, [],) };
    Outcome::Counted
}

/// Adds `by` to the counter `COLUMN` of the current core if `*word == expected`.
#[inline(always)]
pub(crate) fn add_if<const COLUMN: usize, const N: usize>(
    word: &AtomicU64,
    expected: u64,
    cells: Cells<N>,
    by: By,
) -> Outcome {
    // SAFETY: as in `add`; the word is read through a live reference by one aligned load.
    unsafe {
        section!(cells, COLUMN, by,
            ["cmp qword ptr [{word}], {expected}", "jne {refused}"],
            word = in(reg) word,
            expected = in(reg) expected,
            refused = label { return Outcome::Refused },
        )
    };
    Outcome::Counted
}

/// Adds `by` to the counter `COLUMN` of the current core if `*word == expected` and none of the bits `BITS`
/// is set in `*other`: one section, so one barrier covers both looks.
#[inline(always)]
pub(crate) fn add_if_unless<const BITS: u8, const COLUMN: usize, const N: usize>(
    word: &AtomicU64,
    expected: u64,
    other: &AtomicU64,
    cells: Cells<N>,
    by: By,
) -> Outcome {
    // SAFETY: as in `add_if` and `add_unless`, one look after the other.
    unsafe {
        section!(cells, COLUMN, by,
            [
                "cmp qword ptr [{word}], {expected}", "jne {refused}",
                "test byte ptr [{other}], {bits}", "jne {refused}"
            ],
            word = in(reg) word,
            expected = in(reg) expected,
            other = in(reg) other,
            bits = const BITS,
            refused = label { return Outcome::Refused },
        )
    };
    Outcome::Counted
}

/// Adds `by` to the counter `COLUMN` of the current core if none of the bits `BITS` is set in the word.
#[inline(always)]
pub(crate) fn add_unless<const BITS: u8, const COLUMN: usize, const N: usize>(
    word: &AtomicU64,
    cells: Cells<N>,
    by: By,
) -> Outcome {
    // SAFETY: as in `add_if`; the low byte of a live, little-endian word is read.
    unsafe {
        section!(cells, COLUMN, by,
            ["test byte ptr [{word}], {bits}", "jne {refused}"],
            word = in(reg) word,
            bits = const BITS,
            refused = label { return Outcome::Refused },
        )
    };
    Outcome::Counted
}

/// The same for the bits `FIRST` in the first word and the bits `SECOND` in the second.
#[inline(always)]
pub(crate) fn add_unless_either<const FIRST: u8, const SECOND: u8, const COLUMN: usize, const N: usize>(
    words: [&AtomicU64; 2],
    cells: Cells<N>,
    by: By,
) -> Outcome {
    // SAFETY: as in `add_unless`, with two words.
    unsafe {
        section!(cells, COLUMN, by,
            [
                "test byte ptr [{first}], {bits_first}", "jne {refused}",
                "test byte ptr [{second}], {bits_second}", "jne {refused}"
            ],
            first = in(reg) words[0],
            bits_first = const FIRST,
            second = in(reg) words[1],
            bits_second = const SECOND,
            refused = label { return Outcome::Refused },
        )
    };
    Outcome::Counted
}
