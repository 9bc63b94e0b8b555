//! Memory of keys and values: it grows with a text where layers see all of it, and stays where they see a window.
use std::sync::Arc;

use ernie_checkpoint::SaveDtype;
use ernie_engine::{
    DraftOptions, Engine, EngineOptions, KvDtype, LoadOptions, Model, PREFILL_CHUNK, Request, SamplingParams, Session, WeightDtype,
};
use ernie_kernels::paged::{BLOCK, KvBlocks};

use crate::golden::{Golden, windows};

const TEXT: usize = 3000;
const ANSWER: usize = 70;
const BUDGET: usize = 64;
const WINDOW: usize = 40;

/// A model whose layers see a window of so many positions, 0 for all; and the bytes of a block in one layer.
fn model(windows_of_layers: &[usize]) -> (Model, usize) {
    let checkpoint = Golden::named("dense_untied_gqa").copy(SaveDtype::F32, |config| {
        config.max_position_embeddings = 4096;
        config.mechanisms = windows(windows_of_layers);
    });
    let options = LoadOptions { dtype: WeightDtype::F32, threads: 1, kv_dtype: Some(KvDtype::F32) };
    let model = Model::load_with(&checkpoint, options).unwrap();
    let config = model.config();
    let per_block = KvBlocks::bytes_per_block(1, config.num_key_value_heads, config.head_dim, KvDtype::F32);
    (model, per_block)
}

/// Computed tokens and bytes in use after each step but the last, of a text and its answer under layers that see a window of so many positions, 0 for
/// all; and the bytes of a block in one layer.
fn bytes_after_each_step(windows_of_layers: &[usize]) -> (Vec<(usize, usize)>, usize) {
    let (model, per_block) = model(windows_of_layers);
    let options =
        EngineOptions { cache_bytes: 1 << 23, token_budget: BUDGET, drafts: DraftOptions { max_tokens: 0 }, ..EngineOptions::default() };
    let mut engine = Engine::new(Arc::new(model), options).unwrap();
    assert_eq!(engine.kv_bytes_in_use(), 0);
    let params = SamplingParams { max_tokens: ANSWER, ignore_eos: true, ..SamplingParams::greedy() };
    let prompt = (0..TEXT as u32).map(|i| 1 + i * 31 % 97).collect();
    engine.submit(Request { prompt, params, logprobs: None }).unwrap();
    let (mut found, mut computed) = (Vec::new(), 0);
    loop {
        engine.step();
        computed += if computed < TEXT { BUDGET.min(TEXT - computed) } else { 1 };
        if engine.is_idle() {
            break;
        }
        found.push((computed, engine.kv_bytes_in_use()));
    }
    // The last token is chosen and not computed; what is kept for texts to come is in nobody's use.
    assert_eq!(computed, TEXT + ANSWER - 1);
    assert!(engine.kv_bytes_in_use() == 0 && engine.stats().cached_blocks > 0);
    (found, per_block)
}

/// Most blocks that hold what the tokens of a step of so many see in a window.
fn most(tokens: usize) -> usize {
    (WINDOW - 1 + tokens).div_ceil(BLOCK) + 1
}

#[test]
fn layers_that_see_everything_take_a_block_for_every_32_positions() {
    let (found, per_block) = bytes_after_each_step(&[0, 0, 0]);
    assert_eq!(found.len(), TEXT.div_ceil(BUDGET) + ANSWER - 2);
    for (computed, bytes) in found {
        assert_eq!(bytes, 3 * per_block * computed.div_ceil(BLOCK), "after {computed} tokens");
    }
}

#[test]
fn layers_that_see_a_window_take_no_more_than_it_needs() {
    let (found, per_block) = bytes_after_each_step(&[WINDOW; 3]);
    for &(computed, bytes) in &found {
        let blocks = bytes / (3 * per_block);
        assert!((1..=most(BUDGET)).contains(&blocks) && bytes % (3 * per_block) == 0, "{bytes} bytes after {computed} tokens");
        // A chunk's blocks are given back with the next step.
        assert!(computed < TEXT + 2 || blocks <= most(1), "{blocks} blocks after {computed} tokens");
    }
    // One layer in three that sees everything takes its part, and the others theirs.
    let (mixed, per_block) = bytes_after_each_step(&[WINDOW, WINDOW, 0]);
    for ((computed, bytes), (_, windowed)) in mixed.into_iter().zip(found) {
        assert_eq!(bytes, per_block * computed.div_ceil(BLOCK) + windowed / 3 * 2, "after {computed} tokens");
    }
}

/// A session takes, for the layers with a window, what a step needs and what the last prompt's end sees; for the others all.
#[test]
fn a_session_takes_no_more_for_windows_than_a_step_and_the_way_back() {
    let prompt: Vec<u32> = (0..TEXT as u32).map(|i| 1 + i * 31 % 97).collect();
    for (windows, full) in [([WINDOW; 3], 0), ([WINDOW, WINDOW, 0], 1), ([0; 3], 3)] {
        let (model, per_block) = model(&windows);
        let mut session = Session::new(&model, 4096).unwrap();
        session.keep_common_prefix(&prompt);
        assert_eq!(session.kv_bytes_in_use(), 0);
        let of_windows = |session: &Session<'_>| session.kv_bytes_in_use() / per_block - full * session.len().div_ceil(BLOCK);
        // It keeps a block more than the windows need.
        let (a_chunk, a_token, kept) = (most(PREFILL_CHUNK + BLOCK), most(1 + BLOCK), most(BLOCK));
        for chunk in prompt.chunks(PREFILL_CHUNK) {
            session.prefill(chunk).unwrap();
            assert!(of_windows(&session) <= (3 - full) * a_chunk, "after {} tokens", session.len());
        }
        for _ in 0..200 {
            session.decode(7).unwrap();
            assert!(of_windows(&session) <= (3 - full) * (a_token + kept), "after {} tokens", session.len());
        }
        assert_eq!(of_windows(&session) > 0, full < 3);
        session.truncate(0);
        assert_eq!(session.kv_bytes_in_use(), 0);
    }
}
