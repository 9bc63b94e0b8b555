//! The profile of a run: every operator that the network has, and rows that sum to the time there was.
use std::time::Instant;

use ernie_train::{Profile, TrainOptions, train};

use crate::run::Bench;

fn names(profile: &Profile) -> Vec<&str> {
    profile.operators.iter().map(|operator| operator.operator.as_str()).collect()
}

#[test]
fn a_profile_has_every_operator_and_sums_to_the_time_of_the_steps() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let options = TrainOptions { profile: true, ..bench.options() };
    let start = Instant::now();
    let report = train(&bench.recipe("out", 4), &options).unwrap();
    let wall = start.elapsed().as_secs_f64();
    let profile = report.profile.unwrap();
    assert_eq!(profile.steps, 4);
    let all = ["embedding", "norm", "qkv", "attention", "output", "gate_up", "down", "experts", "linear", "head"];
    assert_eq!(names(&profile), all);
    for operator in &profile.operators {
        assert!(operator.forward > 0.0 && operator.backward > 0.0, "{operator:?}");
    }
    for (name, _, seconds) in profile.rows() {
        assert!(seconds > 0.0, "{name}");
    }
    let operators = profile.operators.iter().map(|operator| operator.forward + operator.backward).sum::<f64>();
    let steps = operators + profile.data + profile.optimizer + profile.rest;
    assert!((steps - profile.step_seconds).abs() < 1e-6, "{steps} of {}", profile.step_seconds);
    let rows = profile.rows().iter().map(|(_, _, seconds)| seconds).sum::<f64>();
    assert!((rows - profile.seconds()).abs() < 1e-6);
    assert!(profile.seconds() <= wall, "{} of {wall}", profile.seconds());
    // What the report calls the seconds of the steps ends before the telemetry, the profile's after.
    assert!(report.seconds <= profile.step_seconds);
    let metrics = std::fs::read_to_string(dir.path().join("out/metrics.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    assert_eq!((last["kind"].as_str(), last["step"].as_u64()), (Some("profile"), Some(4)));
    assert_eq!(serde_json::from_value::<Profile>(last["profile"].clone()).unwrap(), profile);

    // Layers that are computed again, and gates; and without asking there is no profile.
    let toml = bench.toml("again", 4).replace("[run]\n", "[run]\nrecompute = true\n");
    let gates = "[model.ernie_rs.context_gate]\nthreshold = 0.1\n\n[tokenizer]";
    let mut recipe = ernie_train::Recipe::from_toml(&toml.replace("[tokenizer]", gates), dir.path()).unwrap();
    let profile = train(&recipe, &options).unwrap().profile.unwrap();
    assert_eq!(names(&profile).len(), 12, "{profile:?}");
    recipe.run.out = dir.path().join("unasked");
    assert!(train(&recipe, &bench.options()).unwrap().profile.is_none());
    assert!(!std::fs::read_to_string(dir.path().join("unasked/metrics.jsonl")).unwrap().contains("profile"));
}
