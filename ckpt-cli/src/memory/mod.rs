//! Memory of the job on its way into an image.

pub mod lists;
pub mod page_set;
pub mod staging;
