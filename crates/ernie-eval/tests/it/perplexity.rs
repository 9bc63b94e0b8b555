//! Perplexity on the embedded model's files.
use std::ops::ControlFlow;
use std::path::Path;

use ernie_checkpoint::{Checkpoint, Tokenizer};
use ernie_engine::{Model, Session, WeightDtype};
use ernie_eval::{Error, TextScore, score_text};

const TEXT: &str = "Once upon a time there was a little girl who lived in a small house near the wood. One day she went out to play with her dog, \
    and the sun was warm. 床前明月光，疑是地上霜。";

fn nano() -> (Model, Tokenizer) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano");
    (Model::load_as(&Checkpoint::open(&dir).unwrap(), WeightDtype::F32).unwrap(), Tokenizer::from_dir(&dir).unwrap())
}

fn score(model: &Model, tokenizer: &Tokenizer, context: usize) -> TextScore {
    score_text(model, tokenizer, TEXT, context, &mut |_| ControlFlow::Continue(())).unwrap().unwrap()
}

/// −Σ ln p of the ids after the first, by all logits.
fn nats_of(model: &Model, ids: &[u32]) -> f64 {
    let logits = Session::new(model, ids.len()).unwrap().logits_for(ids, ids.len()).unwrap();
    let rows = logits.chunks_exact(model.config().vocab_size).zip(&ids[1..]);
    rows.map(|(row, &next)| row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln() - f64::from(row[next as usize])).sum()
}

#[test]
fn the_loss_is_that_of_the_logits() {
    let (model, tokenizer) = nano();
    let ids = tokenizer.encode(TEXT, true).unwrap();
    let whole = score(&model, &tokenizer, 512);
    let nats = nats_of(&model, &ids);
    assert_eq!((whole.tokens, whole.bytes), (ids.len() as u64 - 1, TEXT.len() as u64));
    assert!((whole.nats - nats).abs() < 1e-4 * nats, "{} for {nats}", whole.nats);
    assert!((whole.perplexity() - (nats / whole.tokens as f64).exp()).abs() < 0.01);
    assert!(whole.perplexity() < 400.0, "the model knows such texts: {}", whole.perplexity());

    // In pieces, of each of which the first token is given.
    let pieces = score(&model, &tokenizer, 10);
    assert_eq!(pieces.tokens, ids.chunks(10).map(|piece| piece.len() as u64 - 1).sum::<u64>());
    let nats: f64 = ids.chunks(10).map(|piece| nats_of(&model, piece)).sum();
    assert!((pieces.nats - nats).abs() < 1e-4 * nats, "{} for {nats}", pieces.nats);
    let mut both = whole;
    both.add(&pieces);
    assert!((both.bits_per_byte() - (whole.bits_per_byte() + pieces.bits_per_byte()) / 2.0).abs() < 1e-12);
}

#[test]
fn work_can_be_ended_and_a_senseless_context_is_refused() {
    let (model, tokenizer) = nano();
    assert_eq!(score_text(&model, &tokenizer, TEXT, 64, &mut |_| ControlFlow::Break(())).unwrap(), None);
    for context in [0, 1, 513] {
        let error = score_text(&model, &tokenizer, TEXT, context, &mut |_| ControlFlow::Continue(())).unwrap_err();
        assert!(matches!(error, Error::Context { limit: 512, .. }), "{error}");
    }
    let nothing = score_text(&model, &tokenizer, "", 64, &mut |_| ControlFlow::Continue(())).unwrap().unwrap();
    assert_eq!((nothing.tokens, nothing.loss(), nothing.bits_per_byte()), (0, 0.0, 0.0));
}
