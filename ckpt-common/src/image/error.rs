//! What can be wrong with an image.

/// Why bytes are not the image they claim to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Bytes are missing, changed, or contradict each other.
    #[error("{what} is damaged: {why}")]
    Damaged {
        /// Which piece of the image.
        what: &'static str,
        /// What was expected and what was found.
        why: String,
    },
    /// Written by a newer ckpt.
    #[error("{what} has version {found}, but this ckpt reads only up to version {supported}")]
    Newer {
        /// Which piece of the image.
        what: String,
        /// Version in the image.
        found: u32,
        /// Newest version understood here.
        supported: u32,
    },
    /// A required record is of a kind that this ckpt has never heard of.
    #[error("a required record is of the unknown kind `{0}`: the image is from another version of ckpt")]
    UnknownKind(String),
    /// A value does not fit the format: an error of the writer, not of the image.
    #[error("{what} cannot be stored: {why}")]
    TooLarge {
        /// Which piece of the image.
        what: &'static str,
        /// Limit and value.
        why: String,
    },
}

impl FormatError {
    /// Shorthand for [`FormatError::Damaged`].
    pub fn damaged(what: &'static str, why: impl Into<String>) -> Self {
        Self::Damaged { what, why: why.into() }
    }
}
