//! The job's network: the user side of the programs in the kernel, and the map of addresses.

pub mod addresses;
pub mod hold;
