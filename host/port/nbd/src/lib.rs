//! cofferdam-port-nbd.
