//! Rows, and that drawing them by priority is what it says.
use super::*;
use crate::data::packing::IGNORE;
use crate::data::tests::prepared;

const LENGTH: usize = 32;
const SHAPE: RowShape = RowShape { rows: 4, length: LENGTH };

fn sampler(corpus: &Arc<Corpus>, config: PriorityConfig) -> PrioritySampler {
    PrioritySampler::new(corpus.clone(), config, 5, SHAPE, 3.0, vec![0.0; corpus.sources.len()])
}

/// What is above a reference's loss is what counts, at first and after visits.
#[test]
fn a_reference_leaves_what_can_be_learned() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = prepared(dir.path()).1.corpus;
    let config = PriorityConfig { alpha: 1.0, floor: 0.01, least_gain: 1.0, ..PriorityConfig::default() };
    let reached: Vec<f64> = (0..corpus.sources.len()).map(|source| source as f64).collect();
    let mut sampler = PrioritySampler::new(corpus.clone(), config.clone(), 5, SHAPE, 3.0, reached.clone());
    let means = |sampler: &PrioritySampler| sampler.sources.iter().map(|source| source.mean).collect::<Vec<_>>();
    assert_eq!(means(&sampler), (0..corpus.sources.len()).map(|source| (3.0 - source as f64).max(0.0)).collect::<Vec<_>>());
    let row = sampler.rows.of_source(1).start as u32;
    sampler.observe(1, [(Draw { row, weight: 1.0 }, 2.25)]);
    assert_eq!(sampler.relative_of(row as usize), relative(&config, 1.25));
    sampler.observe(2, [(Draw { row, weight: 1.0 }, 0.5)]);
    assert_eq!(sampler.relative_of(row as usize), relative(&config, 0.0), "what is known better than by the reference");
    let again = PrioritySampler::resume(corpus.clone(), config, sampler.state().clone(), SHAPE, reached).unwrap();
    assert_eq!(means(&again), means(&sampler));
}

/// A made-up loss of a row, very different from row to row.
fn loss_of(row: u32) -> f64 {
    0.05 + (mix(u64::from(row)) % 100) as f64 / 20.0
}

/// Visits `count` batches.
fn visit(sampler: &mut PrioritySampler, steps: std::ops::Range<u64>) -> Vec<Vec<Draw>> {
    let visit = |step| {
        let (_, draws) = sampler.next_batch(step, 1000);
        sampler.observe(step, draws.iter().map(|&draw| (draw, loss_of(draw.row))));
        draws
    };
    steps.map(visit).collect()
}

#[test]
fn rows_are_the_text_of_their_source() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = prepared(dir.path()).1.corpus;
    // At one of these lengths a source leaves nothing, at one a single token, at others more.
    let tokens = corpus.sources[0].shard.train_tokens() as usize;
    let divisor = |of: usize| (2..of).find(|length| of.is_multiple_of(*length)).unwrap_or(of);
    for length in [LENGTH, LENGTH + 1, divisor(tokens), divisor(tokens - 1)] {
        let rows = Rows::new(corpus.clone(), 5, length);
        assert!(!rows.is_empty() && rows.of_source(2).end == rows.len());
        for (index, source) in corpus.sources.iter().enumerate() {
            let tokens = source.shard.train_tokens() as usize;
            let (whole, left) = (tokens / length, tokens % length);
            let count = whole + usize::from(left > 1);
            assert_eq!(rows.of_source(index).len(), count.max(1), "{tokens} in rows of {length}");
            let mut batch = Batch::with_capacity(count, length);
            let mut counted = 0;
            for row in rows.of_source(index) {
                assert_eq!(rows.source_of(row), index);
                rows.append(row, &mut batch);
                counted += rows.documents(row).iter().map(|(_, tokens)| tokens).sum::<usize>();
            }
            // Every token of the documents, in their order, with the bounds of documents and rows; a single last one is a target only.
            let mut expected = Vec::new();
            for document in super::super::packing::order(&corpus, 5, index, 0) {
                source.shard.read(document, 0, source.shard.document_len(document), &mut expected);
            }
            let in_rows = if left > 1 { tokens } else { whole * length };
            assert_eq!((batch.ids.len(), counted), (count * length, in_rows));
            assert_eq!(batch.ids[..in_rows], expected[..in_rows]);
            assert!((0..=count).all(|row| batch.cu_seqlens.contains(&((row * length) as u32))));
            assert!(batch.targets.chunks(length).all(|row| row.iter().any(|&target| target != IGNORE)), "a row without a target");
            // A target is the next token, also across the end of a row, unless the document ends.
            let mut ends = 0;
            for (position, &target) in batch.targets.iter().enumerate().take(tokens - 1) {
                ends += usize::from(target == IGNORE);
                assert!(target == IGNORE || target == expected[position + 1] as i32);
            }
            assert!(ends < source.shard.train().len());
            // Padding is no text.
            assert!(batch.targets[in_rows..].iter().all(|&target| target == IGNORE));
            assert!(batch.domains[in_rows..].iter().all(|&domain| domain == ernie_model::steering::NO_DOMAIN));
        }
    }
}

#[test]
fn weighted_draws_estimate_what_uniform_draws_do() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = prepared(dir.path()).1.corpus;
    let config = PriorityConfig { alpha: 1.5, beta: [1.0, 1.0], floor: 0.2, staleness: 100_000, ..PriorityConfig::default() };
    let mut sampler = sampler(&corpus, config.clone());
    visit(&mut sampler, 1..200);
    assert!(sampler.gain() > 1.1, "gain {}", sampler.gain());
    // What is estimated, and its mean by the shares of the sources.
    let value = |row: usize| (row as f64 * 0.37).sin() + 2.0;
    let bases: Vec<f64> = (0..sampler.rows.len()).map(|row| sampler.sources[sampler.rows.source_of(row)].base()).collect();
    let base = |row: usize| bases[row];
    let expected: f64 = (0..sampler.rows.len()).map(|row| base(row) * value(row)).sum();
    let shares: f64 = (0..sampler.rows.len()).map(base).sum();
    assert!((shares - 1.0).abs() < 1e-12);

    let (mass, least) = (sampler.mass(), sampler.least_relative());
    let largest = 1.0 / (config.floor + (1.0 - config.floor) * least / mass);
    let (mut sum, mut sum_of_weights, mut counts, batches) = (0.0, 0.0, vec![0u32; sampler.rows.len()], 60_000);
    for _ in 0..batches {
        // Nothing is observed: the probabilities stay.
        sampler.state.batches += 1;
        for draw in sampler.draw(200, 1000) {
            sum += f64::from(draw.weight) * largest * value(draw.row as usize);
            sum_of_weights += f64::from(draw.weight) * largest;
            counts[draw.row as usize] += 1;
        }
    }
    let draws = f64::from(batches * 4);
    assert!((sum / draws - expected).abs() < 0.01 * expected, "{} for {expected}", sum / draws);
    assert!((sum_of_weights / draws - 1.0).abs() < 0.01);
    // And every row comes as often as its probability says.
    for (row, &count) in counts.iter().enumerate() {
        let probability = base(row) * (config.floor + (1.0 - config.floor) * sampler.relative_of(row) / mass);
        let expected = probability * draws;
        assert!((f64::from(count) - expected).abs() < 6.0 * expected.sqrt() + 1.0, "row {row}: {count} draws for {expected}");
    }
}

#[test]
fn high_losses_come_more_often_and_weigh_less() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = prepared(dir.path()).1.corpus;
    let mut sampler = sampler(&corpus, PriorityConfig { beta: [0.5, 0.5], ..PriorityConfig::default() });
    let draws = visit(&mut sampler, 1..400);
    let late: Vec<Draw> = draws[200..].concat();
    let mean = late.iter().map(|draw| loss_of(draw.row)).sum::<f64>() / late.len() as f64;
    let base = (0..sampler.rows.len()).map(|row| sampler.sources[sampler.rows.source_of(row)].base() * loss_of(row as u32)).sum::<f64>();
    assert!(mean > 1.15 * base, "mean loss of the draws {mean}, of all rows {base}");
    assert!(late.iter().all(|draw| draw.weight > 0.0 && draw.weight <= 1.0));
    let (high, low): (Vec<&Draw>, Vec<&Draw>) = late.iter().partition(|draw| loss_of(draw.row) > 3.0);
    let mean_weight = |draws: &[&Draw]| draws.iter().map(|draw| f64::from(draw.weight)).sum::<f64>() / draws.len() as f64;
    assert!(mean_weight(&high) < mean_weight(&low));
    let rows = sampler.spread().rows;
    assert!(
        rows.iter().sum::<u64>() == sampler.rows.len() as u64
            && rows[16..].iter().any(|&rows| rows > 0)
            && rows[..16].iter().any(|&rows| rows > 0),
        "{rows:?}"
    );
}

#[test]
fn without_anything_to_gain_rows_are_drawn_by_their_shares() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = prepared(dir.path()).1.corpus;
    let mut sampler = sampler(&corpus, PriorityConfig { alpha: 0.0, ..PriorityConfig::default() });
    let draws = visit(&mut sampler, 1..300).concat();
    assert!((sampler.gain() - 1.0).abs() < 1e-12);
    assert_eq!(sampler.spread().rows[16], sampler.rows.len() as u64);
    assert!(draws.iter().all(|draw| draw.weight == 1.0));
    for (index, source) in sampler.sources.iter().enumerate() {
        let share = draws.iter().filter(|draw| sampler.rows.source_of(draw.row as usize) == index).count() as f64 / draws.len() as f64;
        assert!((share - source.share).abs() < 0.03, "{share} for {}", source.share);
    }
}

#[test]
fn the_least_priority_is_that_of_a_scan_over_rows() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = prepared(dir.path()).1.corpus;
    let config = PriorityConfig { staleness: 10, ..PriorityConfig::default() };
    let mut sampler = sampler(&corpus, config.clone());
    let scan = |sampler: &PrioritySampler| (0..sampler.rows.len()).map(|row| sampler.relative_of(row)).fold(f64::INFINITY, f64::min);
    let mut seen = std::collections::BTreeSet::new();
    for step in 1..80 {
        visit(&mut sampler, step..step + 1);
        assert_eq!(sampler.least_relative(), scan(&sampler), "step {step}");
        seen.insert(sampler.least_relative().to_bits());
    }
    assert!(seen.len() > 5, "{} values", seen.len());
    let resumed = PrioritySampler::resume(corpus.clone(), config, sampler.state().clone(), SHAPE, vec![0.0; corpus.sources.len()]).unwrap();
    assert_eq!(resumed.least_relative(), scan(&resumed));
}

#[test]
fn old_losses_are_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = prepared(dir.path()).1.corpus;
    let mut sampler = sampler(&corpus, PriorityConfig { staleness: 10, ..PriorityConfig::default() });
    visit(&mut sampler, 1..60);
    for source in &sampler.sources {
        for place in 0..source.count {
            let visited = sampler.state.priority.as_ref().unwrap().visited[source.first + place];
            // The last draw was for step 59.
            let fresh = visited > 0 && u64::from(visited) + 10 >= 59;
            assert_eq!(source.known.get(place) > 0.0, fresh, "visited at {visited}");
            assert_eq!(source.unknown.get(place), f64::from(u8::from(!fresh)));
        }
    }
}

#[test]
fn the_first_loss_of_a_source_is_its_mean_and_later_ones_move_it() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = prepared(dir.path()).1.corpus;
    let config = PriorityConfig { staleness: 5, ..PriorityConfig::default() };
    let mut sampler = sampler(&corpus, config.clone());
    let [first, second] = [0, 1].map(|index| sampler.sources[index].first as u32);
    let observe = |sampler: &mut PrioritySampler, step, row, loss| sampler.observe(step, [(Draw { row, weight: 1.0 }, loss)]);
    observe(&mut sampler, 1, first, 4.0);
    assert_eq!((sampler.sources[0].mean, sampler.sources[1].mean), (4.0, 3.0));
    observe(&mut sampler, 2, first + 1, 6.0);
    assert!((sampler.sources[0].mean - 4.1).abs() < 1e-12, "{}", sampler.sources[0].mean);
    // Also when the losses have been forgotten since, and the run has been taken up again.
    sampler.forget(100);
    let (state, count) = (sampler.state().clone(), corpus.sources.len());
    let mut resumed = PrioritySampler::resume(corpus.clone(), config, state, SHAPE, vec![0.0; count]).unwrap();
    for sampler in [&mut sampler, &mut resumed] {
        observe(sampler, 100, first, 2.5);
        assert!((sampler.sources[0].mean - 4.02).abs() < 1e-12, "{}", sampler.sources[0].mean);
        observe(sampler, 100, second, 0.5);
        assert_eq!(sampler.sources[1].mean, 0.5);
    }
}

#[test]
fn a_resumed_stream_goes_on_with_the_same_draws() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = prepared(dir.path()).1.corpus;
    let config = PriorityConfig { staleness: 15, ..PriorityConfig::default() };
    let mut whole = sampler(&corpus, config.clone());
    let mut interrupted = sampler(&corpus, config.clone());
    let expected = visit(&mut whole, 1..80);
    let mut draws = visit(&mut interrupted, 1..41);
    let json = serde_json::to_string(interrupted.state()).unwrap();
    let count = corpus.sources.len();
    let mut resumed =
        PrioritySampler::resume(corpus.clone(), config.clone(), serde_json::from_str(&json).unwrap(), SHAPE, vec![0.0; count]).unwrap();
    draws.extend(visit(&mut resumed, 41..80));
    assert_eq!(draws, expected);
    assert_eq!(resumed.state(), whole.state());

    // A position of other rows is refused.
    let state = resumed.state().clone();
    let error =
        PrioritySampler::resume(corpus.clone(), config.clone(), state.clone(), RowShape { length: LENGTH + 1, ..SHAPE }, vec![0.0; count])
            .unwrap_err();
    assert!(matches!(error, Error::State { .. }), "{error}");
    let error = PrioritySampler::resume(corpus, config, DataState { priority: None, ..state }, SHAPE, vec![0.0; count]).unwrap_err();
    assert!(matches!(error, Error::State { .. }), "{error}");
}
