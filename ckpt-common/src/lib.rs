//! The contracts of ckpt: every type that crosses a boundary.
//!
//! * [`bpf`]: kernel and user space (map keys and values; the only part without `std`)
//! * [`wire`]: node and node (what coordinator and agents say to each other)
//! * [`image`]: now and later (manifest, records, page maps)
//!
//! Nothing here does anything: no file, process or socket is touched.
#![cfg_attr(not(feature = "std"), no_std)]

pub mod bpf;
#[cfg(feature = "std")]
pub mod fuzzing;
#[cfg(feature = "std")]
pub mod image;
#[cfg(feature = "std")]
pub mod wire;
