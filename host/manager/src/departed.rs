//! What is remembered of bindings that have left: how each ended, for `why` and for the first `unload` after one that left by itself; and memory that was retired
//! on purpose, for `ls`, for as long as the process lives.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;

use crate::binding::Binding;
use crate::certificate::Certificate;
use crate::explain::Explanation;
use crate::status::BindingStatus;

/// Ends that are remembered; the oldest go first.
const REMEMBERED: usize = 64;
/// Bindings with retired memory that are listed one by one; what comes after them is summed up in the last.
const LISTED: usize = 64;

struct Gone {
    explanation: Explanation,
    /// It left by itself, and nobody has been given its certificate.
    untold: bool,
}

#[derive(Default)]
struct Inside {
    gone: VecDeque<Gone>,
    retired: Vec<BindingStatus>,
}

impl Inside {
    /// Certificates under this name are told.
    fn tell(&mut self, name: &str) {
        self.gone.iter_mut().filter(|gone| gone.explanation.name == name).for_each(|gone| gone.untold = false);
    }
}

/// See the module.
#[derive(Default)]
pub(crate) struct Departed(Mutex<Inside>);

impl Departed {
    /// Remembers a binding that has just left, once. `by_itself`: nobody asked for its end; `told`: this caller has its certificate.
    pub(crate) fn add(&self, binding: &Binding, by_itself: bool, told: bool) {
        let (explanation, status) = (binding.explain(), binding.status());
        let mut inside = self.0.lock();
        if binding.remembered.swap(true, Ordering::AcqRel) {
            if told {
                inside.tell(binding.name());
            }
            return;
        }
        if inside.gone.len() >= REMEMBERED {
            inside.gone.pop_front();
        }
        inside.gone.push_back(Gone { explanation, untold: by_itself && !told });
        if status.retired_bytes == 0 {
            return;
        }
        if inside.retired.len() < LISTED {
            inside.retired.push(status);
        } else if let Some(last) = inside.retired.last_mut() {
            last.retired_bytes += status.retired_bytes;
        }
    }

    /// The name is another binding's from here on: what nobody has asked for is not told for that one.
    pub(crate) fn take_name(&self, name: &str) {
        self.0.lock().tell(name);
    }

    /// The newest certificate under this name that nobody has been given; once.
    pub(crate) fn tell(&self, name: &str) -> Option<Certificate> {
        let mut inside = self.0.lock();
        let gone = inside.gone.iter_mut().rfind(|gone| gone.untold && gone.explanation.name == name)?;
        gone.untold = false;
        gone.explanation.certificate.clone()
    }

    /// How the newest binding of this name ended.
    pub(crate) fn why(&self, name: &str) -> Option<Explanation> {
        let inside = self.0.lock();
        inside.gone.iter().rfind(|gone| gone.explanation.name == name).map(|gone| gone.explanation.clone())
    }

    /// Bindings that are gone and whose memory is not.
    pub(crate) fn retired(&self) -> Vec<BindingStatus> {
        self.0.lock().retired.clone()
    }
}
