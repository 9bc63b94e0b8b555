//! config.json: an error, or a config that is written as it is read and that can be counted by.
#![no_main]

use std::path::Path;

use ernie_checkpoint::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(config) = Config::from_json(text, Path::new("config.json")) else { return };
    let written = config.to_json().to_string();
    let again = Config::from_json(&written, Path::new("again.json")).expect("what we write can be read");
    assert_eq!(again.to_json().to_string(), written);
    config.check().expect("what was read passes the check");
    let _ = (config.parameter_counts(), config.kv_bytes_per_token(4));
    let _ = (0..config.num_hidden_layers).filter(|&layer| config.is_moe_layer(layer)).count();
});
