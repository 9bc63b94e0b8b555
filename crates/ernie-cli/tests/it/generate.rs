//! `ernie generate` and `ernie logits`.
use crate::program::{command, ernie, ernie_with_input};
use crate::tiny_model;
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;
use std::process::Stdio;

fn model() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path());
    let path = dir.path().to_str().unwrap().to_owned();
    (dir, path)
}

fn rows(output: &Value) -> Vec<Vec<f64>> {
    serde_json::from_value(output["logits"].clone()).unwrap()
}

fn argmax(row: &[f64]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a))).unwrap()
}

#[test]
fn greedy_tokens_are_the_argmax_of_the_logits() {
    let (_dir, model) = model();
    let flags = ["--temperature", "0", "--max-tokens", "5", "--ignore-eos", "--json"];
    let output = ernie([&["generate", "--model", &model, "--ids", "270,300,280"], &flags[..]].concat()).json();
    let tokens: Vec<usize> = serde_json::from_value(output["tokens"].clone()).unwrap();
    assert_eq!(tokens.len(), 5);
    assert_eq!(output["finish_reason"], "length");
    assert!(output["timings"]["first_token_seconds"].as_f64().unwrap() >= 0.0);
    let mut ids = vec![270, 300, 280];
    for token in tokens {
        let list = ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let logits = rows(&ernie(["logits", "--model", &model, "--ids", &list]).json());
        assert_eq!(logits.len(), 1);
        assert_eq!(logits[0].len(), tiny_model::VOCAB);
        assert_eq!(argmax(&logits[0]), token, "after {ids:?}");
        ids.push(token);
    }
}

#[test]
fn last_gives_that_many_rows_and_each_is_what_a_shorter_prompt_gives() {
    let (_dir, model) = model();
    let both = rows(&ernie(["logits", "--model", &model, "--ids", "270,300,280", "--last", "2", "--dtype", "f32"]).json());
    let shorter = rows(&ernie(["logits", "--model", &model, "--ids", "270,300"]).json());
    assert_eq!(both.len(), 2);
    assert_eq!(both[0], shorter[0]);
}

#[test]
fn ids_need_no_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write_without_tokenizer(dir.path());
    let model = dir.path().to_str().unwrap();
    let flags = ["--ids", "270,300", "--temperature", "0", "--max-tokens", "3", "--ignore-eos"];
    let output = ernie([&["generate", "--model", model, "--json"], &flags[..]].concat()).json();
    assert_eq!(output["text"], Value::Null);
    assert_eq!(output["prompt_tokens"], json!([270, 300]));
    let plain = ernie([&["generate", "--model", model], &flags[..]].concat()).ok();
    let listed: Vec<u32> = plain.trim().split(',').map(|id| id.parse().unwrap()).collect();
    assert_eq!(output["tokens"], json!(listed));
    ernie(["generate", "--model", model, "hello"]).fails(1, &["has no tokenizer", "--ids"]);
}

#[test]
fn text_and_its_ids_and_standard_input_are_the_same_prompt() {
    let (_dir, model) = model();
    let flags = ["--model", &model, "--temperature", "0", "--max-tokens", "8", "--json"];
    let text = ernie([&["generate", "hello"], &flags[..]].concat()).json();
    let input = ernie_with_input([&["generate", "-"], &flags[..]].concat(), "hello").json();
    let ids = text["prompt_tokens"].as_array().unwrap().iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let by_ids = ernie([&["generate", "--ids", &ids], &flags[..]].concat()).json();
    assert_eq!(text["tokens"], input["tokens"]);
    assert_eq!(text["tokens"], by_ids["tokens"]);
    assert_eq!(text["text"], by_ids["text"]);
}

#[test]
fn the_streamed_text_is_the_text_of_the_json() {
    let (_dir, model) = model();
    let flags = ["generate", "hello", "--model", &model, "--seed", "3", "--max-tokens", "20"];
    let streamed = ernie(flags).ok();
    let output = ernie([&flags[..], &["--json"]].concat()).json();
    assert_eq!(streamed, format!("{}\n", output["text"].as_str().unwrap()));
    assert_eq!(output["seed"], 3);
}

#[test]
fn a_seed_repeats_the_draws_and_threads_do_not_change_them() {
    let (_dir, model) = model();
    let tokens = |extra: &[&str]| {
        let flags = ["generate", "hello", "--model", &model, "--max-tokens", "24", "--temperature", "1.5", "--ignore-eos", "--json"];
        ernie([&flags[..], extra].concat()).json()["tokens"].clone()
    };
    assert_eq!(tokens(&["--seed", "5"]), tokens(&["--seed", "5"]));
    assert_eq!(tokens(&["--seed", "5"]), tokens(&["--seed", "5", "--threads", "1"]));
    assert_ne!(tokens(&["--seed", "5"]), tokens(&["--seed", "6"]));
}

#[test]
fn stop_ids_end_the_text() {
    let (_dir, model) = model();
    let flags = ["generate", "--ids", "270,300", "--model", &model, "--temperature", "0", "--max-tokens", "10", "--ignore-eos", "--json"];
    let free = ernie(flags).json();
    let third = &free["tokens"][2];
    let first_at = free["tokens"].as_array().unwrap().iter().position(|id| id == third).unwrap();
    let stopped = ernie([&flags[..], &["--stop-id", &third.to_string()]].concat()).json();
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["tokens"].as_array().unwrap()[..], free["tokens"].as_array().unwrap()[..=first_at]);
}

#[test]
fn generation_ends_with_the_context() {
    let (_dir, model) = model();
    let flags = ["generate", "--ids", "270", "--model", &model, "--temperature", "0", "--max-tokens", "1000", "--ignore-eos", "--json"];
    let output = ernie(flags).json();
    assert_eq!(output["finish_reason"], "length");
    // The last position's token is chosen, but has no place of its own.
    assert_eq!(output["tokens"].as_array().unwrap().len(), tiny_model::CONTEXT);
}

#[test]
fn bad_ids_and_long_prompts_are_refused() {
    let (_dir, model) = model();
    let too_high = tiny_model::VOCAB.to_string();
    ernie(["generate", "--model", &model, "--ids", &format!("3,{too_high}")]).fails(1, &["error: ", &too_high, "position 1"]);
    ernie(["logits", "--model", &model, "--ids", &too_high]).fails(1, &[&too_high, "position 0"]);
    let long = vec!["3"; tiny_model::CONTEXT + 1].join(",");
    ernie(["generate", "--model", &model, "--ids", &long]).fails(1, &["97", "96"]);
    ernie(["logits", "--model", &model, "--ids", &long]).fails(1, &["97", "96"]);
    ernie(["generate", "--model", &model, ""]).fails(1, &["prompt is empty"]);
}

#[test]
fn a_missing_or_broken_model_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("none");
    ernie(["generate", "x", "--model", missing.to_str().unwrap()]).fails(1, &["error: ", "none", "does not exist"]);
    ernie(["logits", "--ids", "1", "--model", missing.to_str().unwrap()]).fails(1, &["none", "does not exist"]);
    let empty = dir.path().to_str().unwrap();
    ernie(["logits", "--ids", "1", "--model", empty]).fails(1, &["config.json"]);
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    ernie(["logits", "--ids", "1", "--model", empty]).fails(1, &["config.json"]);
    tiny_model::write(dir.path());
    truncate(&dir.path().join("model.safetensors"));
    ernie(["generate", "x", "--model", empty]).fails(1, &["model.safetensors"]);
}

pub fn truncate(file: &Path) {
    let length = std::fs::metadata(file).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(length / 2).unwrap();
}

#[test]
fn a_reader_that_leaves_ends_the_program_quietly() {
    let (_dir, model) = model();
    let flags = ["generate", "--ids", "270", "--model", &model, "--max-tokens", "90", "--ignore-eos"];
    let mut child = command().args(flags).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!((child.wait().unwrap().code(), stderr.as_str()), (Some(0), ""));
}
