//! The model that is compiled into the program, from its folder; loaded once.
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use ernie_checkpoint::{Checkpoint, Tokenizer};
use ernie_engine::{Generation, LoadOptions, Model, SamplingParams};

pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano")
}

/// The model with one thread: tests run beside each other.
pub fn model() -> Arc<Model> {
    static MODEL: LazyLock<Arc<Model>> = LazyLock::new(|| {
        let checkpoint = Checkpoint::open(&folder()).unwrap();
        Arc::new(Model::load_with(&checkpoint, LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap())
    });
    Arc::clone(&MODEL)
}

pub fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| Arc::new(Tokenizer::from_dir(folder()).unwrap()));
    Arc::clone(&TOKENIZER)
}

/// What `ernie generate` does with a prompt.
pub fn generate(prompt: &[u32], params: &SamplingParams) -> Generation {
    let (model, tokenizer) = (model(), tokenizer());
    ernie_engine::generate(&model, prompt, params, tokenizer.decode_stream(true), |_| ControlFlow::Continue(())).unwrap()
}
