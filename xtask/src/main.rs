//! `cargo xtask <task>`: everything a person does to the repository.

fn main() {}
