//! What coordinator and agents say to each other.
