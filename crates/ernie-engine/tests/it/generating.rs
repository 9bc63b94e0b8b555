//! What ends a generation, and what the callback sees until then.
use std::ops::ControlFlow;

use ernie_checkpoint::SaveDtype;
use ernie_engine::{
    DraftOptions, FinishReason, Generation, Model, SamplingParams, Session, TextDecoder, WeightDtype, generate, generate_in,
};

use crate::golden::Golden;

/// Token n is the text "⟨n⟩"; the closing bracket comes only with the next token, as the last character of a real decoder may.
#[derive(Default)]
struct Brackets {
    open: bool,
}

impl TextDecoder for Brackets {
    fn push(&mut self, id: u32) -> String {
        let text = format!("{}⟨{id}", if self.open { "⟩" } else { "" });
        self.open = true;
        text
    }
    fn finish(&mut self) -> String {
        if std::mem::take(&mut self.open) { "⟩".to_owned() } else { String::new() }
    }
}

fn text_of(ids: &[u32]) -> String {
    ids.iter().map(|id| format!("⟨{id}⟩")).collect()
}

/// Runs to the end; checks that what the callback saw is the result.
fn run(model: &Model, golden: &Golden, params: &SamplingParams) -> Generation {
    let (mut ids, mut text) = (Vec::new(), String::new());
    let generation = generate(model, &golden.prompt, params, Brackets::default(), |event| {
        ids.extend(event.token);
        text.push_str(event.text);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((&generation.tokens, &generation.text), (&ids, &text));
    generation
}

fn greedy() -> SamplingParams {
    SamplingParams { max_tokens: 24, ..SamplingParams::greedy() }
}

#[test]
fn every_way_to_end() {
    let golden = Golden::named("moe_k2");
    let model = golden.model(WeightDtype::Auto);
    let tokens = &golden.greedy;

    let length = run(&model, &golden, &SamplingParams { max_tokens: 5, ..greedy() });
    assert_eq!((length.finish_reason, &length.tokens[..], length.text), (FinishReason::Length, &tokens[..5], text_of(&tokens[..5])));

    // The sixth token, wherever it comes first.
    let first = tokens.iter().position(|id| *id == tokens[5]).unwrap();
    let stop = run(&model, &golden, &SamplingParams { stop_ids: vec![tokens[5]], ..greedy() });
    assert_eq!((stop.finish_reason, &stop.tokens[..]), (FinishReason::Stop, &tokens[..=first]));
    assert_eq!(stop.text, text_of(&tokens[..first]), "the ending token is no text");

    // A string across two tokens.
    let across = format!("{}⟩⟨{}", tokens[3], tokens[4]);
    let stopped = run(&model, &golden, &SamplingParams { stop: vec!["no such text".to_owned(), across.clone()], ..greedy() });
    let whole = text_of(tokens);
    assert_eq!(stopped.finish_reason, FinishReason::StopString);
    assert_eq!(stopped.text, whole[..whole.find(&across).unwrap()]);

    // A string that is complete only when the text is flushed.
    let last = format!("⟨{}⟩", tokens[0]);
    let stopped = run(&model, &golden, &SamplingParams { stop: vec![last], max_tokens: 1, ..greedy() });
    assert_eq!((stopped.finish_reason, stopped.text.as_str()), (FinishReason::StopString, ""));

    let mut seen = 0;
    let cancelled = generate(&model, &golden.prompt, &greedy(), (), |event| {
        seen += usize::from(event.token.is_some());
        if seen == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap();
    assert_eq!((cancelled.finish_reason, &cancelled.tokens[..]), (FinishReason::Cancelled, &tokens[..3]));
    assert!(cancelled.text.is_empty(), "() decodes to nothing");
}

#[test]
fn every_stop_string_gives_the_text_before_it() {
    let golden = Golden::named("dense_tied");
    let model = golden.model(WeightDtype::Auto);
    let whole = text_of(&golden.greedy);
    let ends: Vec<usize> = whole.char_indices().map(|(i, _)| i).chain([whole.len()]).collect();
    for (i, &start) in ends.iter().enumerate().step_by(5) {
        for &end in ends[i + 1..].iter().take(9) {
            let stop = &whole[start..end];
            let generation = run(&model, &golden, &SamplingParams { stop: vec![stop.to_owned()], ..greedy() });
            assert_eq!(generation.text, whole[..whole.find(stop).unwrap()], "stop {stop:?}");
            assert_eq!(generation.finish_reason, FinishReason::StopString);
        }
    }
}

#[test]
fn the_end_of_sequence_token_ends_unless_ignored() {
    let golden = Golden::named("dense_tied");
    // A copy of the model whose end-of-sequence token is its fourth greedy token.
    let end = golden.greedy[3];
    let first = golden.greedy.iter().position(|&id| id == end).unwrap();
    let copy = golden.copy(SaveDtype::F32, |config| config.eos_token_id = vec![end]);
    let model = Model::load(&copy).unwrap();
    let generation = run(&model, &golden, &greedy());
    assert_eq!((generation.finish_reason, &generation.tokens[..]), (FinishReason::Stop, &golden.greedy[..=first]));
    let generation = run(&model, &golden, &SamplingParams { ignore_eos: true, ..greedy() });
    assert_eq!((generation.finish_reason, generation.tokens), (FinishReason::Length, golden.greedy.clone()));
}

#[test]
fn timings_add_up() {
    let golden = Golden::named("dense_tied");
    let model = golden.model(WeightDtype::Auto);
    let timings = run(&model, &golden, &greedy()).timings;
    assert_eq!(timings.prompt_tokens, golden.prompt.len());
    assert!(0.0 < timings.prefill_seconds && timings.prefill_seconds <= timings.first_token_seconds);
    let tokens_per_second = 23.0 / timings.decode_seconds;
    assert!((timings.decode_tokens_per_second / tokens_per_second - 1.0).abs() < 1e-9);
}

#[test]
fn guesses_change_no_token_and_leave_nothing_behind() {
    for golden in Golden::all() {
        for dtype in [WeightDtype::Auto, WeightDtype::Int8] {
            let model = golden.model(dtype);
            let repeated: Vec<u32> = golden.prompt.iter().copied().cycle().take(48).collect();
            for (seed, temperature, bias) in [(0, 0.0, 0.0), (1, 0.0, 100.0), (2, 0.8, 0.0), (3, 0.8, 8.0), (4, 1.5, 8.0)] {
                // The bias makes the text repeat itself, so that guesses come right.
                let sampling = SamplingParams { temperature, seed, logit_bias: vec![(repeated[0], bias), (repeated[1], bias)], ..greedy() };
                for (max_tokens, max_len) in [(1, 200), (2, 200), (40, 200), (200, repeated.len() + 30)] {
                    let params = SamplingParams { max_tokens, ignore_eos: true, ..sampling.clone() };
                    let run = |drafts| {
                        let session = Session::new(&model, max_len).unwrap();
                        let mut session = session.with_drafts(DraftOptions { max_tokens: drafts });
                        let first =
                            generate_in(&mut session, &repeated, &params, Brackets::default(), |_| ControlFlow::Continue(())).unwrap();
                        let ids = session.ids().to_vec();
                        // The same session goes on with what it holds.
                        let again =
                            generate_in(&mut session, &repeated, &params, Brackets::default(), |_| ControlFlow::Continue(())).unwrap();
                        assert_eq!((&first.tokens, &first.text), (&again.tokens, &again.text));
                        (first.tokens, first.text, first.finish_reason, ids)
                    };
                    let plain = run(0);
                    assert_eq!(plain.3, [&repeated, &plain.0[..plain.0.len() - 1]].concat());
                    for drafts in [1, 4, 12, 100] {
                        assert_eq!(run(drafts), plain, "{} {dtype:?}, {drafts} guesses, temperature {temperature}", golden.name);
                    }
                }
            }
        }
    }
}
