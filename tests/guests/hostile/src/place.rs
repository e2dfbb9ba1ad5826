//! What goes wrong with places: where the window is, and where the words of an answer are.

use std::ptr::without_provenance;
use std::sync::atomic::{AtomicUsize, Ordering};

use cofferdam_sdk::glue::List;

use crate::behaviour;

/// Where the window really is.
static WINDOW: AtomicUsize = AtomicUsize::new(0);
/// How often it was asked for.
static ASKED: AtomicUsize = AtomicUsize::new(0);

/// What is said about the window, which is at `honest`.
pub(crate) fn window(honest: usize) -> usize {
    WINDOW.store(honest, Ordering::Relaxed);
    match behaviour() {
        "window-outside" => usize::MAX - 7,
        "window-half-outside" => core::arch::wasm32::memory_size::<0>() * 65_536 - 8,
        "window-misaligned" => honest + 4,
        "window-moves" => honest + 65_536 * ASKED.fetch_add(1, Ordering::Relaxed),
        _ => honest,
    }
}

/// What is said about the answer, which is at `honest`.
pub(crate) fn answer(honest: *const List) -> *const List {
    let window = WINDOW.load(Ordering::Relaxed);
    let (words, length) = match behaviour() {
        "answer-outside" => (usize::MAX - 3, 1),
        "answer-half-outside" => (core::arch::wasm32::memory_size::<0>() * 65_536 - 4, 2),
        "answer-misaligned" => (window + 1, 2),
        "answer-window" => (window, 2),
        "answer-endless" => (window, usize::MAX / 8),
        _ => return honest,
    };
    Box::leak(Box::new(List { words: without_provenance(words), length }))
}
