//! Memory of the job on its way into an image.
//!
//! [`dump::MemoryDump`] has the steps; [`tracker`] knows what was written, [`lists`] remember it, [`staging`] holds
//! copies, [`cow`] keeps old content of pages that are not copied yet.

pub mod attach;
pub mod cow;
pub mod dump;
pub mod keeper;
pub mod kept;
mod latest;
pub mod lazy;
pub mod lists;
pub mod page_set;
pub mod space;
pub mod staging;
pub mod tracker;
