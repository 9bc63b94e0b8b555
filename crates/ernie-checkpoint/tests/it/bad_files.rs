//! Safetensors files that are truncated or lie: a typed error that names file and tensor, for each way.

use std::fs;
use std::path::Path;
use std::process::Command;

use ernie_checkpoint::{ChatTemplate, ChatTemplateError, Checkpoint, Error, Tokenizer, TokenizerError};

use crate::fixture::{assert_error, dense, file, model, open_error, with_weights};

const FILE: &str = "model.safetensors";

#[test]
fn no_weights_and_no_directory() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), dense().to_json().to_string()).unwrap();
    assert_error!(open_error(dir.path(), &[FILE]), Error::NoWeights { .. });
    assert_error!(open_error(&dir.path().join("nowhere"), &["nowhere"]), Error::Io { .. });
}

/// Puts something under each name that is opened, and checks that it is refused rather than waited for or read forever.
fn not_regular(put: impl Fn(&Path), got: &str) {
    let dir = model(&dense());
    for name in [FILE, "model.safetensors.index.json", "config.json"] {
        let path = dir.path().join(name);
        let before = fs::read(dir.path().join(FILE)).ok();
        let _ = fs::remove_file(&path);
        if name != FILE {
            let _ = fs::remove_file(dir.path().join(FILE));
        }
        put(&path);
        assert_error!(open_error(dir.path(), &[name, "regular file", got]), Error::NotRegular { .. });
        fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)).unwrap();
        if let Some(bytes) = before {
            fs::write(dir.path().join(FILE), bytes).unwrap();
        }
    }
    for name in ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"] {
        let dir = tempfile::tempdir().unwrap();
        put(&dir.path().join(name));
        if name == "tokenizer_config.json" {
            let error = ChatTemplate::from_dir(dir.path()).expect_err("it was read");
            assert!(matches!(error, ChatTemplateError::File(TokenizerError::NotRegular { .. })), "{error}");
        } else {
            let error = Tokenizer::from_dir(dir.path()).expect_err("it was read");
            assert!(matches!(&error, TokenizerError::NotRegular { path, .. } if path.ends_with(name)), "{error}");
        }
    }
}

#[test]
fn a_directory_under_a_files_name() {
    not_regular(|path| fs::create_dir(path).unwrap(), "a directory");
}

#[test]
fn a_named_pipe_under_a_files_name() {
    let make = |path: &Path| Command::new("mkfifo").arg(path).status();
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    if !make(&pipe).is_ok_and(|status| status.success()) {
        eprintln!("skipped: no named pipes can be made here");
        return;
    }
    not_regular(|path| assert!(make(path).unwrap().success()), "a named pipe");
    // Nor is a pipe waited for in place of the directory.
    assert!(Checkpoint::open(&pipe).is_err());
}

#[cfg(unix)]
#[test]
fn a_device_behind_a_link() {
    not_regular(|path| std::os::unix::fs::symlink("/dev/zero", path).unwrap(), "a device");
}

#[test]
fn texts_too_large_to_be_what_they_are_called() {
    for (name, limit) in [("config.json", 16 << 20), ("model.safetensors.index.json", 256 << 20)] {
        let dir = model(&dense());
        if name != "config.json" {
            fs::remove_file(dir.path().join(FILE)).unwrap();
        }
        fs::File::create(dir.path().join(name)).unwrap().set_len(limit + 1).unwrap(); // sparse
        let error = open_error(dir.path(), &[name]);
        assert!(matches!(error, Error::FileTooLarge { size, limit: l, .. } if (size, l) == (limit + 1, limit)), "{error}");
    }
}

#[test]
fn shorter_than_the_length_prefix() {
    for length in 0..8 {
        let dir = with_weights(&vec![0; length]);
        assert_error!(open_error(dir.path(), &[FILE, "8 bytes"]), Error::HeaderLength { needed: 8, .. });
    }
}

#[test]
fn header_lengths_that_lie() {
    for claimed in [3, 1 << 20, 1 << 40, u64::MAX - 8, u64::MAX] {
        let mut bytes = file("{}", &[]);
        bytes[..8].copy_from_slice(&u64::to_le_bytes(claimed));
        assert_error!(open_error(with_weights(&bytes).path(), &[FILE]), Error::HeaderLength { available: 10, .. });
    }
}

#[test]
fn a_header_above_the_formats_limit() {
    let claimed = 100_000_001_u64;
    let dir = with_weights(&claimed.to_le_bytes());
    // Sparse: the file is long enough for the claim, without taking the space.
    let sparse = std::fs::OpenOptions::new().write(true).open(dir.path().join(FILE)).unwrap();
    sparse.set_len(8 + claimed).unwrap();
    assert_error!(open_error(dir.path(), &[FILE, "100000001"]), Error::HeaderTooLarge { .. });
}

#[test]
fn headers_that_are_not_the_object() {
    for header in ["", "[]", "{", "null", "{\"a\":", "{} x", "\u{0}"] {
        assert_error!(open_error(with_weights(&file(header, &[])).path(), &[FILE]), Error::HeaderSyntax { .. });
    }
    let mut bytes = file("{\"a\": 1}", &[]);
    bytes[10] = 0xff;
    assert_error!(open_error(with_weights(&bytes).path(), &[FILE, "utf-8"]), Error::HeaderSyntax { .. });
    let nested = format!("{{\"a\": {}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    assert_error!(open_error(with_weights(&file(&nested, &[])).path(), &[FILE]), Error::HeaderSyntax { .. });
    let metadata = r#"{"__metadata__": {"format": 3}}"#;
    assert_error!(open_error(with_weights(&file(metadata, &[])).path(), &[FILE]), Error::HeaderSyntax { .. });
}

#[test]
fn entries_that_are_not_tensors() {
    for entry in [
        "1",
        "{}",
        r#"{"dtype": "F32", "shape": [1]}"#,
        r#"{"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}"#,
        r#"{"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}"#,
        r#"{"dtype": "F32", "shape": [1], "data_offsets": [0]}"#,
        r#"{"dtype": "F32", "shape": [1], "data_offsets": [0, 99999999999999999999]}"#,
        r#"{"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "extra": 1}"#,
    ] {
        let dir = with_weights(&file(&format!(r#"{{"model.x": {entry}}}"#), &[0; 4]));
        assert_error!(open_error(dir.path(), &[FILE, "model.x"]), Error::HeaderEntry { .. });
    }
}

/// A file of one tensor with this entry.
#[track_caller]
fn one(dtype: &str, shape: &str, begin: u64, end: u64, data: usize, mentions: &[&str]) -> Error {
    let header = format!(r#"{{"model.x": {{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#);
    let dir = with_weights(&file(&header, &vec![0; data]));
    open_error(dir.path(), &[&[FILE, "model.x"], mentions].concat())
}

#[test]
fn dtypes_that_are_not_read() {
    for dtype in ["F64", "I64", "BOOL", "F8_E4M3", "f32", ""] {
        assert_error!(one(dtype, "[1]", 0, 8, 8, &[dtype]), Error::UnsupportedDtype { .. });
    }
}

#[test]
fn shapes_that_overflow() {
    for shape in ["[18446744073709551615]", "[4294967296, 4294967296]", "[9223372036854775808, 2]"] {
        assert_error!(one("F32", shape, 0, 0, 0, &["overflow"]), Error::ShapeOverflow { .. });
    }
}

#[test]
fn sizes_that_do_not_match() {
    assert_error!(one("F32", "[2]", 0, 4, 4, &["8", "4"]), Error::SizeMismatch { expected: 8, got: 4, .. });
    assert_error!(one("BF16", "[3, 1]", 0, 8, 8, &["6", "8"]), Error::SizeMismatch { .. });
    assert_error!(one("I8", "[]", 0, 0, 0, &[]), Error::SizeMismatch { expected: 1, .. });
}

#[test]
fn offsets_that_lie() {
    assert_error!(one("F32", "[1]", 8, 4, 8, &["8", "4"]), Error::OffsetsReversed { .. });
    assert_error!(one("F32", "[2]", 0, 8, 4, &["8", "4"]), Error::OffsetsOutside { end: 8, available: 4, .. });
    let far = u64::MAX - 3;
    assert_error!(one("F32", "[1]", far - 4, far, 4, &[]), Error::OffsetsOutside { .. });
    assert_error!(one("F32", "[1]", 4, 8, 8, &["0..4"]), Error::Hole { tensor: Some(_), begin: 0, end: 4, .. });
    let header = r#"{"model.x": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let dir = with_weights(&file(header, &[0; 7]));
    assert_error!(open_error(dir.path(), &[FILE, "4..7"]), Error::Hole { tensor: None, .. });
}

/// The header of two one-element tensors at these ranges.
fn two(first: &str, a: [u64; 2], second: &str, b: [u64; 2]) -> String {
    let entry = |name: &str, at: [u64; 2]| format!(r#""{name}": {{"dtype":"F32","shape":[1],"data_offsets":{at:?}}}"#);
    format!("{{{},{}}}", entry(first, a), entry(second, b))
}

#[test]
fn overlaps_and_holes_between_tensors() {
    for (a, b) in [([0, 4], [0, 4]), ([0, 4], [3, 7]), ([2, 6], [0, 4])] {
        let dir = with_weights(&file(&two("model.a", a, "model.b", b), &[0; 8]));
        assert_error!(open_error(dir.path(), &[FILE, "model.a", "model.b"]), Error::Overlap { .. });
    }
    let dir = with_weights(&file(&two("model.a", [0, 4], "model.b", [6, 10]), &[0; 10]));
    assert_error!(open_error(dir.path(), &[FILE, "model.b", "4..6"]), Error::Hole { .. });
}

#[test]
fn a_name_given_twice() {
    let dir = with_weights(&file(&two("model.a", [0, 4], "model.a", [4, 8]), &[0; 8]));
    assert_error!(open_error(dir.path(), &[FILE, "model.a"]), Error::DuplicateTensor { .. });
}

#[test]
fn every_truncation_of_a_whole_model_is_refused() {
    let dir = model(&dense());
    let path = dir.path().join(FILE);
    let whole = std::fs::read(&path).unwrap();
    let lengths = (0..whole.len()).step_by(97).chain([whole.len() - 1]);
    for length in lengths {
        std::fs::write(&path, &whole[..length]).unwrap();
        open_error(dir.path(), &[FILE]);
    }
}
