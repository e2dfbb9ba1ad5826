//! cofferdam-device.
