//! tokenizer.json: an error, or a tokenizer that keeps what it promises.
#![no_main]

use std::panic::{catch_unwind, set_hook};
use std::sync::Mutex;

use ernie_checkpoint::Tokenizer;
use libfuzzer_sys::fuzz_target;

static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

fuzz_target!(
    init: {
        // libFuzzer's own hook ends the process in every panic. Those of the tokenizer library are caught by ours: only what gets out counts.
        set_hook(Box::new(|info| *LAST_PANIC.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = info.to_string()));
    },
    |data: &[u8]| {
        let escaped = catch_unwind(|| {
            if let Ok(tokenizer) = Tokenizer::from_tokenizer_json(data, "tokenizer.json") {
                ernie_fuzz::use_tokenizer(&tokenizer, &data[..data.len().min(200)]);
            }
        });
        if escaped.is_err() {
            eprintln!("{}", LAST_PANIC.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
            std::process::abort();
        }
    }
);
