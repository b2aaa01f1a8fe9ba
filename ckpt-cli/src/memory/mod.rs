//! Memory of the job on its way into an image.

pub mod staging;
