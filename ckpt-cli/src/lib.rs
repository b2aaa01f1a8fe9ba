//! ckpt: checkpoint and restore running distributed jobs from the outside.

pub mod capture;
pub mod memory;
pub mod network;
pub mod objects;
pub mod rebuild;
pub mod store;
pub mod sys;
pub mod tracee;
