//! Memory is taken at the beginning, not by the token.
use std::sync::Arc;

use ernie_engine::{DraftOptions, Engine, EngineOptions, LoadOptions, Model, Request, SamplingParams, WeightDtype};

use crate::golden::Golden;

#[test]
fn a_decoding_step_allocates_nothing() {
    let models = [
        ("dense_untied_gqa", WeightDtype::Int8),
        ("moe_k2", WeightDtype::Int8),
        ("dense_bias_mqa", WeightDtype::F32),
        ("dense_local", WeightDtype::Int8),
        ("moe_gated_local", WeightDtype::Int8),
        ("dense_paragraphs", WeightDtype::Int8),
    ];
    for (name, dtype) in models {
        let options = LoadOptions { dtype, threads: 1, kv_dtype: None };
        let model = Arc::new(Model::load_with(&Golden::named(name).checkpoint(), options).unwrap());
        let options = EngineOptions { cache_bytes: 1 << 21, drafts: DraftOptions { max_tokens: 0 }, ..EngineOptions::default() };
        let mut engine = Engine::new(model, options).unwrap();
        for seed in 0..4u64 {
            let sampling = SamplingParams { temperature: 0.9, top_p: 0.95, seed, ..SamplingParams::default() };
            let base = if seed % 2 == 0 { SamplingParams::greedy() } else { sampling };
            let params = SamplingParams { max_tokens: 48, ignore_eos: true, ..base };
            engine.submit(Request { prompt: vec![1, 5, 9 + seed as u32], params, logprobs: Some(0) }).unwrap();
        }
        // The first steps find out how much is needed.
        for _ in 0..6 {
            engine.step();
        }
        let counted = allocation_counter::measure(|| {
            // Beyond the end of a block, which the prefix cache takes note of.
            for _ in 0..40 {
                assert_eq!(engine.step().len(), 4);
            }
        });
        assert_eq!(counted.count_total, 0, "{name} {dtype:?}: {} bytes in {} pieces", counted.bytes_total, counted.count_total);
    }
}
