//! A run learns, leaves its records, and refuses what cannot train before it writes anything.
use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use super::run::{Bench, bits};
use ernie_checkpoint::{Checkpoint, Tokenizer};
use ernie_train::{Precision, Recipe, Sweep, TrainError, evaluate, train};

#[test]
fn a_run_learns_and_leaves_its_records() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let recipe = bench.recipe("run", 60);
    let report = train(&recipe, &bench.options()).unwrap();
    assert!(report.finished);
    assert_eq!((report.steps, report.tokens), (60, 60 * 2 * 4 * 32));

    let out = dir.path().join("run");
    let lines = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()).collect::<Vec<_>>();
    let losses = lines.iter().filter(|line| line["kind"] == "train").map(|line| line["loss"].as_f64().unwrap()).collect::<Vec<_>>();
    assert_eq!(losses.len(), 60);
    // Uniform guessing costs ln 400 = 6.0 nats; the grammar has 6 bits a sentence.
    assert!(losses[0] > 5.5 && losses[59] < 0.5 * losses[0], "from {} to {}", losses[0], losses[59]);
    for key in ["mtp", "balance", "z", "expert_peak_load", "grad_norm", "lr", "tok_s"] {
        assert!(lines[5][key].is_number(), "{key} of {}", lines[5]);
    }
    assert!(fs::read_to_string(out.join("loss.svg")).unwrap().starts_with("<svg"));
    assert!(fs::read_dir(out.join("tensorboard")).unwrap().count() == 1);
    assert_eq!(fs::read_dir(out.join("checkpoints")).unwrap().count(), 2, "keep_last");

    // The model directory is whole: it opens, validates, tokenises, and scores as the run said.
    let model = out.join("model");
    let checkpoint = Checkpoint::open(&model).unwrap();
    checkpoint.validate().unwrap();
    assert!(checkpoint.contains("model.mtp_block.0.mlp.gate_proj.weight"));
    let tokenizer = Tokenizer::from_dir(&model).unwrap();
    let ids = tokenizer.encode("the cat likes 花.", false).unwrap();
    assert_eq!(tokenizer.decode(&ids, false), "the cat likes 花.");
    let corpus = bench.corpus(&recipe);
    // What is prepared is all that it takes.
    let (data, away) = (bench.root.join("data"), bench.root.join("away"));
    fs::rename(&data, &away).unwrap();
    assert_eq!(evaluate(&recipe, &checkpoint, &corpus).unwrap(), report.validation);
    fs::rename(&away, &data).unwrap();
    assert!(report.validation[0].1 < 0.6 * losses[0]);

    // A finished run is left as it is.
    let before = bits(&model);
    assert!(train(&recipe, &bench.options()).unwrap().finished);
    assert_eq!(bits(&model), before);
}

#[test]
fn the_correction_bias_moves_by_whole_rates_and_stays_out_of_the_gradient() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let recipe = bench.recipe("run", 8);
    let report = train(&recipe, &bench.options()).unwrap();
    let checkpoint = Checkpoint::open(&report.model_dir).unwrap();
    let bias = checkpoint.tensor("model.layers.1.mlp.moe_statics.e_score_correction_bias").unwrap().to_f32().unwrap();
    assert!(bias.iter().any(|&b| b != 0.0));
    for b in bias {
        let rates = b as f64 / 1e-3;
        assert!((rates - rates.round()).abs() < 1e-3 && rates.abs() <= 8.0, "{b}");
    }
}

#[test]
fn a_stopped_run_goes_on_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let whole = train(&bench.recipe("whole", 20), &bench.options()).unwrap();

    let recipe = bench.recipe("stopped", 20);
    let options = bench.options();
    let stop = options.stop.clone();
    let watched = dir.path().join("stopped/metrics.jsonl");
    let watcher = std::thread::spawn(move || {
        while fs::read_to_string(&watched).map_or(0, |text| text.lines().count()) < 4 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        stop.store(true, Ordering::Relaxed);
    });
    let first = train(&recipe, &options).unwrap();
    watcher.join().unwrap();
    assert!(!first.finished && first.steps < 20, "stopped after {} steps", first.steps);
    let second = train(&recipe, &bench.options()).unwrap();
    assert!(second.finished);
    assert_eq!(bits(&second.model_dir), bits(&whole.model_dir));
    assert_eq!(second.validation, whole.validation);
}

#[test]
fn a_run_in_8_bits_learns_as_well_and_goes_on_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let recipe = |out: &str, steps| {
        let mut recipe = bench.recipe(out, steps);
        recipe.run.precision = Precision::Int8Mixed;
        recipe
    };
    let exact = train(&bench.recipe("exact", 150), &bench.options()).unwrap();
    let rounded = train(&recipe("rounded", 150), &bench.options()).unwrap();
    let (exact, loss) = (exact.validation[0].1, rounded.validation[0].1);
    assert!((loss - exact).abs() < 0.05 * exact && loss != exact, "{loss} against {exact}");
    // Validation is in f32: the model's own figure, whatever computed its training.
    let checkpoint = Checkpoint::open(&rounded.model_dir).unwrap();
    let recipe_of_exact = bench.recipe("exact", 150);
    assert_eq!(evaluate(&recipe_of_exact, &checkpoint, &bench.corpus(&recipe_of_exact)).unwrap(), rounded.validation);

    // As if killed after step 147, whose checkpoint is the newest that is left.
    let whole = bits(&rounded.model_dir);
    fs::remove_dir_all(dir.path().join("rounded/checkpoints/step-00000150")).unwrap();
    fs::remove_dir_all(&rounded.model_dir).unwrap();
    let resumed = train(&recipe("rounded", 150), &bench.options()).unwrap();
    assert_eq!(bits(&resumed.model_dir), whole);
    // Another precision is another run.
    let error = train(&bench.recipe("rounded", 150), &bench.options()).unwrap_err();
    assert!(matches!(error, TrainError::OtherRun { .. }), "{error}");
}

#[test]
fn recomputing_changes_the_last_bits_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let whole = train(&bench.recipe("whole", 12), &bench.options()).unwrap();
    let mut recipe = bench.recipe("recomputed", 12);
    recipe.run.recompute = true;
    let recomputed = train(&recipe, &bench.options()).unwrap();
    // To the bit in dense models (the model's own tests); in this one of experts sums have another order.
    let (loss, expected) = (recomputed.validation[0].1, whole.validation[0].1);
    assert!((loss - expected).abs() < 1e-3 * expected, "{loss} against {expected}");
    let error = train(&bench.recipe("recomputed", 12), &bench.options()).unwrap_err();
    assert!(matches!(error, TrainError::OtherRun { .. }), "{error}");
    if cfg!(target_os = "linux") {
        assert!(recomputed.peak_rss_bytes.unwrap() > 1 << 20);
    }
}

#[test]
fn metrics_are_the_same_after_a_stop_between_two_lines() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let losses = |run: &str| {
        let text = fs::read_to_string(dir.path().join(run).join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter(|line| line["kind"] == "train").map(|line| line["loss"].to_string()).collect::<Vec<_>>()
    };
    let recipe = |out: &str| {
        let mut recipe = bench.recipe(out, 12);
        recipe.run.log_every = 5;
        recipe
    };
    train(&recipe("whole"), &bench.options()).unwrap();
    // As if killed between the lines of steps 5 and 10: the newest checkpoint is that of step 9.
    let cut = recipe("cut");
    train(&cut, &bench.options()).unwrap();
    fs::remove_dir_all(dir.path().join("cut/checkpoints/step-00000012")).unwrap();
    train(&cut, &bench.options()).unwrap();
    assert_eq!(losses("cut"), losses("whole"));
}

#[test]
fn two_processes_do_not_train_into_one_folder() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    fs::create_dir_all(dir.path().join("run")).unwrap();
    let held = fs::File::create(dir.path().join("run/.lock")).unwrap();
    held.lock().unwrap();
    let error = train(&bench.recipe("run", 4), &bench.options()).unwrap_err();
    assert!(matches!(error, TrainError::Busy { .. }), "{error}");
    drop(held);
    assert!(train(&bench.recipe("run", 4), &bench.options()).unwrap().finished);
}

#[test]
fn another_recipe_does_not_continue_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    train(&bench.recipe("run", 4), &bench.options()).unwrap();
    let mut other = bench.recipe("run", 4);
    other.optimizer.lr *= 2.0;
    let error = train(&other, &bench.options()).unwrap_err();
    assert!(matches!(error, TrainError::OtherRun { .. }), "{error}");
    assert!(error.to_string().contains("run.out"));
}

#[test]
fn what_cannot_train_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let cases: [(&str, &str, &str); 12] = [
        ("use_bias = false", "use_bais = false", "use_bais"),
        ("eos_token_id = 2", "eos_token_id = 9999", "eos_token_id"),
        ("num_nextn_predict_layers = 1", "num_nextn_predict_layers = 2", "num_nextn_predict_layers"),
        ("batch_size = 4", "batch_size = 288230376151711744", "gradient_accumulation"),
        ("decay_fraction = 0.25", "decay_fraction = 0.95", "schedule"),
        ("lr = 5e-3", "learning_rate = 5e-3", "lr"),
        ("\"corpus.txt\"", "\"missing.txt\"", "missing.txt"),
        ("\"corpus.txt\"", "\"../data/corpus.txt\"", "../data/corpus.txt"),
        ("batch_size = 4", "batch_size = 400000000", "gradient_accumulation"),
        ("sequence_length = 32", "sequence_length = 128", "max_position_embeddings"),
        ("moe_k = 2", "moe_k = 9", "moe_k"),
        ("warmup_steps = 2", "warmup_steps = 200", "warmup"),
    ];
    for (from, to, named) in cases {
        let toml = bench.toml("refused", 10);
        assert!(toml.contains(from), "{from}");
        let error = match Recipe::from_toml(&toml.replacen(from, to, 1), Path::new("recipe.toml")) {
            Err(error) => error.to_string(),
            Ok(recipe) => train(&recipe, &bench.options()).unwrap_err().to_string(),
        };
        assert!(error.contains(named), "{to}: the message does not name {named}: {error}");
        assert!(!dir.path().join("refused/checkpoints").exists() && !dir.path().join("refused/metrics.jsonl").exists(), "{to}");
    }
    fs::write(dir.path().join("data/empty.txt"), "").unwrap();
    let recipe = Recipe::from_toml(&bench.toml("refused", 10).replacen("corpus.txt", "empty.txt", 1), Path::new("r")).unwrap();
    let error = train(&recipe, &bench.options()).unwrap_err().to_string();
    assert!(error.contains("empty") && error.contains("grammar"), "{error}");
}

#[test]
fn a_diverging_run_stops_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let toml = bench.toml("diverging", 200).replacen("lr = 5e-3", "lr = 9.0\nclip_norm = 0.0\nweight_decay = 9.0", 1);
    let error = train(&Recipe::from_toml(&toml, Path::new("r")).unwrap(), &bench.options()).unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { .. }), "{error}");
    assert!(error.to_string().contains("optimizer.lr"));
}

#[test]
fn every_recipe_of_the_repository_is_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let files =
        |folder: &Path| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).collect::<Vec<_>>();
    let mut recipes: Vec<(PathBuf, Recipe)> =
        files(&folder).into_iter().map(|path| (path.clone(), Recipe::from_file(&path).unwrap())).collect();
    assert!(recipes.len() >= 2);
    // Beside the sweeps lie the recipes that they start from, which are no sweeps themselves.
    let sweeps: Vec<PathBuf> = files(&folder.join("sweeps"));
    for path in &sweeps {
        match fs::read_to_string(path).unwrap().contains("[[arm]]") {
            true => recipes.extend(Sweep::from_file(path).unwrap().runs().unwrap().into_iter().map(|run| (path.clone(), run.recipe))),
            false => recipes.push((path.clone(), Recipe::from_file(path).unwrap())),
        }
    }
    assert!(recipes.len() >= sweeps.len() + 8, "{} recipes", recipes.len());
    for (path, recipe) in recipes {
        let config = ernie_train::model_config(&recipe).unwrap();
        recipe.validate(&config, 8 << 30).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        // A trial of any length keeps a shape that can run.
        for steps in [1, 10, 50] {
            let mut trial = recipe.clone();
            trial.set_steps(steps);
            trial.validate(&config, 8 << 30).unwrap_or_else(|error| panic!("{} at {steps} steps: {error}", path.display()));
        }
    }
}
