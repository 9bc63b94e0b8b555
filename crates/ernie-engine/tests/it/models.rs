//! The engine against transformers, and against itself under other cuts of the same tokens.
use std::ops::ControlFlow;

use ernie_checkpoint::{Checkpoint, Config, SaveDtype, SaveOptions, TensorGroup, save};
use ernie_engine::{DraftOptions, Error, FinishReason, Model, SamplingParams, Session, WeightDtype, generate, generate_in};

use crate::golden::{Golden, int4_checkpoint, max_difference};

fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens, ..SamplingParams::greedy() }
}

fn all_logits(model: &Model, ids: &[u32]) -> Vec<f32> {
    Session::new(model, ids.len()).unwrap().logits_for(ids, ids.len()).unwrap()
}

#[test]
fn logits_equal_those_of_transformers() {
    for golden in Golden::all() {
        for dtype in [WeightDtype::Auto, WeightDtype::F32] {
            let model = golden.model(dtype);
            let worst = golden.ids.iter().zip(&golden.logits).map(|(ids, expected)| max_difference(&all_logits(&model, ids), expected));
            let worst = worst.fold(0.0, f32::max);
            println!("{:<24} {dtype:?}: logits max |Δ| {worst:.2e}", golden.name);
            assert!(worst <= 1e-4, "{}: logits differ by {worst}", golden.name);
        }
    }
}

#[test]
fn greedy_tokens_equal_those_of_transformers() {
    for golden in Golden::all() {
        let model = golden.model(WeightDtype::Auto);
        let generation = generate(&model, &golden.prompt, &greedy(golden.greedy.len()), (), |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(generation.tokens, golden.greedy, "{}", golden.name);
        assert_eq!(generation.finish_reason, FinishReason::Length);
        assert_eq!(golden.greedy.len(), 24);
    }
}

#[test]
fn logits_of_the_token_after_the_next_equal_the_references() {
    let golden = Golden::named("moe_mtp");
    let model = golden.model(WeightDtype::Auto);
    assert!(model.predicts() && golden.mtp_logits.len() == golden.ids.len());
    for (ids, expected) in golden.ids.iter().zip(&golden.mtp_logits) {
        // The reference stops one token earlier: its last row has no target.
        let logits = Session::new(&model, ids.len()).unwrap().logits_ahead(ids).unwrap().unwrap();
        let worst = max_difference(&logits[..expected.len()], expected);
        assert!(worst <= 1e-4, "logits differ by {worst}");
    }
    let other = Golden::named("dense_tied").model(WeightDtype::Auto);
    assert_eq!(Session::new(&other, 8).unwrap().logits_ahead(&[1, 2, 3]).unwrap(), None);
}

#[test]
fn the_head_turns_final_states_into_the_references_logits() {
    let golden = Golden::named("dense_tied");
    let (model, checkpoint) = (golden.model(WeightDtype::F32), golden.checkpoint());
    let hidden = model.config().hidden_size;
    let embed_vh = checkpoint.tensor("model.embed_tokens.weight").unwrap().to_f32().unwrap();
    for (ids, expected) in golden.ids.iter().zip(&golden.logits) {
        let mut session = Session::new(&model, ids.len()).unwrap();
        // In two parts: a state depends on what came before.
        let mut states_th = session.states_for(&ids[..3]).unwrap();
        states_th.extend(session.states_for(&ids[3..]).unwrap());
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
        let logits: Vec<f32> =
            states_th.chunks_exact(hidden).flat_map(|x_h| embed_vh.chunks_exact(hidden).map(move |row_h| dot(x_h, row_h))).collect();
        let worst = max_difference(&logits, expected);
        assert!(logits.len() == expected.len() && worst <= 1e-4, "logits differ by {worst}");
        assert!(matches!(session.states_for(&[1]), Err(Error::ContextLength { .. })));
    }
}

#[test]
fn no_cut_of_the_tokens_changes_a_bit() {
    for golden in Golden::all() {
        let model = golden.model(WeightDtype::Auto);
        let (ids, vocab) = (&golden.ids[0], model.config().vocab_size);
        let whole = all_logits(&model, ids);
        for chunk in [1, 2, 3, 7, 16] {
            let mut session = Session::new(&model, ids.len()).unwrap();
            let mut pieces = Vec::new();
            for piece in ids.chunks(chunk) {
                pieces.extend(session.logits_for(piece, piece.len()).unwrap());
            }
            assert!(pieces == whole, "{} in chunks of {chunk}", golden.name);
        }
        let mut session = Session::new(&model, ids.len()).unwrap();
        for (position, &id) in ids.iter().enumerate() {
            assert!(session.decode(id).unwrap() == &whole[position * vocab..(position + 1) * vocab], "{} at {position}", golden.name);
        }
    }
}

/// Longer than a prefill chunk and than the first capacity of the cache, so both boundaries are crossed, at different places.
#[test]
fn long_prompts_cross_chunks_and_cache_growth_without_changing_a_bit() {
    for name in ["dense_untied_gqa", "moe_k2", "dense_local", "dense_paragraphs", "moe_gated_paragraphs"] {
        let golden = Golden::named(name);
        let model = Model::load(&golden.copy(SaveDtype::F32, |config| config.max_position_embeddings = 1024)).unwrap();
        let ids: Vec<u32> = (0..700).map(|i| 1 + i * 31 % 90).collect();
        let last = 40;
        let mut session = Session::new(&model, ids.len()).unwrap();
        let whole = session.logits_for(&ids, last).unwrap();
        let mut session = Session::new(&model, ids.len()).unwrap();
        session.prefill(&ids[..100]).unwrap();
        session.prefill(&ids[100..ids.len() - last]).unwrap();
        let mut pieces = Vec::new();
        for &id in &ids[ids.len() - last..] {
            pieces.extend_from_slice(session.decode(id).unwrap());
        }
        assert!(whole == pieces, "{name}");
    }
}

#[test]
fn a_kept_prefix_changes_nothing() {
    let golden = Golden::named("moe_k6");
    let model = golden.model(WeightDtype::Auto);
    let mut session = Session::new(&model, 64).unwrap();
    let params = greedy(8);
    let first = generate_in(&mut session, &golden.prompt, &params, (), |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(first.timings.cached_tokens, 0);
    // The next turn: prompt, answer, and something new.
    let mut prompt = golden.prompt.clone();
    prompt.extend(&first.tokens);
    prompt.extend([5, 9]);
    let fresh = generate(&model, &prompt, &params, (), |_| ControlFlow::Continue(())).unwrap();
    let kept = generate_in(&mut session, &prompt, &params, (), |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(kept.tokens, fresh.tokens);
    // The last token of an answer was chosen but never run.
    assert_eq!(kept.timings.cached_tokens, golden.prompt.len() + first.tokens.len() - 1);
    // The same prompt again, of which all but the last token is known; then one that differs early.
    let again = generate_in(&mut session, &prompt, &params, (), |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((again.tokens, again.timings.cached_tokens), (fresh.tokens, prompt.len() - 1));
    let back = generate_in(&mut session, &golden.prompt, &params, (), |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(back.tokens, first.tokens);
}

/// Summaries of paragraphs that are no longer part of the text are made anew.
#[test]
fn a_session_goes_back_into_an_earlier_paragraph() {
    let golden = Golden::named("dense_paragraphs");
    let model = golden.model(WeightDtype::Auto);
    let first: Vec<u32> = (0..200).map(|i| 25 + i * 31 % 70).collect();
    for (back, ending) in [(190, 150), (100, 101), (60, 75), (33, 33)] {
        // The second text goes another way from `back` on, and its paragraphs end elsewhere.
        let mut second = first[..back].to_vec();
        second.extend((back as u32..200).map(|i| if i == ending { 12 } else { 26 + i * 17 % 70 }));
        let mut session = Session::new(&model, 256).unwrap();
        session.prefill(&first).unwrap();
        assert_eq!(session.keep_common_prefix(&second), back);
        let kept = session.prefill(&second[back..]).unwrap().to_vec();
        assert_eq!(kept, Session::new(&model, 256).unwrap().prefill(&second).unwrap(), "back to {back}");
    }
}

/// Blocks that no token to come sees are written again; the bits stay those of a session that keeps everything, also when the text is taken back.
#[test]
fn what_windows_have_passed_is_given_up_without_changing_a_bit() {
    for name in ["dense_local", "dense_paragraphs", "moe_gated_paragraphs"] {
        let golden = Golden::named(name);
        let model = Model::load(&golden.copy(SaveDtype::F32, |config| config.max_position_embeddings = 2048)).unwrap();
        let (mut giving, mut keeping) = (Session::new(&model, 2048).unwrap(), Session::keeping_all(&model, 2048).unwrap());
        let prompt: Vec<u32> = (0..600).map(|i| 1 + i * 31 % 90).collect();
        assert_eq!(giving.keep_common_prefix(&prompt), 0);
        assert!(giving.logits_for(&prompt, 600).unwrap() == keeping.logits_for(&prompt, 600).unwrap(), "{name}: the prompt");
        // Gates go back to the end of a block.
        let kept = if model.config().mechanisms.context_gate.is_some() { 576 } else { 599 };
        // Where to go back to, the least and the most that is then left, and how many tokens follow.
        let turns = [(600, kept, 600, 300), (899, 896, 899, 40), (700, kept, 608, 100), (599, kept, 599, 300), (200, 0, 0, 700)];
        for (turn, (back, least, most, tokens)) in turns.into_iter().enumerate() {
            giving.truncate(back);
            assert!((least..=most).contains(&giving.len()), "{name}: {} left of {back}", giving.len());
            keeping.truncate(giving.len());
            assert_eq!(giving.ids(), keeping.ids());
            let ids: Vec<u32> = (0..tokens).map(|i| 1 + (i * 17 + turn as u32 * 7) % 90).collect();
            let (ahead, one_by_one) = ids.split_at(ids.len() / 2);
            assert!(giving.prefill(ahead).unwrap() == keeping.prefill(ahead).unwrap(), "{name}, turn {turn}");
            for (place, &id) in one_by_one.iter().enumerate() {
                assert!(giving.decode(id).unwrap() == keeping.decode(id).unwrap(), "{name}, turn {turn}, token {place}");
            }
        }
        assert!(giving.kv_bytes_in_use() < keeping.kv_bytes_in_use());
    }
}

/// The next turn of a conversation goes on from the prompt at least, however far the answer went on from there.
#[test]
fn a_conversation_goes_on_from_its_last_prompt() {
    let golden = Golden::named("dense_local");
    let model = golden.model(WeightDtype::Auto);
    let params = SamplingParams { ignore_eos: true, ..greedy(150) };
    let prompt: Vec<u32> = (0..70).map(|i| 1 + i * 31 % 90).collect();
    let mut session = Session::new(&model, 256).unwrap().with_drafts(DraftOptions::default());
    let first = generate_in(&mut session, &prompt, &params, (), |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(first.tokens.len(), 150);
    // The answer is written otherwise than it was generated.
    let mut next = [&prompt[..], &first.tokens[..20]].concat();
    next.extend([94, 93, 92]);
    let again = generate_in(&mut session, &next, &params, (), |_| ControlFlow::Continue(())).unwrap();
    assert!((69..=93).contains(&again.timings.cached_tokens), "{} tokens were known", again.timings.cached_tokens);
    assert_eq!(again.tokens, generate(&model, &next, &params, (), |_| ControlFlow::Continue(())).unwrap().tokens);
    // And back to the prompt before, which is gone.
    let back = generate_in(&mut session, &prompt, &params, (), |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(back.tokens, first.tokens);
}

/// A session of a model with gated heads goes back to the end of a block, and on from there with the same bits.
#[test]
fn a_kept_prefix_of_gated_heads_ends_with_a_block() {
    let golden = Golden::named("dense_gated");
    let model = golden.model(WeightDtype::Auto);
    let first: Vec<u32> = (0..75).map(|i| 1 + i * 31 % 90).collect();
    let mut second = first[..70].to_vec();
    second.extend([5, 9, 12, 40]);
    let mut session = Session::new(&model, 128).unwrap();
    session.prefill(&first).unwrap();
    assert_eq!(session.keep_common_prefix(&second), 64);
    let kept = session.prefill(&second[64..]).unwrap().to_vec();
    assert_eq!(kept, Session::new(&model, 128).unwrap().prefill(&second).unwrap());
    assert_eq!(session.keep_common_prefix(&second), 64);
}

/// A model saved as bf16 and one rounded to bf16 while loading are the same model, and near the f32 one; 8-bit weights are dequantised.
#[test]
fn rounded_copies_stay_near() {
    for name in ["dense_tied", "moe_k2", "moe_bias_mqa"] {
        let golden = Golden::named(name);
        let ids = &golden.ids[0];
        let exact = all_logits(&golden.model(WeightDtype::F32), ids);
        let spread = exact.iter().fold(0.0f32, |a, l| a.max(l.abs()));
        let rounded = all_logits(&golden.model(WeightDtype::Bf16), ids);

        for (dtype, share) in [(SaveDtype::Bf16, 0.1), (SaveDtype::Int8PerChannel, 0.15)] {
            let copy = golden.copy(dtype, |_| {});
            let logits = all_logits(&Model::load(&copy).unwrap(), ids);
            if dtype == SaveDtype::Bf16 {
                assert!(logits == rounded, "{name}: bf16 on disk and in memory differ");
                assert_eq!(logits, all_logits(&Model::load_as(&copy, WeightDtype::F32).unwrap(), ids), "widening is exact");
            }
            // Only the median is near: where rounding changes the choice of an expert, a token's logits change altogether.
            let mut differences: Vec<f32> = logits.iter().zip(&exact).map(|(a, b)| (a - b).abs()).collect();
            differences.sort_by(f32::total_cmp);
            let (median, most) = (differences[differences.len() / 2], differences[differences.len() - 1]);
            println!("{name:<16} {dtype:?}: logits differ by {median:.4} in the median, {most:.3} at most; they reach {spread:.2}");
            assert!(median > 0.0 && median < share * spread, "{name} as {dtype:?}: median difference {median}, logits up to {spread}");
        }
    }
}

/// Experts of 4 bits give what the same weights give in f32, but for the rounding of activations, which 8-bit weights share; and the same bits in pieces.
#[test]
fn experts_of_four_bits_are_the_weights_of_their_files() {
    for group in [32, 64] {
        let checkpoint = int4_checkpoint(group);
        let ids: Vec<u32> = (0..40).map(|i| 1 + i * 31 % 90).collect();
        let exact = all_logits(&Model::load_as(&checkpoint, WeightDtype::F32).unwrap(), &ids);
        let model = Model::load(&checkpoint).unwrap();
        let logits = all_logits(&model, &ids);
        let spread = exact.iter().fold(0.0f32, |a, l| a.max(l.abs()));
        let mut differences: Vec<f32> = logits.iter().zip(&exact).map(|(a, b)| (a - b).abs()).collect();
        differences.sort_by(f32::total_cmp);
        let median = differences[differences.len() / 2];
        assert!(median > 0.0 && median < 0.02 * spread, "median difference {median}, logits up to {spread}");
        let mut session = Session::new(&model, ids.len()).unwrap();
        let mut pieces = Vec::new();
        for piece in ids.chunks(7) {
            pieces.extend(session.logits_for(piece, piece.len()).unwrap());
        }
        assert!(pieces == logits, "in pieces");
        // In 8 bits the experts take more memory, and nearly the same values.
        let bytes = all_logits(&Model::load_as(&checkpoint, WeightDtype::Int8).unwrap(), &ids);
        let median = {
            let mut differences: Vec<f32> = logits.iter().zip(&bytes).map(|(a, b)| (a - b).abs()).collect();
            differences.sort_by(f32::total_cmp);
            differences[differences.len() / 2]
        };
        assert!(median > 0.0 && median < 0.02 * spread, "{median}");
    }
}

#[test]
fn sampled_tokens_depend_on_the_seed_alone() {
    let golden = Golden::named("dense_tied");
    let model = golden.model(WeightDtype::Auto);
    let run = |seed| {
        let params = SamplingParams { seed, temperature: 1.5, max_tokens: 20, ignore_eos: true, ..SamplingParams::default() };
        generate(&model, &golden.prompt, &params, (), |_| ControlFlow::Continue(())).unwrap().tokens
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn what_cannot_be_run_is_refused_with_its_reason() {
    let golden = Golden::named("dense_tied");
    let model = golden.model(WeightDtype::Auto);
    let vocab_size = model.config().vocab_size;
    let run = |prompt: &[u32], params: &SamplingParams| generate(&model, prompt, params, (), |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(run(&[], &greedy(1)), Error::EmptyPrompt));
    match run(&[1, vocab_size as u32], &greedy(1)) {
        Error::UnknownToken { position: 1, id, vocab_size: size } => assert_eq!((id as usize, size), (vocab_size, vocab_size)),
        other => panic!("{other}"),
    }
    let limit = model.config().max_position_embeddings;
    assert!(matches!(run(&vec![1; limit + 1], &greedy(1)), Error::ContextLength { needed, limit: l } if (needed, l) == (limit + 1, limit)));
    assert!(matches!(run(&[1], &greedy(0)), Error::Parameter { field: "max_tokens", .. }));
    assert!(matches!(Session::new(&model, 0).unwrap_err(), Error::Parameter { field: "max_len", .. }));
    assert!(matches!(Session::new(&model, limit + 1).unwrap_err(), Error::ContextLength { .. }));

    let mut session = Session::new(&model, 4).unwrap();
    session.prefill(&[1, 2, 3]).unwrap();
    assert!(matches!(session.prefill(&[4, 5]).unwrap_err(), Error::ContextLength { needed: 5, limit: 4 }));
    assert_eq!(session.ids(), [1, 2, 3], "a refusal leaves the session as it was");
    assert!(matches!(session.logits_for(&[4], 2).unwrap_err(), Error::Parameter { field: "last", .. }));
    assert!(matches!(session.logits_for(&[4], 0).unwrap_err(), Error::Parameter { field: "last", .. }));
    session.decode(4).unwrap();
    assert!(matches!(session.decode(4).unwrap_err(), Error::ContextLength { .. }));
}

#[test]
fn the_end_of_the_context_ends_a_generation() {
    let golden = Golden::named("dense_tied");
    let model = golden.model(WeightDtype::Auto);
    let mut session = Session::new(&model, golden.prompt.len() + 3).unwrap();
    let generation = generate_in(&mut session, &golden.prompt, &greedy(100), (), |_| ControlFlow::Continue(())).unwrap();
    // Three more tokens are run; the one after them is still known.
    assert_eq!(generation.tokens, golden.greedy[..4]);
    assert_eq!(generation.finish_reason, FinishReason::Length);
}

#[test]
fn a_vision_language_checkpoint_is_refused_by_name() {
    let file = Golden::named("dense_tied").dir.with_file_name("vl_moe_flat").join("config.json");
    let config = Config::from_file(&file).unwrap();
    let tensors = config.tensor_specs().into_iter().filter(|spec| spec.required).map(|spec| {
        let zeros = vec![0.0; spec.shape.iter().product()];
        (spec.name, spec.shape, zeros.into())
    });
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &config, tensors, &SaveOptions::default()).unwrap();
    let error = Model::load(&Checkpoint::open(dir.path()).unwrap()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("vision-language"), "{error}");
}

/// The weights of a routed token sum to 1, so one bias of all experts' last projections is that bias of the shared experts' one.
#[test]
fn biases_of_routed_experts_count() {
    let golden = Golden::named("moe_bias_mqa");
    let original = golden.checkpoint();
    let mut config = original.config().clone();
    config.moe.as_mut().unwrap().norm_min = 1e-12;
    assert!(config.use_bias && config.moe.as_ref().unwrap().num_shared_experts > 0);
    let logits = |bias_of: &dyn Fn(&str) -> f32| {
        let specs = config.tensor_specs().into_iter();
        let specs = specs.filter(|spec| original.contains(&spec.name) || spec.group == TensorGroup::ExpertBias);
        let tensors = specs.map(|spec| {
            let mut values = match spec.group {
                TensorGroup::ExpertBias => vec![0.0; spec.shape.iter().product()],
                _ => original.tensor(&spec.name).unwrap().to_f32().unwrap(),
            };
            let step = bias_of(&spec.name);
            values.iter_mut().enumerate().for_each(|(i, value)| *value += step * (i % 5) as f32);
            (spec.name, spec.shape, values.into())
        });
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &config, tensors, &SaveOptions { dtype: SaveDtype::F32, ..SaveOptions::default() }).unwrap();
        all_logits(&Model::load(&Checkpoint::open(dir.path()).unwrap()).unwrap(), &golden.ids[0])
    };
    let none = logits(&|_| 0.0);
    let routed = logits(&|name| if name.contains(".experts.") && name.ends_with("down_proj.bias") { 0.1 } else { 0.0 });
    let shared = logits(&|name| if name.ends_with("shared_experts.down_proj.bias") { 0.1 } else { 0.0 });
    assert!(max_difference(&routed, &none) > 1e-2, "the biases change nothing");
    assert!(max_difference(&routed, &shared) < 1e-4, "they differ by {}", max_difference(&routed, &shared));
    for part in ["gate_proj.bias", "up_proj.bias"] {
        let with = logits(&|name| if name.contains(".experts.") && name.ends_with(part) { 0.1 } else { 0.0 });
        assert!(max_difference(&with, &none) > 1e-3, "{part} changes nothing");
    }
}
