//! What has to hold of every class.

mod leaving;
mod receiving;
mod serving;

pub(crate) use leaving::CASES as LEAVING;
pub(crate) use receiving::CASES as RECEIVING;
pub(crate) use serving::CASES as SERVING;
