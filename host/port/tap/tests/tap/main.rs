//! The port in front of a simulated device, judged by the kernel's own stack. Needs root: each test has a network of its own.

mod bed;
mod lies;
mod life;
mod peer;
mod traffic;
