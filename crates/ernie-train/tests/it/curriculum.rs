//! The expert curriculum: rows by difficulty, experts by domain, and what is left of both at validation and on resume.
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::run::{Bench, bits};
use ernie_checkpoint::Checkpoint;
use ernie_model::{Ernie, LossWeights, PackedBatch};
use ernie_train::curriculum::difficulty::{self, Difficulty};
use ernie_train::curriculum::sampler::{BatchShape, CurriculumSampler};
use ernie_train::curriculum::{CurriculumConfig, Reference};
use ernie_train::data::rows::Rows;
use ernie_train::data::{self, Prepared};
use ernie_train::{Recipe, TrainError, train};

/// Four domains with words of their own.
const DOMAINS: [(&str, [&str; 4]); 4] = [
    ("sea", ["the fish swims", "a wave falls", "salt water", "the deep blue"]),
    ("town", ["many cars", "red lights turn green", "people wait", "a bus comes"]),
    ("诗", ["明月光", "山中一夜雨", "落花", "春风来"]),
    ("numbers", ["1 2 3", "4 5", "9 8 7 6", "0 0"]),
];

fn bench(root: &Path) -> Bench {
    let bench = Bench::new(root);
    for (name, words) in DOMAINS {
        let document =
            |index: usize| (0..4 + index % 7).map(|n| words[(index * 5 + n * n + index / 3 * n) % 4]).collect::<Vec<_>>().join(" ");
        let text = (0..200).map(document).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join("\n<|endoftext|>\n");
        fs::write(root.join("data").join(format!("{name}.txt")), text).unwrap();
    }
    bench
}

/// A recipe over the domains.
fn recipe(bench: &Bench, out: &str, steps: u64) -> Recipe {
    let mut recipe = bench.recipe(out, steps);
    let first = recipe.data.source.remove(0);
    for (name, _) in DOMAINS {
        let mut source = first.clone();
        (source.name, source.paths) = (name.into(), vec![format!("{name}.txt")]);
        recipe.data.source.push(source);
    }
    recipe.run.validate_tokens = 2048;
    recipe
}

const STAGES: &str = r#"
stage = [
    { until = 0.1, routing = "uniform" },
    { until = 0.3, routing = "balanced" },
    { until = 0.8, routing = "steered", steer = 0.5, pull = 0.1, reassign_every = 20 },
    { until = 1.0, routing = "steered", steer = 0.0, pull = 0.1, reassign_every = 1000 },
]
"#;

fn stages(text: &str) -> Option<CurriculumConfig> {
    Some(toml::from_str(text).unwrap())
}

#[test]
fn experts_divide_the_domains_and_a_resumed_run_has_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let bench = bench(dir.path());
    let staged = |out: &str| Recipe { curriculum: stages(STAGES), ..recipe(&bench, out, 120) };
    let plain = train(&recipe(&bench, "plain", 120), &bench.options()).unwrap();
    let report = train(&staged("staged"), &bench.options()).unwrap();
    let (without, with) = (plain.experts.unwrap(), report.experts.clone().unwrap());
    assert_eq!(with.domains, DOMAINS.map(|(name, _)| name));
    assert!(with.overlap < 0.7 * without.overlap, "overlap {} with, {} without", with.overlap, without.overlap);
    assert!(with.least_used >= 0.25, "{with:?}");
    let mean = |losses: &[(String, f64)]| losses.iter().map(|(_, loss)| loss).sum::<f64>() / losses.len() as f64;
    let (loss, expected) = (mean(&report.validation), mean(&plain.validation));
    assert!(loss < 1.1 * expected, "{loss} against {expected}");

    // The record has the same at every validation, and what pulls in the steered stage alone.
    let text = fs::read_to_string(dir.path().join("staged/metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = lines.iter().rfind(|line| line["kind"] == "validation").unwrap();
    assert_eq!(last["experts"]["overlap"].as_f64(), Some(with.overlap));
    assert_eq!(last["experts"]["layers"][0]["counts"].as_array().unwrap().len(), 4);
    let seen = last["expert_losses"][0]["losses"].as_array().unwrap();
    assert!(
        seen.len() == 4 && seen.iter().all(|row| row.as_array().unwrap().iter().any(|loss| loss.as_f64().unwrap_or(0.0) > 0.0)),
        "{seen:?}"
    );
    // Each assignment once, at the beginning of stages and every so many steps; at first all experts change hands.
    let assigned = |lines: &[serde_json::Value]| -> Vec<(u64, serde_json::Value)> {
        let found = lines.iter().filter(|line| line["kind"] == "assignment");
        found.map(|line| (line["step"].as_u64().unwrap(), line["layers"].clone())).collect()
    };
    let assignments = assigned(&lines);
    assert_eq!(assignments.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [37, 57, 77, 97]);
    assert_eq!((&assignments[0].1[0]["layer"], &assignments[0].1[0]["changed"]), (&1.into(), &4.into()));
    assert!(assignments.iter().all(|(_, layers)| layers[0]["experts"].as_array().unwrap().iter().all(|names| names[0].is_string())));
    let pulled: Vec<u64> = lines.iter().filter(|line| line.get("pull").is_some()).map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(pulled, (37..=120).collect::<Vec<_>>());

    // As if killed after step 117: after an assignment and before the next.
    let whole = bits(&report.model_dir);
    fs::remove_dir_all(dir.path().join("staged/checkpoints/step-00000120")).unwrap();
    fs::remove_dir_all(&report.model_dir).unwrap();
    let again = train(&staged("staged"), &bench.options()).unwrap();
    assert_eq!((bits(&again.model_dir), again.experts), (whole, report.experts));
    let text = fs::read_to_string(dir.path().join("staged/metrics.jsonl")).unwrap();
    assert_eq!(assigned(&text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<_>>()), assignments);
    // Another strength is another run.
    let mut other = staged("staged");
    other.curriculum.as_mut().unwrap().stage[2].steer = 0.4;
    assert!(matches!(train(&other, &bench.options()).unwrap_err(), TrainError::OtherRun { .. }));
}

#[test]
fn layers_that_are_computed_again_are_steered_alike() {
    let dir = tempfile::tempdir().unwrap();
    let bench = bench(dir.path());
    let losses = |recompute: bool| {
        let mut recipe = Recipe { curriculum: stages(STAGES), ..recipe(&bench, if recompute { "again" } else { "kept" }, 30) };
        recipe.run.recompute = recompute;
        train(&recipe, &bench.options()).unwrap();
        let text = fs::read_to_string(recipe.run.out.join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| Some((line["loss"].as_f64()?, line["pull"].as_f64()))).collect::<Vec<_>>()
    };
    let (kept, again) = (losses(false), losses(true));
    assert_eq!((kept.len(), kept[0]), (30, again[0]));
    for ((loss, pull), (other_loss, other_pull)) in kept.iter().zip(&again) {
        assert!((loss - other_loss).abs() < 1e-3 * loss && pull.is_some() == other_pull.is_some());
        assert!(pull.zip(*other_pull).is_none_or(|(pull, other)| (pull - other).abs() < 1e-2), "{pull:?} {other_pull:?}");
    }
}

/// A trained reference, its recipe with stages by difficulty, and the data.
fn referenced(bench: &Bench) -> (Recipe, Prepared) {
    let reference = recipe(bench, "reference", 40);
    let model = train(&reference, &bench.options()).unwrap().model_dir;
    let mut recipe = recipe(bench, "by-difficulty", 20);
    recipe.curriculum = stages(
        r#"stage = [
            { until = 0.5, difficulty = [0.0, 0.5], mixture = { sea = 3.0, town = 1.0 } },
            { until = 1.0, difficulty = [0.0, 0.5], difficulty_to = [0.0, 1.0] },
        ]"#,
    );
    recipe.curriculum.as_mut().unwrap().reference = Some(Reference { model });
    let prepared = data::prepare(&recipe, &bench.root.join("data"), &mut |_| {}).unwrap();
    (recipe, prepared)
}

fn score(recipe: &Recipe, prepared: &Prepared, stop: bool) -> (Option<Difficulty>, usize) {
    let model = &recipe.curriculum.as_ref().unwrap().reference.as_ref().unwrap().model;
    let mut said = 0;
    (difficulty::score(recipe, model, prepared, &AtomicBool::new(stop), &mut |_| said += 1).unwrap(), said)
}

#[test]
fn documents_are_scored_once_by_the_reference() {
    let dir = tempfile::tempdir().unwrap();
    let bench = bench(dir.path());
    let (recipe, prepared) = referenced(&bench);
    // Stopped after the first documents, which are kept.
    assert_eq!(score(&recipe, &prepared, true).0, None);
    let (scored, said) = score(&recipe, &prepared, false);
    let scored = scored.unwrap();
    assert!(said > 0);
    let kept: Vec<_> = fs::read_dir(recipe.cache_dir()).unwrap().map(|entry| entry.unwrap().path()).collect();
    let kept: Vec<_> = kept.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "difficulty")).collect();
    assert_eq!(kept.len(), 4);
    // NaN is not equal to itself, so the bits.
    let bits = |scored: &Difficulty| scored.losses.iter().flatten().map(|loss| loss.to_bits()).collect::<Vec<_>>();
    let (cached, said) = score(&recipe, &prepared, false);
    assert_eq!((bits(&cached.unwrap()), said), (bits(&scored), 0));
    // A damaged file is made again, without a different result.
    let mut bytes = fs::read(&kept[0]).unwrap();
    bytes[60] ^= 1;
    fs::write(&kept[0], bytes).unwrap();
    let (repaired, said) = score(&recipe, &prepared, false);
    assert!(bits(&repaired.unwrap()) == bits(&scored) && said > 0);

    // A document alone has the loss that it has among others.
    let model = &recipe.curriculum.as_ref().unwrap().reference.as_ref().unwrap().model;
    let mut model = Ernie::load(&Checkpoint::open(model).unwrap(), &ernie_model::inference_device()).unwrap();
    model.reserve_positions(64);
    for (source, losses) in prepared.corpus.sources.iter().zip(&scored.losses) {
        let document = *source.shard.train().iter().max_by_key(|&&document| source.shard.document_len(document).min(33) % 33).unwrap();
        let mut ids = Vec::new();
        source.shard.read(document, 0, source.shard.document_len(document), &mut ids);
        let alone = model.loss(&PackedBatch::from_documents([&ids[..]]), &LossWeights::default()).cross_entropy;
        // The reference computes in 8 bits.
        assert!((alone - losses[document as usize]).abs() < 0.03 * alone, "{alone} {}", losses[document as usize]);
        assert!(source.shard.validation().iter().all(|&document| losses[document as usize].is_nan()));
    }
}

#[test]
fn rows_come_by_difficulty_and_mixture_each_before_any_comes_again() {
    let dir = tempfile::tempdir().unwrap();
    let bench = bench(dir.path());
    let (recipe, Prepared { corpus, .. }) = referenced(&bench);
    let prepared = data::prepare(&recipe, &bench.root.join("data"), &mut |_| {}).unwrap();
    let scored = score(&recipe, &prepared, false).0.unwrap();
    let (shape, config) = (BatchShape { rows: 4, length: 32 }, recipe.curriculum.clone().unwrap());
    let open = |state| CurriculumSampler::open(corpus.clone(), config.clone(), Some(&scored), 7, shape, state).unwrap();
    let mut sampler = open(None);
    let rows = Rows::new(corpus.clone(), 7, 32);
    let (mut domains, mut batches, mut saved) = ([0; 4], Vec::new(), None);
    for step in 1..=10 {
        let batch = sampler.next_batch(step, 20);
        batch.domains.chunks(32).for_each(|row| domains[row[0] as usize] += 1);
        batches.push(batch);
        if step == 4 {
            saved = Some(sampler.state().clone());
        }
    }
    // Three to one, and nothing of the others.
    assert_eq!(domains, [30, 10, 0, 0]);
    let times = sampler.state().curriculum.clone().unwrap().times;
    for source in [0, 1] {
        let hardness = |row: usize| scored.of_row(source, &rows.documents(row));
        let mut sorted: Vec<f64> = rows.of_source(source).map(hardness).collect();
        sorted.sort_by(f64::total_cmp);
        let limit = sorted[sorted.len().div_ceil(2) - 1];
        let given: Vec<u32> = rows.of_source(source).filter(|&row| hardness(row) <= limit).map(|row| times[row]).collect();
        assert!(rows.of_source(source).all(|row| times[row] == 0 || hardness(row) <= limit));
        assert!(given.iter().max().unwrap() - given.iter().min().unwrap() <= 1, "{given:?}");
    }
    // From a saved position the same batches come.
    let mut resumed = open(saved.clone());
    assert!((5..=10).all(|step| resumed.next_batch(step, 20) == batches[step as usize - 1]));
    let mut other = saved.unwrap();
    other.curriculum.as_mut().unwrap().times.pop();
    let error = CurriculumSampler::open(corpus.clone(), config.clone(), None, 7, shape, Some(other)).unwrap_err().to_string();
    assert!(error.contains("rows are saved"), "{error}");

    // The run as a whole; one that is stopped while scoring begins later.
    fs::read_dir(recipe.cache_dir()).unwrap().map(|entry| entry.unwrap().path()).for_each(|path| {
        if path.extension().is_some_and(|extension| extension == "difficulty") {
            fs::remove_file(path).unwrap();
        }
    });
    let options = bench.options();
    options.stop.store(true, Ordering::Relaxed);
    let report = train(&recipe, &options).unwrap();
    assert_eq!((report.finished, report.steps), (false, 0));
    assert!(train(&recipe, &bench.options()).unwrap().finished);
}

#[test]
fn curricula_that_cannot_be_followed_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let bench = bench(dir.path());
    let refused = |text: &str, change: &dyn Fn(&mut Recipe)| {
        let mut recipe = recipe(&bench, "refused", 10);
        recipe.curriculum = stages(text);
        change(&mut recipe);
        train(&recipe, &bench.options()).map(|_| ()).expect_err(text).to_string()
    };
    for (text, said) in [
        ("stage = []", "last stage"),
        ("stage = [{ until = 0.5 }]", "ends at 0.5"),
        ("stage = [{ until = 0.5 }, { until = 0.4 }]", "stage[1].until"),
        ("stage = [{ until = 1.0, difficulty = [0.5, 0.5] }]", "quantiles"),
        ("stage = [{ until = 1.0, difficulty_to = [0.0, 0.5] }]", "difficulty_to"),
        ("stage = [{ until = 1.0, difficulty = [0.0, 0.5] }]", "curriculum.reference"),
        ("stage = [{ until = 1.0, mixture = { sky = 1.0 } }]", "sky"),
        ("stage = [{ until = 1.0, mixture = { sea = 0.0 } }]", "every share"),
        ("stage = [{ until = 1.0, routing = \"steered\", pull = -1.0 }]", "pull"),
        ("stage = [{ until = 1.0, routing = \"steered\", reassign_every = 0 }]", "reassign_every"),
    ] {
        let message = refused(text, &|_| {});
        assert!(message.contains(said), "{text}: {message}");
    }
    let balanced = "stage = [{ until = 1.0 }]";
    assert!(refused(balanced, &|recipe| recipe.data.priority = Some(Default::default())).contains("data.priority"));
    assert!(refused(balanced, &|recipe| recipe.data.source[1].epochs_max = Some(1.0)).contains("epochs_max"));
    let dense = |recipe: &mut Recipe| {
        let model = recipe.model.as_object_mut().unwrap();
        model.retain(|key, _| !key.starts_with("moe_") && key != "architectures");
        model["model_type"] = "ernie4_5".into();
    };
    assert!(refused("stage = [{ until = 1.0, routing = \"uniform\" }]", &dense).contains("no experts"));
    let error = toml::from_str::<CurriculumConfig>("stage = [{ until = 1.0, rooting = \"uniform\" }]").unwrap_err().to_string();
    assert!(error.contains("rooting"), "{error}");

    // A reference with another tokenizer.
    let (mut recipe, _) = referenced(&bench);
    let mut other = bench.recipe("other", 3);
    other.data.cache = Some(bench.root.join("other-cache"));
    let other = train(&other, &bench.options()).unwrap().model_dir;
    recipe.curriculum.as_mut().unwrap().reference = Some(Reference { model: other });
    recipe.run.out = bench.root.join("by-another");
    let message = train(&recipe, &bench.options()).unwrap_err().to_string();
    assert!(message.contains("another tokenizer"), "{message}");
}
