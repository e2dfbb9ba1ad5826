//! cofferdam-sim.
