//! How a command ended, as an exit code and a message. Nothing else in the program exits, save the second Ctrl-C.
use std::fmt;
use std::io;
use std::process::ExitCode;

/// Exit code of an interrupted command (128 + SIGINT), as shells have it.
pub const INTERRUPTED: u8 = 130;

/// Ways to fail that have an exit code of their own; any other error is 1.
#[derive(Debug)]
pub enum Outcome {
    /// The command line is wrong in a way that clap does not see.
    Usage(String),
    /// Ctrl-C; what could be saved has been.
    Interrupted,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Usage(message) => f.write_str(message),
            Outcome::Interrupted => f.write_str("interrupted"),
        }
    }
}

impl std::error::Error for Outcome {}

/// An error for a wrong command line: exit code 2.
pub fn usage(message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Outcome::Usage(message.into()))
}

/// Reports an error on standard error and chooses the exit code.
pub fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    if is_broken_pipe(&error) {
        // The reader has had enough (`ernie … | head`): not a failure.
        return ExitCode::SUCCESS;
    }
    match error.downcast_ref::<Outcome>() {
        Some(Outcome::Interrupted) => ExitCode::from(INTERRUPTED),
        Some(Outcome::Usage(message)) => {
            eprintln!("error: {message}\n\nFor more information, try `ernie help`.");
            ExitCode::from(2)
        }
        None => {
            eprint!("{}", message(&error));
            ExitCode::FAILURE
        }
    }
}

/// `error: …`, then one line per cause. Causes whose text the line above already carries are left out.
pub fn message(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}\n");
    let mut above = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !above.contains(&cause) {
            text.push_str(&format!("  because: {cause}\n"));
            above = cause;
        }
    }
    text
}

/// Whether the reader of standard output has gone.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn causes_are_listed_once() {
        let inner: anyhow::Result<()> = Err(io::Error::other("disk full").into());
        let error = inner.context("a.json: disk full").context("cannot save").unwrap_err();
        assert_eq!(message(&error), "error: cannot save\n  because: a.json: disk full\n");
    }

    #[test]
    fn a_wrapped_broken_pipe_is_found() {
        let inner: anyhow::Result<()> = Err(io::Error::from(io::ErrorKind::BrokenPipe).into());
        assert!(is_broken_pipe(&inner.context("writing").unwrap_err()));
    }
}
