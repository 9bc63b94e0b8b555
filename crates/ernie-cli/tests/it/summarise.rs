//! `ernie eval summarise`.
use crate::program::{command, ernie, ernie_with_input};
use crate::tiny_model;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

const STORIES: [(&str, &str); 3] = [
    ("Once upon a time there was a little dog who liked to play in the garden.", "A dog plays in the garden."),
    ("The sun was warm, and the girl went out to the wood with her mother.", "A girl and her mother go to the wood."),
    ("床前明月光，疑是地上霜。", "月光像霜。"),
];

fn stories(dir: &Path) -> String {
    let lines = STORIES.map(|(document, summary)| json!({"document": document, "summary": [summary]}).to_string() + "\n");
    write(dir, "stories.jsonl", &lines.concat())
}

fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn lines(file: &str) -> Vec<Value> {
    fs::read_to_string(file).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn summaries_are_those_of_ernie_generate_and_their_scores_those_of_ernie_eval_score() {
    let dir = tempfile::tempdir().unwrap();
    let (data, file) = (stories(dir.path()), dir.path().join("predictions.jsonl"));
    let file = file.to_str().unwrap();
    let flags = ["eval", "summarise", "--data", &data, "--format", "jsonl", "--max-tokens", "24", "--predictions", file, "--json"];
    let found = ernie([&flags[..], &["--batch", "2"]].concat()).json();
    let predictions = lines(file);
    assert_eq!(predictions.len(), STORIES.len());
    let (mut texts, mut references) = (String::new(), String::new());
    for (prediction, (document, summary)) in predictions.iter().zip(STORIES) {
        let generate = ["generate", "-", "--temperature", "0", "--max-tokens", "24", "--json"];
        let generated = ernie_with_input(generate, &format!("{document}\nTL;DR:")).json();
        assert_eq!(prediction["prediction"], generated["text"]);
        assert_eq!(prediction["finish_reason"], generated["finish_reason"]);
        assert_eq!(prediction["output_tokens"], generated["tokens"].as_array().unwrap().len());
        assert_eq!(prediction["references"], json!([summary]));
        texts += &(generated["text"].as_str().unwrap().replace('\n', " ") + "\n");
        references += &format!("{summary}\n");
    }
    let (texts, references) = (write(dir.path(), "texts.txt", &texts), write(dir.path(), "references.txt", &references));
    let scores = ernie(["eval", "score", &texts, &references, "--json"]).json();
    for name in ["rouge1", "rouge2", "rouge_l"] {
        let (mean, expected) = (found[name]["mean"].as_f64().unwrap(), scores[name]["f1"].as_f64().unwrap());
        assert!((mean - expected).abs() < 1e-12, "{name}: {mean} for {expected}");
        assert!(found[name]["low"].as_f64().unwrap() <= mean && mean <= found[name]["high"].as_f64().unwrap());
    }
    assert_eq!((&found["examples"], &found["of"], &found["cut"]), (&json!(3), &json!(3), &json!(0)));
    let sum = |key: &str| predictions.iter().map(|prediction| prediction[key].as_u64().unwrap()).sum::<u64>();
    assert_eq!((&found["prompt_tokens"], &found["output_tokens"]), (&json!(sum("prompt_tokens")), &json!(sum("output_tokens"))));

    // A file of summaries may be written again, and the same numbers come.
    let again = ernie([&flags[..], &["--batch", "1", "--limit", "2"]].concat()).json();
    assert_eq!((lines(file), &again["of"]), (predictions[..2].to_vec(), &json!(2)));
}

#[test]
fn documents_are_cut_and_chinese_is_counted_by_characters() {
    let dir = tempfile::tempdir().unwrap();
    let line = |document: &str| json!({"document": document, "summary": "月"}).to_string() + "\n";
    let data = write(dir.path(), "test.jsonl", &(line("月。") + &line(&"月光。".repeat(200))));
    // The model goes on with what it has read: a prompt that ends in the answer gets some of it.
    let flags = ["eval", "summarise", "--data", dir.path().to_str().unwrap(), "--format", "jsonl", "--prompt", "{document}\\n床前明"];
    let small = ["--context", "40", "--max-tokens", "8"];
    let table = ernie([&flags[..], &small].concat()).ok();
    assert!(table.contains("ROUGE-L") && table.contains("2 examples, 1 documents cut to fit 40 tokens"), "{table}");
    assert!(table.contains("ROUGE-1         0.0000"), "{table}");
    let chinese = ernie([&flags[..], &small, &["--chinese", "--json"]].concat()).json();
    assert!(chinese["rouge1"]["mean"].as_f64().unwrap() > 0.0, "{chinese} of {data}");
}

#[test]
fn what_cannot_be_done_is_said_before_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let data = stories(dir.path());
    let flags = ["eval", "summarise", "--data", &data, "--format", "jsonl"];
    let with = |extra: &[&str]| ernie([&flags[..], extra].concat());
    with(&["--prompt", "TL;DR:"]).fails(2, &["--prompt", "{document} 0 times"]);
    with(&["--prompt", "{document} {query}"]).fails(2, &["--prompt", "no questions"]);
    with(&["--context", "100000"]).fails(2, &["--context", "512"]);
    with(&["--context", "64", "--max-tokens", "64"]).fails(2, &["--max-tokens", "64"]);
    with(&["--context", "66", "--max-tokens", "64"]).fails(1, &["1: 2 tokens for the prompt"]);
    with(&["--predictions", &data]).fails(1, &["stories.jsonl", "choose another name"]);
    let nowhere = dir.path().join("nowhere/file.jsonl");
    with(&["--predictions", nowhere.to_str().unwrap()]).fails(1, &["nowhere is no folder"]);
    ernie(["eval", "summarise", "--data", &data, "--format", "scitldr"]).fails(1, &["stories.jsonl, line 1", "`source`", "scitldr"]);
    ernie(["eval", "summarise", "--data", "nowhere", "--format", "qmsum"]).fails(1, &["nowhere"]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
}

#[cfg(unix)]
#[test]
fn ctrl_c_prints_what_is_done() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path());
    let line = json!({"document": "a cat sat on a mat", "summary": "a cat"}).to_string() + "\n";
    let (data, file) = (write(dir.path(), "many.jsonl", &line.repeat(200_000)), dir.path().join("predictions.jsonl"));
    let model = dir.path().to_str().unwrap();
    let mut child = command()
        .args(["eval", "summarise", "--model", model, "--data", &data, "--format", "jsonl", "--max-tokens", "40", "--batch", "1", "--json"])
        .arg("--predictions")
        .arg(&file)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first line of progress comes when the work begins.
    let mut begun = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut begun).unwrap();
    assert_eq!(begun, "0/200000 summaries\n");
    std::thread::sleep(std::time::Duration::from_secs(1));
    let killed = std::process::Command::new("sh").args(["-c", &format!("kill -INT {}", child.id())]).status().unwrap();
    assert!(killed.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let done = found["examples"].as_u64().unwrap();
    assert!((1..200_000).contains(&done) && found["of"] == 200_000, "{found}");
    assert_eq!(lines(file.to_str().unwrap()).len() as u64, done);
}
