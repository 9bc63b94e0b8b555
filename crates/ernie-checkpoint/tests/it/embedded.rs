//! A model compiled into the program.

use std::fs;

use ernie_checkpoint::{Checkpoint, EmbeddedFiles, Error};

use crate::fixture::{assert_error, dense, mentions_all, model};

fn leaked(bytes: Vec<u8>) -> &'static [u8] {
    Box::leak(bytes.into_boxed_slice())
}

#[test]
fn equals_the_directory() {
    let dir = model(&dense());
    let config = fs::read_to_string(dir.path().join("config.json")).unwrap();
    let safetensors = leaked(fs::read(dir.path().join("model.safetensors")).unwrap());
    let embedded = Checkpoint::from_static(EmbeddedFiles { config: &config, safetensors }).unwrap();
    embedded.validate().unwrap();
    let opened = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(embedded.config(), opened.config());
    assert!(embedded.names().eq(opened.names()));
    for name in opened.names() {
        assert_eq!(embedded.tensor(name).unwrap().as_bytes(), opened.tensor(name).unwrap().as_bytes());
    }
    assert_eq!(embedded.file_bytes(), safetensors.len() as u64);
}

#[test]
fn errors_name_the_embedded_file() {
    let error = Checkpoint::from_static(EmbeddedFiles { config: "{}", safetensors: &[] }).unwrap_err();
    mentions_all(&error, &["<embedded>", "config.json", "model_type"]);
    let config = dense().to_json().to_string();
    let error = Checkpoint::from_static(EmbeddedFiles { config: &config, safetensors: &[1, 2] }).unwrap_err();
    mentions_all(&error, &["<embedded>", "model.safetensors"]);
    assert_error!(error, Error::HeaderLength { .. });
}
