//! What the tests share: the test cluster and the workloads.

pub mod cluster;
pub mod job;
pub mod proof;
pub mod sharing;
pub mod stream;
