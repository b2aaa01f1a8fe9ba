//! ckpt: checkpoint and restore running distributed jobs from the outside.
