//! Memory is taken at the beginning, not by the token.
use std::sync::Arc;

use ernie_engine::{DraftOptions, Engine, EngineOptions, LoadOptions, Model, Request, SamplingParams, WeightDtype};

use crate::golden::Golden;

#[test]
fn a_decoding_step_allocates_nothing() {
    decode_without_allocating(0);
}

#[test]
fn nor_does_one_with_guesses() {
    decode_without_allocating(12);
}

/// `drafts`: most tokens of a guess.
fn decode_without_allocating(drafts: usize) {
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
        let options = EngineOptions { cache_bytes: 1 << 21, drafts: DraftOptions { max_tokens: drafts }, ..EngineOptions::default() };
        let mut engine = Engine::new(model, options).unwrap();
        let submit = |engine: &mut Engine| {
            for seed in 0..4u64 {
                let sampling = SamplingParams { temperature: 0.9, top_p: 0.95, seed, ..SamplingParams::default() };
                let mut base = if seed % 2 == 0 { SamplingParams::greedy() } else { sampling };
                if drafts > 0 && seed == 0 {
                    // A text that repeats itself, so that guesses are right; those of the others are wrong or none.
                    base.logit_bias = vec![(7, 100.0)];
                }
                let params = SamplingParams { max_tokens: if drafts > 0 { 100 } else { 48 }, ignore_eos: true, ..base };
                engine.submit(Request { prompt: vec![1, 5, 9 + seed as u32], params, logprobs: Some(0) }).unwrap();
            }
        };
        if drafts > 0 {
            // Steps are of different sizes, and the largest may come late.
            submit(&mut engine);
            while !engine.is_idle() {
                engine.step();
            }
        }
        submit(&mut engine);
        // The first steps find out how much is needed.
        for _ in 0..6 {
            engine.step();
        }
        let (mut steps, mut tokens) = (0, 0);
        let counted = allocation_counter::measure(|| {
            // Beyond the end of a block, which the prefix cache takes note of.
            while steps < 40 && engine.stats().running == 4 {
                tokens += engine.step().len();
                steps += 1;
            }
        });
        assert_eq!(counted.count_total, 0, "{name} {dtype:?}: {} bytes in {} pieces", counted.bytes_total, counted.count_total);
        if drafts == 0 {
            assert_eq!((steps, tokens), (40, 160));
        } else {
            assert!(steps > 5 && engine.draft_stats().right > 0, "{name}: {steps} steps, {:?}", engine.draft_stats());
        }
    }
}
