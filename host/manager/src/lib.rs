//! cofferdam-manager.
