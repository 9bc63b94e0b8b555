//! Counts of experts and heads, and settings that change while requests run.
use std::sync::Arc;

use ernie_checkpoint::Checkpoint;
use ernie_engine::{
    DraftOptions, Engine, EngineEvent, EngineOptions, LoadOptions, Model, Request, RequestId, SamplingParams, Session, WeightDtype,
};

use crate::golden::Golden;

fn model(checkpoint: &Checkpoint) -> Arc<Model> {
    let options = LoadOptions { dtype: WeightDtype::F32, threads: 1, kv_dtype: None };
    Arc::new(Model::load_with(checkpoint, options).unwrap())
}

fn engine(name: &str, options: EngineOptions) -> Engine {
    let options = EngineOptions { cache_bytes: 1 << 21, drafts: DraftOptions { max_tokens: 0 }, prefix_cache: false, ..options };
    Engine::new(model(&Golden::named(name).checkpoint()), options).unwrap()
}

fn submit(engine: &mut Engine, first: u32, max_tokens: usize) -> RequestId {
    let params = SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::greedy() };
    engine.submit(Request { prompt: vec![first, 5, 9, 2, 7], params, logprobs: None }).unwrap()
}

#[test]
fn every_choice_of_an_expert_is_counted_once() {
    for (name, k) in [("moe_k2", 2), ("moe_k6", 6), ("moe_interval2", 0)] {
        let mut engine = engine(name, EngineOptions::default());
        let config = engine.model().config().clone();
        let moe = config.moe.as_ref().unwrap();
        assert!(k == 0 || moe.top_k == k);
        for first in 1..4 {
            submit(&mut engine, first, 10);
        }
        while !engine.is_idle() {
            engine.step();
        }
        // The last token is chosen and not computed.
        let tokens = 3 * (5 + 10 - 1);
        let layers: Vec<_> = engine.load().experts().collect();
        let expected: Vec<usize> = (0..config.num_hidden_layers).filter(|layer| config.is_moe_layer(*layer)).collect();
        assert_eq!(layers.iter().map(|load| load.layer).collect::<Vec<_>>(), expected, "{name}");
        for load in layers {
            assert_eq!((load.tokens, load.each.len()), (tokens, moe.num_experts), "{name}");
            assert_eq!(load.each.iter().sum::<u64>(), tokens * moe.top_k as u64, "{name}");
            assert!(load.each.iter().all(|count| *count <= tokens));
        }
        assert_eq!(engine.load().heads().count(), 0);
    }
}

#[test]
fn open_heads_are_those_that_have_a_part_in_the_answer() {
    let mut engine = engine("dense_gated", EngineOptions::default());
    let id = submit(&mut engine, 3, 12);
    while !engine.is_idle() {
        engine.step();
    }
    let config = engine.model().config().clone();
    let load = Arc::clone(engine.load());
    assert_eq!(load.experts().count(), 0);
    let layers: Vec<_> = load.heads().collect();
    assert_eq!(layers.len(), config.num_hidden_layers);
    for layer in &layers {
        assert_eq!((layer.tokens, layer.each.len()), (5 + 12 - 1, config.num_attention_heads));
        assert!(layer.each.iter().all(|open| *open <= layer.tokens));
    }
    // The model is made so that gates are neither all open nor all shut.
    let (open, all) = layers
        .iter()
        .fold((0, 0), |(open, all), layer| (open + layer.each.iter().sum::<u64>(), all + layer.tokens * layer.each.len() as u64));
    assert!(0 < open && open < all, "{open} of {all}, {id:?}");
}

#[test]
fn counting_is_for_engines_and_changes_no_token() {
    let checkpoint = Golden::named("moe_gated_local").checkpoint();
    let model = model(&checkpoint);
    let mut session = Session::new(&model, 40).unwrap();
    let mut logits = session.logits_for(&[3, 5, 9, 2, 7], 1).unwrap();
    let mut expected = Vec::new();
    for _ in 0..20 {
        let best = (0..logits.len()).reduce(|a, b| if logits[b] > logits[a] { b } else { a }).unwrap() as u32;
        expected.push(best);
        logits = session.logits_for(&[best], 1).unwrap();
    }
    let mut engine = engine("moe_gated_local", EngineOptions::default());
    submit(&mut engine, 3, 20);
    let mut tokens = Vec::new();
    while !engine.is_idle() {
        tokens.extend(
            engine.step().iter().filter_map(|event| if let EngineEvent::Token { token, .. } = event { Some(*token) } else { None }),
        );
    }
    assert_eq!(tokens, expected);
    assert!(engine.load().heads().count() > 0 && engine.load().experts().count() > 0);
}

/// Who got a token in a step.
fn step(engine: &mut Engine) -> Vec<RequestId> {
    let token = |event: &EngineEvent| if let EngineEvent::Token { id, .. } = event { Some(*id) } else { None };
    engine.step().iter().filter_map(token).collect()
}

#[test]
fn batching_changes_at_the_next_step_and_interrupts_nobody() {
    let mut engine = engine("dense_tied", EngineOptions { max_batch_size: 1, ..EngineOptions::default() });
    let ids: Vec<_> = (1..6).map(|first| submit(&mut engine, first, 30)).collect();
    assert_eq!(step(&mut engine), ids[..1]);
    engine.set_batching(3, true).unwrap();
    step(&mut engine);
    assert_eq!(engine.stats().running, 3);
    // Three go on although one would be the most; the others wait for the last of them.
    engine.set_batching(1, true).unwrap();
    assert_eq!(step(&mut engine), ids[..3]);
    // A batch that is filled only when it is empty.
    engine.set_batching(4, false).unwrap();
    assert_eq!(step(&mut engine), ids[..3]);
    // And one that is filled at once.
    engine.set_batching(4, true).unwrap();
    assert_eq!(step(&mut engine).len(), 4);
    assert!(engine.set_batching(0, true).is_err());
    let mut finished = 0;
    while !engine.is_idle() {
        finished += engine.step().iter().filter(|event| matches!(event, EngineEvent::Finished { output_tokens: 30, .. })).count();
    }
    assert_eq!(finished, 5);
}
