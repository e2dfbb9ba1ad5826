//! What a control lane is asked beforehand for the one that takes its place, should it break down.

use std::sync::Arc;

use cofferdam_runtime::ExportedState;

use super::{Control, ControlLane};
use crate::binding::Binding;

/// What a control lane with queues of its own knew when its last call ended: a device does not tell it twice at once, so that clients of its ports would see them go and come.
#[derive(Default)]
pub(super) struct Hint {
    pub(super) state: Option<ExportedState>,
    /// A driver made of this broke down when it was asked: it is not asked again.
    mute: Option<u64>,
}

impl ControlLane {
    /// Whoever takes the place of the control lane knows nothing.
    pub(crate) fn forget_hint(&self) {
        self.hint.lock().state = None;
    }
}

impl Binding {
    /// Asks a control lane with queues of its own what its successor would want to know.
    pub(super) fn keep_hint(self: &Arc<Self>, control: &mut Control) {
        let made_of = Some(control.made_of);
        if control.queues.is_none() || control.is_down || self.control.hint.lock().mute == made_of {
            return;
        }
        match control.instance.suspend() {
            Ok(state) => self.control.hint.lock().state = Some(state),
            Err(_) => {
                *self.control.hint.lock() = Hint { state: None, mute: made_of };
                if let Some(fault) = control.instance.fault().cloned() {
                    self.bring_control_up(control, Some(fault));
                }
            }
        }
    }
}
