//! Running `ernie` and reading what it says.
use serde_json::Value;
use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Stdio};

/// What a run left behind.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs `ernie` with nothing on standard input.
pub fn ernie<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Run {
    ernie_with_input(arguments, "")
}

/// Runs `ernie` with a text on standard input, which is a pipe.
pub fn ernie_with_input<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>, input: &str) -> Run {
    let mut child = command().args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A program that ends without reading everything is within its rights.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    Run { code: output.status.code(), stdout: String::from_utf8(output.stdout).unwrap(), stderr: String::from_utf8(output.stderr).unwrap() }
}

/// `ernie`, not yet started, without the caller's data folder.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ernie"));
    // Nor with what the caller has configured, nor in their accounts.
    command.env_remove("ERNIE_DATA").env_remove("ERNIE_SERVE_DATABASE").env("XDG_DATA_HOME", env!("CARGO_TARGET_TMPDIR"));
    command
}

impl Run {
    /// Asserts success and returns standard output.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self.stdout
    }

    /// Asserts success and reads standard output as JSON.
    #[track_caller]
    pub fn json(self) -> Value {
        serde_json::from_str(&self.ok()).unwrap()
    }

    /// Asserts the exit code and that standard error has each of these texts.
    #[track_caller]
    pub fn fails(self, code: i32, texts: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        for text in texts {
            assert!(self.stderr.contains(text), "no {text:?} in {self:#?}");
        }
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
        self
    }
}
