//! Prompts and summaries of the embedded model's files.
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use ernie_checkpoint::{Checkpoint, Tokenizer};
use ernie_engine::{FinishReason, Model, SamplingParams};
use ernie_eval::{
    Example, Prompt, PromptTemplate, SummariseError, SummariseOptions, Summary, SummaryScores, Units, prompts, rouge, score_summary,
    summarise,
};

const STORY: &str =
    "Once upon a time there was a little girl who lived in a small house near the wood. One day she went out to play with her dog.";
const VERSE: &str = "床前明月光，疑是地上霜。举头望明月，低头思故乡。";

fn nano() -> (Arc<Model>, Tokenizer) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano");
    (Arc::new(Model::load(&Checkpoint::open(&dir).unwrap()).unwrap()), Tokenizer::from_dir(&dir).unwrap())
}

fn example(document: &str, query: Option<&str>) -> Example {
    Example {
        id: "e".to_owned(),
        document: document.into(),
        query: query.map(str::to_owned),
        references: vec!["A girl and a dog.".to_owned()],
    }
}

fn template(queries: bool) -> PromptTemplate {
    PromptTemplate::new(PromptTemplate::default_text(queries), queries).unwrap()
}

#[test]
fn a_document_that_fits_is_left_alone() {
    let (_, tokenizer) = nano();
    let text = format!("{STORY}\nTL;DR:");
    let ids = tokenizer.encode(&text, true).unwrap();
    let room = ids.len();
    let prompt = template(false).prompt(&tokenizer, &example(STORY, None), room).unwrap();
    assert_eq!(prompt, Prompt { text, ids, cut: false });
    assert!(template(false).prompt(&tokenizer, &example(STORY, None), room - 1).unwrap().cut);
    // Braces in a document are no places.
    let braces = template(true).prompt(&tokenizer, &example("{query} {document}", Some("{document}?")), 100).unwrap();
    assert_eq!(braces.text, "{query} {document}\n\nQuestion: {document}?\nTL;DR:");
}

#[test]
fn as_much_of_the_beginning_is_kept_as_there_is_room_for() {
    let (_, tokenizer) = nano();
    let queries = [None, Some("Who has the dog?")];
    for (text, query) in [STORY, VERSE].into_iter().flat_map(|text| queries.map(|query| (text, query))) {
        let (document, template) = (text.repeat(40), template(query.is_some()));
        let after = query.map_or("\nTL;DR:".to_owned(), |query| format!("\n\nQuestion: {query}\nTL;DR:"));
        for room in [30, 64, 301] {
            let prompt = template.prompt(&tokenizer, &example(&document, query), room).unwrap();
            assert!(prompt.cut);
            assert_eq!(prompt.ids, tokenizer.encode(&prompt.text, true).unwrap());
            let kept = prompt.text.strip_suffix(&after).unwrap();
            let rest = document.strip_prefix(kept).unwrap();
            assert!(prompt.ids.len() <= room);
            // One more word or Chinese character would be too much.
            let end = rest.char_indices().skip(1).find(|(_, c)| *c == ' ' || !c.is_ascii()).map_or(rest.len(), |(at, _)| at);
            let longer = format!("{kept}{}{after}", &rest[..end]);
            assert!(tokenizer.encode(&longer, true).unwrap().len() > room, "{longer:?} has room in {room}");
            assert!(
                !(kept.ends_with(|c: char| c.is_ascii_alphabetic()) && rest.starts_with(|c: char| c.is_ascii_alphabetic())),
                "{kept:?}"
            );
        }
    }
}

#[test]
fn a_context_without_room_is_refused() {
    let (model, tokenizer) = nano();
    let options = |context, max_tokens| SummariseOptions { context, max_tokens, batch: 1 };
    let with = |options| prompts(&model, &tokenizer, &template(false), &[example(STORY, None)], options);
    for (context, max_tokens) in [(513, 100), (100, 100), (100, 0)] {
        let error = with(options(context, max_tokens)).unwrap_err();
        assert!(matches!(error, SummariseError::Context { limit: 512, .. }), "{error}");
    }
    let error = with(options(105, 102)).unwrap_err();
    assert!(matches!(error, SummariseError::NoRoom { room: 3, .. }), "{error}");
    assert_eq!(with(options(512, 100)).unwrap().len(), 1);
}

#[test]
fn a_summary_is_what_generating_alone_gives() {
    let (model, tokenizer) = nano();
    let examples: Vec<Example> =
        [STORY, VERSE, &STORY.repeat(30), "The dog", &VERSE.repeat(30)].into_iter().map(|text| example(text, None)).collect();
    for batch in [1, 3] {
        let options = SummariseOptions { context: 200, max_tokens: 48, batch };
        let prompts = prompts(&model, &tokenizer, &template(false), &examples, options).unwrap();
        let mut seen = Vec::new();
        let mut progress = |finished| {
            seen.push(finished);
            ControlFlow::Continue(())
        };
        let summaries = summarise(&model, &tokenizer, &prompts, options, &mut progress).unwrap();
        assert_eq!(seen.last(), Some(&examples.len()));
        for (prompt, summary) in prompts.iter().zip(summaries) {
            let params = SamplingParams { max_tokens: 48, ..SamplingParams::greedy() };
            let alone = ernie_engine::generate(&model, &prompt.ids, &params, tokenizer.decode_stream(true), |_| ControlFlow::Continue(()));
            let alone = alone.unwrap();
            assert_eq!(
                summary,
                Some(Summary { text: alone.text, tokens: alone.tokens.len(), finish_reason: alone.finish_reason }),
                "in batches of {batch}: {:?}",
                prompt.text
            );
        }
    }
}

#[test]
fn work_that_is_ended_keeps_what_is_done() {
    let (model, tokenizer) = nano();
    let examples = vec![example(STORY, None); 5];
    let options = SummariseOptions { context: 200, max_tokens: 8, batch: 2 };
    let prompts = prompts(&model, &tokenizer, &template(false), &examples, options).unwrap();
    let mut after_one = |finished| if finished > 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let summaries = summarise(&model, &tokenizer, &prompts, options, &mut after_one).unwrap();
    let done = summaries.iter().flatten().count();
    assert!((1..=2).contains(&done) && summaries[0].is_some() && summaries[4].is_none(), "{summaries:?}");
}

#[test]
fn scores_are_means_of_the_best_references() {
    let with =
        |references: &[&str]| Example { references: references.iter().map(|&text| text.to_owned()).collect(), ..example(STORY, None) };
    let summary = |text: &str| Summary { text: text.to_owned(), tokens: 1, finish_reason: FinishReason::Length };
    let exact = score_summary(&with(&["a cat", "a girl and a dog"]), &summary(" a girl and a dog"), Units::Words);
    assert_eq!(exact.rouge1.f1, 1.0);
    let half = score_summary(&with(&["a girl"]), &summary("a dog"), Units::Words);
    assert_eq!(half, rouge("a girl", "a dog", Units::Words));
    let scores = SummaryScores::of(&[exact, half]);
    assert_eq!((scores.examples, scores.rouge1.mean, scores.rouge2.mean), (2, 0.75, 0.5));
    assert_eq!((scores.rouge_l.low, scores.rouge_l.high), (0.5, 1.0));
}
