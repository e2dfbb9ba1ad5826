pub(crate) const F_SIZE: u32 = 0;
pub(crate) const F_MULTIPORT: u32 = 1;
