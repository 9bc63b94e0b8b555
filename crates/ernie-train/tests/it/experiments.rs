//! Experiments: rows drawn by priority, layers that see a window, and sweeps over both.
use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::run::{Bench, bits};
use ernie_checkpoint::Checkpoint;
use ernie_train::data::priority::PriorityConfig;
use ernie_train::sweep::SweepReport;
use ernie_train::{Recipe, Sweep, TrainError, recipe, train};

#[test]
fn drawing_by_priority_learns_and_goes_on_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let recipe = |out: &str| {
        let mut recipe = bench.recipe(out, 120);
        recipe.data.priority = Some(PriorityConfig { staleness: 20, ..PriorityConfig::default() });
        recipe
    };
    let report = train(&recipe("drawn"), &bench.options()).unwrap();
    let by_mixture = train(&bench.recipe("mixture", 120), &bench.options()).unwrap();
    let (loss, expected) = (report.validation[0].1, by_mixture.validation[0].1);
    assert!(loss < 1.15 * expected, "{loss} against {expected}");
    let metrics = fs::read_to_string(dir.path().join("drawn/metrics.jsonl")).unwrap();
    assert!(metrics.lines().filter(|line| line.contains("\"train\"")).all(|line| line.contains("sampling_gain")));

    assert!(report.sampling.as_ref().unwrap().rows.iter().sum::<u64>() > 50);
    assert_eq!(by_mixture.sampling, None);

    // As if killed after step 117.
    let whole = bits(&report.model_dir);
    fs::remove_dir_all(dir.path().join("drawn/checkpoints/step-00000120")).unwrap();
    fs::remove_dir_all(&report.model_dir).unwrap();
    assert_eq!(bits(&train(&recipe("drawn"), &bench.options()).unwrap().model_dir), whole);
    // Other priorities are another run.
    let mut other = recipe("drawn");
    other.data.priority.as_mut().unwrap().alpha = 0.5;
    assert!(matches!(train(&other, &bench.options()).unwrap_err(), TrainError::OtherRun { .. }));
}

#[test]
fn a_run_keeps_the_reference_it_was_begun_with() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let model = train(&bench.recipe("reference", 40), &bench.options()).unwrap().model_dir;
    let recipe = |out: &str, reference: &Path| {
        let mut recipe = bench.recipe(out, 30);
        recipe.data.priority =
            Some(PriorityConfig { reference: Some(reference.to_path_buf()), least_gain: 1.0, ..PriorityConfig::default() });
        recipe
    };
    let report = train(&recipe("drawn", &model), &bench.options()).unwrap();
    let (drawn, newest) = (dir.path().join("drawn"), dir.path().join("drawn/checkpoints/step-00000030"));
    let whole = bits(&report.model_dir);
    let kill = || {
        // As if killed after step 27.
        fs::remove_dir_all(&newest).unwrap();
        fs::remove_dir_all(drawn.join("model")).unwrap();
    };
    kill();
    assert_eq!(bits(&train(&recipe("drawn", &model), &bench.options()).unwrap().model_dir), whole);
    // It matters what the reference is: from the first draws on, rows are others without one.
    let mut without = recipe("without", &model);
    without.data.priority.as_mut().unwrap().reference = None;
    assert_ne!(bits(&train(&without, &bench.options()).unwrap().model_dir), whole);

    // Another model in the same place.
    kill();
    let kept = dir.path().join("kept");
    fs::rename(&model, &kept).unwrap();
    let other = train(&bench.recipe("reference-of-20", 20), &bench.options()).unwrap().model_dir;
    fs::rename(&other, &model).unwrap();
    let error = train(&recipe("drawn", &model), &bench.options()).unwrap_err();
    assert!(matches!(error, TrainError::OtherReference { .. }) && error.to_string().contains("reference"), "{error}");
    // A checkpoint that does not say which it was goes on, and says so from then on.
    let state = drawn.join("checkpoints/step-00000027/trainer.json");
    let mut position: serde_json::Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
    fs::rename(&model, &other).unwrap();
    fs::rename(&kept, &model).unwrap();
    assert_eq!(position.as_object_mut().unwrap().remove("reference").unwrap().as_str().unwrap().len(), 32);
    fs::write(&state, position.to_string()).unwrap();
    assert_eq!(bits(&train(&recipe("drawn", &model), &bench.options()).unwrap().model_dir), whole);
    assert!(fs::read_to_string(newest.join("trainer.json")).unwrap().contains("\"reference\""));

    // References that cannot be used.
    let refused = |reference: &Path, change: &dyn Fn(&mut Recipe)| {
        let mut recipe = recipe("refused", reference);
        change(&mut recipe);
        train(&recipe, &bench.options()).unwrap_err().to_string()
    };
    assert!(refused(&dir.path().join("absent"), &|_| {}).contains("absent"));
    let small = |out: &str, change: &dyn Fn(&mut Recipe)| {
        let mut recipe = bench.recipe(out, 3);
        change(&mut recipe);
        train(&recipe, &bench.options()).unwrap().model_dir
    };
    let other = small("other-pieces", &|recipe| recipe.tokenizer.max_piece_chars = 2);
    assert!(refused(&other, &|_| {}).contains("another tokenizer"));
    let short = small("short", &|recipe| recipe.model["max_position_embeddings"] = 32.into());
    assert!(refused(&short, &|recipe| recipe.data.sequence_length = 64).contains("made for 32 tokens"));
}

#[test]
fn gates_are_brought_to_their_share_and_cost_little() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let gated = |out: &str, recompute: bool| {
        let mut recipe = bench.recipe(out, 150);
        recipe.model["ernie_rs"] = serde_json::json!({"context_gate": {"threshold": 0.5}});
        (recipe.loss.gate, recipe.loss.gate_target, recipe.run.recompute) = (4.0, 0.5, recompute);
        train(&recipe, &bench.options()).unwrap()
    };
    let (plain, report) = (train(&bench.recipe("plain", 150), &bench.options()).unwrap(), gated("gated", false));
    let (loss, expected) = (report.validation[0].1, plain.validation[0].1);
    assert!(loss < 1.15 * expected, "{loss} against {expected}");
    let active = |run: &str| -> Vec<f64> {
        let text = fs::read_to_string(dir.path().join(run).join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| line["active_heads"].as_f64()).collect()
    };
    let shares = active("gated");
    let last = shares[140..].iter().sum::<f64>() / 10.0;
    assert!(shares[0] > 0.9 && (last - 0.5).abs() < 0.15, "{last} of the heads are active at last, {} at first", shares[0]);
    assert!(Checkpoint::open(&report.model_dir).unwrap().contains("model.layers.1.self_attn.context_gate.decay"));
    // On validation text the same, layer by layer.
    let layers = report.active_heads.iter().map(|heads| heads.share).sum::<f64>() / 2.0;
    assert!(report.active_heads.len() == 2 && (layers - last).abs() < 0.1 && plain.active_heads.is_empty(), "{:?}", report.active_heads);
    // And what the record has at its last validation: correlations where heads open and shut.
    let text = fs::read_to_string(dir.path().join("gated/metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let recorded = &lines.iter().rfind(|line| line["kind"] == "validation").unwrap()["heads"];
    assert_eq!(*recorded, serde_json::to_value(&report.active_heads).unwrap());
    assert!(report.active_heads.iter().any(|heads| heads.correlation.is_some()), "{recorded}");
    // Layers that are computed again for their gradients choose the same heads.
    gated("recomputed", true);
    assert!((active("recomputed")[20] - shares[20]).abs() < 0.02);
}

const SWEEP: &str = r#"
name = "windows & priorities"
recipe = "base.toml"
out = "OUT"
seeds = [1, 2]

[[arm]]
name = "as it is"

[[arm]]
name = "windows"
[arm.set]
"model.ernie_rs" = { layer_types = ["sliding_attention", "full_attention"], sliding_window = 8 }
"run.steps" = 20

[[arm]]
name = "priority"
[arm.set]
"data.priority.alpha" = 1.5
"#;

fn sweep(bench: &Bench, text: &str) -> Result<Sweep, recipe::Error> {
    let file = bench.root.join("sweep.toml");
    fs::write(bench.root.join("base.toml"), bench.toml("unused", 24)).unwrap();
    fs::write(&file, text.replace("OUT", bench.root.join("sweep").to_str().unwrap())).unwrap();
    Sweep::from_file(&file)
}

#[test]
fn a_sweep_trains_every_arm_once_and_compares_them() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let sweep = sweep(&bench, SWEEP).unwrap();
    let mut said = Vec::new();
    // Stopped when the third run begins.
    let options = bench.options();
    let report = sweep.run(&options, &mut |doing| {
        said.push(doing.to_owned());
        if doing.contains("3 of 6") {
            options.stop.store(true, Ordering::Relaxed);
        }
    });
    assert!(!report.unwrap().finished());
    let report = sweep.run(&bench.options(), &mut |doing| said.push(doing.to_owned())).unwrap();
    assert!(report.finished());
    for number in 1..=6 {
        let times = said.iter().filter(|doing| doing.starts_with(&format!("run {number} of 6"))).count();
        assert_eq!(times, if number == 3 { 2 } else { 1 }, "{said:?}");
    }
    let model = Checkpoint::open(&bench.root.join("sweep/windows/seed-2/model")).unwrap();
    assert_eq!(model.config().window(0), Some(8));

    let [plain, windows, priority] = &report.arms[..] else { panic!("{} arms", report.arms.len()) };
    assert!(plain.against_first.is_none() && plain.loss.unwrap().runs == 2 && plain.loss.unwrap().standard_error.unwrap() > 0.0);
    let difference = windows.against_first.as_ref().unwrap().loss_difference;
    assert!((difference.mean - (windows.loss.unwrap().mean - plain.loss.unwrap().mean)).abs() < 1e-9 && difference.mean != 0.0);
    assert_eq!(windows.tokens.unwrap().mean, 20.0 * 256.0);
    assert!(priority.sources.iter().any(|(name, _)| name == "grammar"));
    // The runs end where their own records say, and the first arm is at its own loss at its last step.
    assert!(report.runs.iter().all(|run| (run.curve.last().unwrap().mean() - run.loss).abs() < 1e-9));
    let page = fs::read_to_string(bench.root.join("sweep/report.html")).unwrap();
    assert!(page.contains("windows &amp; priorities") && page.matches("<svg").count() == 6);
    let json: serde_json::Value = serde_json::from_slice(&fs::read(bench.root.join("sweep/report.json")).unwrap()).unwrap();
    assert_eq!(json["runs"].as_array().unwrap().len(), 6);
    assert!(json["runs"][5]["origin"]["threads"].as_u64().unwrap() > 0);
    assert_eq!((&json["arms"][1]["set"]["run.steps"], &json["recipe"]["run"]["steps"]), (&20.into(), &24.into()));

    // Nothing is left to do.
    let mut again = Vec::new();
    assert!(sweep.run(&bench.options(), &mut |doing| again.push(doing.to_owned())).unwrap().finished());
    assert!(again.is_empty(), "{again:?}");
    finished_runs_are_of_their_recipe(&bench);
}

/// What is finished stands for the recipe that it was trained by and for no other.
fn finished_runs_are_of_their_recipe(bench: &Bench) {
    let run = |from: &str, to: &str| {
        assert!(SWEEP.contains(from), "{from}");
        sweep(bench, &SWEEP.replacen(from, to, 1)).unwrap().run(&bench.options(), &mut |doing| panic!("{to}: {doing}"))
    };
    let refused = |from: &str, to: &str| match run(from, to) {
        Err(TrainError::OtherRun { out, saved, given }) => {
            assert!(out.ends_with("windows/seed-1") && given.len() == 32, "{out:?} {given}");
            saved
        }
        other => panic!("{to}: {other:?}"),
    };
    let steps = ("\"run.steps\" = 20", "\"run.steps\" = 21");
    refused(steps.0, steps.1);
    // Also when a run before it would be trained first.
    let [first, away] = ["report.json", "away.json"].map(|name| bench.root.join("sweep/as-it-is/seed-1").join(name));
    fs::rename(&first, &away).unwrap();
    refused(steps.0, steps.1);
    fs::rename(&away, &first).unwrap();
    // Decides no weight, but what the figures are.
    refused(steps.0, "\"run.steps\" = 20\n\"run.validate_tokens\" = 128");
    refused(
        steps.0,
        "\"run.steps\" = 20\n\"data.source\" = [{ name = \"grammar\", format = \"separated\", paths = [\"corpus.txt\"], weight = 2.0, licence = \"\" }]",
    );
    // Nor how often a checkpoint is written.
    run(steps.0, "\"run.steps\" = 20\n\"run.checkpoint_every\" = 7").unwrap();

    finished_runs_are_of_their_text(bench, &run);

    // A report that does not say: its checkpoint knows.
    let dir = bench.root.join("sweep/windows/seed-1");
    let mut report: serde_json::Value = serde_json::from_slice(&fs::read(dir.join("report.json")).unwrap()).unwrap();
    assert!(report.as_object_mut().unwrap().remove("origin").is_some());
    fs::write(dir.join("report.json"), report.to_string()).unwrap();
    run(steps.0, steps.0).unwrap();
    assert_eq!(refused(steps.0, steps.1).len(), 32);
    fs::remove_dir_all(dir.join("checkpoints")).unwrap();
    assert_eq!(refused(steps.0, steps.0), "unknown");
}

/// Nor is one taken for a run on other files.
fn finished_runs_are_of_their_text(bench: &Bench, run: &dyn Fn(&str, &str) -> Result<SweepReport, TrainError>) {
    let unchanged = ("seeds = [1, 2]", "seeds = [1, 2]");
    let (corpus, away) = (bench.root.join("data/corpus.txt"), bench.root.join("away.txt"));
    let text = fs::read(&corpus).unwrap();
    // Written again as it was, or not there: nothing has changed that could be seen.
    fs::write(&corpus, &text).unwrap();
    run(unchanged.0, unchanged.1).unwrap();
    fs::rename(&corpus, &away).unwrap();
    run(unchanged.0, unchanged.1).unwrap();
    fs::write(&corpus, [&text[..], b" the dog likes the sun."].concat()).unwrap();
    match run(unchanged.0, unchanged.1) {
        Err(error @ TrainError::OtherText { .. }) => {
            let message = error.to_string();
            assert!(message.contains("as-it-is/seed-1") && message.contains("source `grammar`"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    // Reports of before do not say what the files were, and are believed.
    let runs =
        ["as-it-is", "windows", "priority"].into_iter().flat_map(|arm| [1, 2].map(|seed| format!("sweep/{arm}/seed-{seed}/report.json")));
    let saved: Vec<_> = runs.map(|name| bench.root.join(name)).map(|path| (fs::read(&path).unwrap(), path)).collect();
    for (json, path) in &saved {
        let mut report: serde_json::Value = serde_json::from_slice(json).unwrap();
        let text = report["origin"].as_object_mut().unwrap().remove("text").unwrap();
        assert_eq!((text.as_array().unwrap().len(), &text[0][0]), (1, &"grammar".into()));
        fs::write(path, report.to_string()).unwrap();
    }
    run(unchanged.0, unchanged.1).unwrap();
    saved.iter().for_each(|(json, path)| fs::write(path, json).unwrap());
    fs::rename(&away, &corpus).unwrap();
}

#[test]
fn a_sweep_that_cannot_run_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    for (from, to, said) in [
        ("seeds = [1, 2]", "seeds = []", "nothing to run"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "given twice"),
        ("name = \"windows\"", "name = \"../windows\"", "plain name"),
        ("name = \"windows\"", "name = \"priority\"", "another arm"),
        ("\"run.steps\" = 20", "\"run.seed\" = 20", "the sweep's"),
        ("\"run.steps\" = 20", "\"run.name.x\" = 20", "no table"),
        ("\"run.steps\" = 20", "\"run.stepz\" = 20", "stepz"),
        ("sliding_window = 8", "sliding_windows = 8", "sliding_windows"),
        ("recipe = \"base.toml\"", "recipe = \"none.toml\"", "none.toml"),
        ("[arm.set]", "[arm.sets]", "sets"),
        ("\"run.steps\" = 20", "\"data.validation_fraction\" = 0.0", "data.validation_fraction` of arm `windows"),
    ] {
        let error = sweep(&bench, &SWEEP.replacen(from, to, 1)).map(|_| ()).expect_err(said).to_string();
        assert!(error.contains(said), "{to}: {error}");
    }
}

#[test]
fn a_sweep_without_what_it_shows_is_refused_before_it_costs_much() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let with_text = |words: usize| {
        let text = format!("out = \"OUT\"\ntext = \"{}\"", "the cat sees a ball. ".repeat(words));
        sweep(&bench, &SWEEP.replacen("out = \"OUT\"", &text, 1)).unwrap()
    };
    let mut said = Vec::new();
    let error = with_text(200).run(&bench.options(), &mut |doing| said.push(doing.to_owned())).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("`text`") && error.contains("arm `as it is` is made for 64"), "{error}");
    assert!(!bench.root.join("sweep/as-it-is/seed-1/metrics.jsonl").exists());
    // One that fits is no obstacle; the run is stopped before its first step.
    let options = bench.options();
    assert!(!with_text(1).run(&options, &mut |_| options.stop.store(true, Ordering::Relaxed)).unwrap().finished());
    assert!(bench.root.join("sweep/as-it-is/seed-1/metrics.jsonl").exists());

    // A split that leaves no document for validation is known after a run, which is not then taken for a loss of 0.
    let tiny = SWEEP.replacen("\"run.steps\" = 20", "\"run.steps\" = 8\n\"data.validation_fraction\" = 1e-9", 1);
    let tiny = tiny.replacen("[[arm]]\nname = \"as it is\"\n", "", 1);
    let error = sweep(&bench, &tiny).unwrap().run(&bench.options(), &mut |_| {}).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("no validation documents"), "{error}");
}

#[test]
fn priorities_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let refused = |change: &dyn Fn(&mut Recipe)| {
        let mut recipe = bench.recipe("refused", 5);
        recipe.data.priority = Some(PriorityConfig::default());
        change(&mut recipe);
        train(&recipe, &bench.options()).unwrap_err().to_string()
    };
    let set = |change: fn(&mut PriorityConfig)| move |recipe: &mut Recipe| change(recipe.data.priority.as_mut().unwrap());
    assert!(refused(&set(|p| p.floor = 0.0)).contains("data.priority.floor"));
    assert!(refused(&set(|p| p.beta = [0.0, 1.5])).contains("data.priority.beta"));
    assert!(refused(&set(|p| p.alpha = f64::NAN)).contains("data.priority.alpha"));
    assert!(refused(&set(|p| p.staleness = 0)).contains("data.priority.staleness"));
    assert!(refused(&|recipe: &mut Recipe| recipe.data.source[0].epochs_max = Some(2.0)).contains("epochs_max"));
}
