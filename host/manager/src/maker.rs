//! Makes instances of a driver for one binding: at load, and again when one breaks down.

use cofferdam_lifecycle::Phase;
use cofferdam_runtime::{Grants, GuestLimits, Instance, InstanceSpec, KillSwitch, LaneId, Linked, Module};

use crate::binding::Binding;
use crate::error::LoadError;

/// A driver's code, joined to what it was granted, and its limits.
#[derive(Clone)]
pub(crate) struct Maker {
    linked: Linked,
    limits: GuestLimits,
}

impl Maker {
    pub(crate) fn new(module: &Module, grants: Grants, limits: GuestLimits) -> Result<Maker, LoadError> {
        Ok(Maker { linked: module.link(&grants)?, limits })
    }

    /// The same grants and limits with other code.
    pub(crate) fn of(&self, module: &Module) -> Result<Maker, LoadError> {
        Maker::new(module, self.linked.grants().clone(), self.limits.clone())
    }

    pub(crate) fn module(&self) -> &Module {
        self.linked.module()
    }

    /// One more instance. Takes as long as a guest call may.
    pub(crate) fn make(&self, binding: &Binding, lane: LaneId) -> Result<Instance, LoadError> {
        // Called off meanwhile: no more guest code is run for it.
        if !matches!(binding.phase(), Phase::Loading | Phase::Serving | Phase::Recovering) {
            return Err(LoadError::CalledOff);
        }
        Ok(self.linked.instantiate(InstanceSpec {
            binding: binding.name().to_owned(),
            driver: binding.driver().to_string(),
            device: binding.device().to_owned(),
            generation: binding.generation(),
            lane,
            gate: *binding.gate(),
            grants: self.linked.grants().clone(),
            limits: self.limits.clone(),
            kill: KillSwitch::new(),
            view: binding.new_view(lane),
        })?)
    }
}
