//! cofferdam-virtio-blk.
