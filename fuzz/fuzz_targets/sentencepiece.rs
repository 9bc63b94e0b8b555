//! tokenizer.model: an error, or a tokenizer that keeps what it promises.
#![no_main]

use ernie_checkpoint::Tokenizer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(tokenizer) = Tokenizer::from_sentencepiece(data, "tokenizer.model") {
        ernie_fuzz::use_tokenizer(&tokenizer, &data[..data.len().min(200)]);
    }
});
