//! cofferdam-process-tests.
