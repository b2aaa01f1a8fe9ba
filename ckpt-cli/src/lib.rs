//! ckpt: checkpoint and restore running distributed jobs from the outside.

pub mod job;
pub mod store;
pub mod sys;
pub mod tracee;
