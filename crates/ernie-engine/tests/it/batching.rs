//! Many requests together: the same bits as alone.
use std::collections::HashMap;
use std::sync::Arc;

use ernie_engine::{
    DraftOptions, Engine, EngineEvent, EngineOptions, Error, FinishReason, KvDtype, LoadOptions, Model, Request, RequestId, SamplingParams,
    WeightDtype,
};

use crate::golden::{Golden, int4_checkpoint, windows_checkpoint};

/// Reproducible numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }
}

/// Tokens with the bits of their log-probabilities.
type Answer = Vec<(u32, u32)>;

const OPTIONS: EngineOptions = EngineOptions {
    cache_bytes: 1 << 20,
    max_batch_size: 8,
    token_budget: 64,
    dynamic_batching: true,
    prefix_cache: true,
    max_len: 0,
    drafts: DraftOptions { max_tokens: 6 },
    draft_batch: 16,
};

fn model(name: &str, dtype: WeightDtype, kv_dtype: KvDtype, threads: usize) -> Arc<Model> {
    let options = LoadOptions { dtype, threads, kv_dtype: Some(kv_dtype) };
    let checkpoint = match name {
        "experts of 4 bits" => int4_checkpoint(32),
        "windows" => windows_checkpoint("dense_untied_gqa", &[40, 40, 0]),
        "windows and experts" => windows_checkpoint("moe_k2", &[33, 0, 33]),
        "windows only" => windows_checkpoint("dense_bias_mqa", &[7, 7]),
        _ => Golden::named(name).checkpoint(),
    };
    Arc::new(Model::load_with(&checkpoint, options).unwrap())
}

fn record(answers: &mut HashMap<RequestId, Answer>, finished: &mut HashMap<RequestId, FinishReason>, events: &[EngineEvent]) {
    for event in events {
        match *event {
            EngineEvent::Token { id, token, logprob, .. } => {
                assert!(!finished.contains_key(&id), "a token after the end");
                answers.entry(id).or_default().push((token, logprob.map_or(0, f32::to_bits)));
            }
            EngineEvent::Finished { id, reason, output_tokens, .. } => {
                assert_eq!(output_tokens, answers[&id].len());
                finished.insert(id, reason);
            }
            EngineEvent::Failed { .. } | EngineEvent::Stuck { .. } => panic!("{event:?}"),
        }
    }
}

/// A request by itself, step by step, without cache or guesses, on one thread.
fn alone(model: &Arc<Model>, request: &Request) -> Answer {
    let options = EngineOptions { prefix_cache: false, drafts: DraftOptions { max_tokens: 0 }, token_budget: 1000, ..OPTIONS };
    let mut engine = Engine::new(Arc::clone(model), options).unwrap();
    let id = engine.submit(request.clone()).unwrap();
    let (mut answers, mut finished) = (HashMap::new(), HashMap::new());
    while !engine.is_idle() {
        record(&mut answers, &mut finished, engine.step());
    }
    answers.remove(&id).unwrap()
}

fn request(random: &mut Random, common: &[u32]) -> Request {
    let shared = random.below(common.len());
    let mut prompt = common[..shared].to_vec();
    prompt.extend((0..1 + random.below(20)).map(|_| 1 + random.below(90) as u32));
    if random.below(3) == 0 {
        // A text that repeats itself, for the guesses.
        let again = prompt.clone();
        prompt.extend(again);
    }
    let base =
        SamplingParams { max_tokens: 1 + random.below(16), ignore_eos: true, seed: random.below(1000) as u64, ..SamplingParams::default() };
    let params = match random.below(4) {
        0 | 1 => SamplingParams { temperature: 0.0, ..base },
        2 => SamplingParams { temperature: 0.8, top_p: 0.9, repetition_penalty: 1.2, ..base },
        _ => SamplingParams { temperature: 1.3, top_k: 20, ..base },
    };
    Request { prompt, params, logprobs: Some(0) }
}

/// 600 random schedules: arrivals, batch sizes, budgets, caches so small that requests are preempted, shared beginnings, guesses, cancels, one and two
/// threads; dense and routed models, one with a prediction block, every form of weights and cache.
#[test]
fn every_request_gets_the_same_bits_as_alone() {
    let forms = [
        ("dense_untied_gqa", WeightDtype::F32, KvDtype::F32),
        ("dense_bias_mqa", WeightDtype::Int8, KvDtype::Bf16),
        ("moe_k2", WeightDtype::Int8, KvDtype::Int8),
        ("moe_bias_mqa", WeightDtype::Int8, KvDtype::F32),
        ("moe_k6", WeightDtype::Bf16, KvDtype::Bf16),
        ("moe_odd", WeightDtype::Int8, KvDtype::Bf16),
        ("moe_mtp", WeightDtype::F32, KvDtype::F32),
        ("experts of 4 bits", WeightDtype::Auto, KvDtype::Bf16),
        ("windows", WeightDtype::Int8, KvDtype::Bf16),
        ("windows and experts", WeightDtype::F32, KvDtype::Int8),
        ("windows only", WeightDtype::F32, KvDtype::F32),
        ("dense_gated", WeightDtype::Int8, KvDtype::Bf16),
        ("moe_gated_local", WeightDtype::F32, KvDtype::F32),
        ("dense_paragraphs", WeightDtype::Int8, KvDtype::Bf16),
        ("moe_gated_paragraphs", WeightDtype::F32, KvDtype::F32),
    ];
    let (mut preempted, mut found, mut right) = (0, 0, 0);
    for (form, (name, dtype, kv_dtype)) in forms.into_iter().enumerate() {
        let models = [model(name, dtype, kv_dtype, 1), model(name, dtype, kv_dtype, 2)];
        let most = models[0].config().max_position_embeddings;
        for schedule in 0..40 {
            let random = &mut Random((form * 1000 + schedule) as u64);
            let common: Vec<u32> = (0..40).map(|_| 1 + random.below(90) as u32).collect();
            let per_block = {
                let config = models[0].config();
                let (layers, heads, d) =
                    (config.num_hidden_layers + usize::from(models[0].predicts()), config.num_key_value_heads, config.head_dim);
                ernie_kernels::paged::KvBlocks::bytes_per_block(layers, heads, d, kv_dtype)
            };
            // A window of 40 positions takes four blocks at least, summaries of paragraphs a part of another.
            let fewest = match name {
                _ if name.contains("paragraphs") => 5,
                _ if name.starts_with("windows") || name.contains("gated") => 4,
                _ => 3,
            };
            let options = EngineOptions {
                cache_bytes: per_block * (fewest + random.below(5)),
                max_batch_size: 1 + random.below(6),
                token_budget: 1 + random.below(50),
                dynamic_batching: random.below(6) > 0,
                prefix_cache: random.below(4) > 0,
                max_len: 0,
                drafts: DraftOptions { max_tokens: random.below(8) },
                draft_batch: 1 + random.below(40),
            };
            let mut engine = Engine::new(Arc::clone(&models[random.below(2)]), options).unwrap();
            let (mut answers, mut finished, mut requests) = (HashMap::new(), HashMap::new(), HashMap::new());
            let count = 3 + random.below(6);
            let mut submitted = 0;
            while submitted < count || !engine.is_idle() {
                while submitted < count && random.below(3) > 0 {
                    let request = request(random, &common);
                    submitted += 1;
                    if request.prompt.len() + request.params.max_tokens > most.min(engine.max_len()) {
                        continue;
                    }
                    let id = engine.submit(request.clone()).unwrap();
                    requests.insert(id, request);
                }
                record(&mut answers, &mut finished, engine.step());
                if random.below(30) == 0
                    && let Some(&id) = requests.keys().max()
                    && engine.cancel(id)
                {
                    requests.remove(&id);
                }
            }
            for (id, request) in &requests {
                assert_eq!(answers[id], alone(&models[0], request), "{name} {dtype:?} {kv_dtype:?}, schedule {schedule}, {request:?}");
                assert_eq!(finished[id], FinishReason::Length);
            }
            let stats = engine.stats();
            assert_eq!(stats.free_blocks + stats.cached_blocks, stats.blocks);
            assert_eq!(stats.free_window_blocks + stats.cached_window_blocks, stats.window_blocks);
            preempted += stats.preemptions;
            found += stats.cached_tokens;
            right += engine.draft_stats().right;
        }
    }
    assert!(preempted > 20 && found > 500 && right > 50, "{preempted} preemptions, {found} cached tokens, {right} right guesses");
}

#[test]
fn greedy_tokens_equal_those_of_transformers_all_at_once() {
    let golden = Golden::named("moe_k2");
    let mut engine = Engine::new(Arc::new(golden.model(WeightDtype::F32)), OPTIONS).unwrap();
    let params = SamplingParams { max_tokens: golden.greedy.len(), ..SamplingParams::greedy() };
    for _ in 0..5 {
        engine.submit(Request { prompt: golden.prompt.clone(), params: params.clone(), logprobs: None }).unwrap();
    }
    let (mut answers, mut finished) = (HashMap::new(), HashMap::new());
    while !engine.is_idle() {
        record(&mut answers, &mut finished, engine.step());
    }
    assert_eq!(answers.len(), 5);
    for answer in answers.values() {
        assert_eq!(answer.iter().map(|(token, _)| *token).collect::<Vec<_>>(), golden.greedy);
    }
    assert!(finished.values().all(|reason| *reason == FinishReason::Length));
}

#[test]
fn logprobs_are_those_of_the_model() {
    let golden = Golden::named("dense_tied");
    let model = Arc::new(golden.model(WeightDtype::F32));
    let mut engine = Engine::new(Arc::clone(&model), OPTIONS).unwrap();
    let params = SamplingParams { max_tokens: 5, ignore_eos: true, temperature: 0.7, ..SamplingParams::default() };
    engine.submit(Request { prompt: golden.prompt.clone(), params, logprobs: Some(3) }).unwrap();
    let mut tokens = golden.prompt.clone();
    let mut session = ernie_engine::Session::new(&model, 60).unwrap();
    let mut logits = session.prefill(&tokens).unwrap().to_vec();
    while !engine.is_idle() {
        for event in engine.step() {
            let EngineEvent::Token { token, logprob, ref top, .. } = *event else { continue };
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
            let expected = f64::from(logits[token as usize] - max) - sum.ln();
            assert!((f64::from(logprob.unwrap()) - expected).abs() < 1e-5);
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
            assert_eq!(top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), order[..3]);
            assert!(top.iter().all(|(id, score)| *id != token || Some(*score) == logprob));
            tokens.push(token);
            logits = session.decode(token).unwrap().to_vec();
        }
    }
}

#[test]
fn what_cannot_be_run_is_refused_and_the_rest_goes_on() {
    let golden = Golden::named("dense_tied");
    let model = Arc::new(golden.model(WeightDtype::F32));
    let mut engine = Engine::new(Arc::clone(&model), OPTIONS).unwrap();
    let params = SamplingParams { max_tokens: 3, ..SamplingParams::greedy() };
    let request = |prompt: Vec<u32>| Request { prompt, params: params.clone(), logprobs: None };
    assert!(matches!(engine.submit(request(vec![])), Err(Error::EmptyPrompt)));
    assert!(matches!(engine.submit(request(vec![1, 1_000_000])), Err(Error::UnknownToken { position: 1, .. })));
    assert!(matches!(engine.submit(request(vec![1; 100_000])), Err(Error::ContextLength { .. })));
    let bad = Request { params: SamplingParams { top_p: 0.0, ..params.clone() }, ..request(vec![1]) };
    assert!(matches!(engine.submit(bad), Err(Error::Parameter { field: "top_p", .. })));
    let bad = Request { params: SamplingParams { logit_bias: vec![(1_000_000, 1.0)], ..params.clone() }, ..request(vec![1]) };
    assert!(matches!(engine.submit(bad), Err(Error::Parameter { field: "logit_bias", .. })));
    assert!(engine.is_idle() && engine.step().is_empty());
    let id = engine.submit(request(golden.prompt.clone())).unwrap();
    let gone = engine.submit(request(golden.prompt.clone())).unwrap();
    assert!(engine.cancel(gone) && !engine.cancel(gone));
    let (mut answers, mut finished) = (HashMap::new(), HashMap::new());
    while !engine.is_idle() {
        record(&mut answers, &mut finished, engine.step());
    }
    assert_eq!(answers.keys().collect::<Vec<_>>(), [&id]);
    let options = EngineOptions { cache_bytes: 10, ..OPTIONS };
    assert!(matches!(Engine::new(Arc::clone(&model), options), Err(Error::Parameter { field: "cache_bytes", .. })));
    let options = EngineOptions { max_len: 1 << 30, ..OPTIONS };
    assert!(matches!(Engine::new(model, options), Err(Error::ContextLength { .. })));
}
