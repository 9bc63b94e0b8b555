//! Answers held to a constraint: the sampler's draw from what is left of the model's distribution, whatever runs beside them and however much is guessed.
use std::collections::HashMap;
use std::sync::Arc;

use ernie_engine::{
    Constraint, DraftOptions, Engine, EngineEvent, EngineOptions, FinishReason, LogProbs, Model, Request, Sampler, SamplingParams, Session,
    TokenSet, WeightDtype,
};

use crate::golden::Golden;

/// Tokens of one of a few classes in turn; the text may end after some and must after more.
#[derive(Clone, Debug)]
struct Turns {
    count: u32,
    classes: u32,
    may_end: u32,
    must_end: u32,
    ended: bool,
}

const VOCAB: u32 = 101;
const END: u32 = 2;

impl Turns {
    fn new(classes: u32, may_end: u32, must_end: u32) -> Self {
        Turns { count: 0, classes, may_end, must_end, ended: false }
    }

    fn fits(&self, token: u32) -> bool {
        token > END && token % self.classes == self.count % self.classes
    }
}

impl Constraint for Turns {
    fn allow(&mut self, allowed: &mut TokenSet) -> Result<(), String> {
        if self.classes == 0 {
            return Err("nothing was ever possible".to_owned());
        }
        (0..VOCAB).filter(|token| self.fits(*token)).for_each(|token| allowed.insert(token));
        if self.count >= self.may_end {
            allowed.insert(END);
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        assert!(self.fits(token) || token == END && self.count >= self.may_end, "token {token} at {} was not allowed", self.count);
        self.count += 1;
        self.ended |= token == END;
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.ended || self.count >= self.must_end
    }
}

/// Token by token with a session, the mask put on by hand.
fn naive(model: &Model, request: &Request, mut constraint: Turns) -> Vec<(u32, Option<u32>)> {
    let mut session = Session::new(model, 200).unwrap();
    let mut sampler = Sampler::new(&request.params).unwrap();
    sampler.observe_prompt(&request.prompt);
    let mut logits = session.prefill(&request.prompt).unwrap().to_vec();
    let mut answer = Vec::new();
    while answer.len() < request.params.max_tokens {
        let mut allowed = TokenSet::default();
        constraint.allow(&mut allowed).unwrap();
        let masked = |(id, logit): (usize, &f32)| if allowed.contains(id as u32) { *logit } else { f32::NEG_INFINITY };
        let masked: Vec<f32> = logits.iter().enumerate().map(masked).collect();
        let token = sampler.sample(&masked).unwrap();
        answer.push((token, Some(LogProbs::of(&logits).of_token(token).to_bits())));
        constraint.accept(token).unwrap();
        if constraint.is_complete() {
            break;
        }
        logits = session.decode(token).unwrap().to_vec();
    }
    answer
}

#[test]
fn answers_are_those_of_a_masked_sampler_in_any_company() {
    for name in ["moe_k2", "dense_local", "moe_mtp"] {
        let golden = Golden::named(name);
        let model = Arc::new(golden.model(WeightDtype::F32));
        assert_eq!(model.config().vocab_size, VOCAB as usize, "{name}");
        let params = |seed: u64| SamplingParams {
            temperature: if seed.is_multiple_of(3) { 0.0 } else { 1.0 },
            top_k: if seed % 3 == 2 { 5 } else { 0 },
            repetition_penalty: if seed.is_multiple_of(2) { 1.0 } else { 1.2 },
            seed,
            max_tokens: 30,
            ..SamplingParams::default()
        };
        let request = |seed: u64| Request { prompt: golden.prompt.clone(), params: params(seed), logprobs: Some(0) };
        let constraint = |seed: u64| Turns::new(2 + seed as u32 % 3, 6, [12, 100][seed as usize % 2]);
        for (drafts, cache_bytes) in [(0, 1 << 20), (6, 1 << 20), (6, 1 << 17)] {
            let drafts = DraftOptions { max_tokens: drafts };
            let options = EngineOptions { cache_bytes, max_batch_size: 8, token_budget: 64, drafts, ..EngineOptions::default() };
            let mut engine = Engine::new(Arc::clone(&model), options).unwrap();
            let mut seeds = HashMap::new();
            for seed in 0..9 {
                seeds.insert(engine.submit_constrained(request(seed), Box::new(constraint(seed))).unwrap(), (seed, true));
                seeds.insert(engine.submit(request(seed)).unwrap(), (seed, false));
            }
            let (mut answers, mut reasons) = (HashMap::<_, Vec<_>>::new(), HashMap::new());
            while !engine.is_idle() {
                for event in engine.step() {
                    match *event {
                        EngineEvent::Token { id, token, logprob, .. } => {
                            answers.entry(seeds[&id]).or_default().push((token, logprob.map(f32::to_bits)));
                        }
                        EngineEvent::Finished { id, reason, .. } => drop(reasons.insert(seeds[&id], reason)),
                        ref other => panic!("{other:?}"),
                    }
                }
            }
            for seed in 0..9 {
                let expected = naive(&model, &request(seed), constraint(seed));
                assert_eq!(answers[&(seed, true)], expected, "{name}, seed {seed}, {drafts:?}");
                let complete = expected.len() < 30;
                assert_eq!(reasons[&(seed, true)] == FinishReason::Stop, complete, "{name}, seed {seed}");
                let mut alone = Engine::new(Arc::clone(&model), options).unwrap();
                alone.submit(request(seed)).unwrap();
                let mut plain = Vec::new();
                while !alone.is_idle() {
                    let tokens = alone.step().iter().filter_map(|event| match *event {
                        EngineEvent::Token { token, logprob, .. } => Some((token, logprob.map(f32::to_bits))),
                        _ => None,
                    });
                    plain.extend(tokens);
                }
                assert_eq!(answers[&(seed, false)], plain, "{name}, seed {seed}: one beside constrained ones");
            }
        }
    }
}

#[test]
fn a_constraint_that_fails_ends_its_request_only() {
    let golden = Golden::named("moe_k2");
    let mut engine =
        Engine::new(Arc::new(golden.model(WeightDtype::F32)), EngineOptions { cache_bytes: 1 << 20, ..EngineOptions::default() }).unwrap();
    let params = SamplingParams { max_tokens: 4, ignore_eos: true, ..SamplingParams::greedy() };
    let request = Request { prompt: golden.prompt.clone(), params, logprobs: None };
    let failing = engine.submit_constrained(request.clone(), Box::new(Turns::new(0, 0, 9))).unwrap();
    // Of more classes than tokens the next has none.
    let empty = engine.submit_constrained(request.clone(), Box::new(Turns { count: 500, ..Turns::new(1000, 900, 900) })).unwrap();
    let good = engine.submit(request).unwrap();
    let (mut stuck, mut finished) = (Vec::new(), Vec::new());
    while !engine.is_idle() {
        for event in engine.step() {
            match event {
                EngineEvent::Stuck { id, reason } => stuck.push((*id, reason.clone())),
                EngineEvent::Finished { id, .. } => finished.push(*id),
                _ => {}
            }
        }
    }
    assert_eq!(stuck, [(failing, "nothing was ever possible".to_owned()), (empty, "no token may follow".to_owned())]);
    assert_eq!(finished, [good]);
}
