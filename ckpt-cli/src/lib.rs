//! ckpt: checkpoint and restore running distributed jobs from the outside.

pub mod objects;
pub mod sys;
pub mod tracee;
