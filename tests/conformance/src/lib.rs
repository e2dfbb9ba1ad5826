//! cofferdam-conformance.
