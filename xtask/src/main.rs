//! Automation for the repository: `cargo run -p xtask -- tidy` checks that it is as its documents describe it.
//!
//! The same checks run as a test, so `cargo test --workspace` finds what they find.

mod tidy;
mod tree;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tidy::Severity;
use tree::Tree;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["tidy"] => run_tidy(),
        _ => {
            eprintln!("usage: cargo run -p xtask -- tidy");
            ExitCode::from(2)
        }
    }
}

fn run_tidy() -> ExitCode {
    let tree = match Tree::of_checkout(&root()) {
        Ok(tree) => tree,
        Err(reason) => {
            eprintln!("tidy: {reason}");
            return ExitCode::FAILURE;
        }
    };
    let problems = tidy::check(&tree);
    for problem in &problems {
        eprintln!("{problem}");
    }
    let errors = problems.iter().filter(|p| p.severity == Severity::Error).count();
    let warnings = problems.len() - errors;
    eprintln!("tidy: {} files, {errors} errors, {warnings} warnings", tree.len());
    if errors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The workspace root: the folder above this crate's.
fn root() -> PathBuf {
    let manifest_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest_dir.parent().unwrap_or(manifest_dir).to_path_buf()
}
