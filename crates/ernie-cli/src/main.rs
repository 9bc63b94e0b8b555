//! The `ernie` command.
fn main() {}
