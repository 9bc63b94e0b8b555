//! `ernie inspect` on whole and broken models.
use crate::generate::truncate;
use crate::program::ernie;
use crate::tiny_model;
use std::path::Path;

fn inspect(dir: &Path, flags: &[&str]) -> crate::program::Run {
    ernie([&["inspect", dir.to_str().unwrap()], flags].concat())
}

#[test]
fn sizes_follow_from_the_config() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path());
    let found = inspect(dir.path(), &["--json", "--tensors"]).json();
    assert_eq!(found["ok"], true);
    assert_eq!(found["family"], "moe");
    assert_eq!(found["experts"]["top_k"], 2);
    // Embedding; per layer attention and two norms; one dense SwiGLU; router, bias, experts and a shared one; final norm.
    let expert = 3 * 32 * 32;
    let rest = tiny_model::VOCAB * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 32) + 3 * 32 * 48 + 4 * 32 + 4 + expert + 32;
    assert_eq!(found["parameters"]["total"], rest + 4 * expert);
    assert_eq!(found["parameters"]["active"], rest + 2 * expert);
    assert_eq!(found["memory_bytes"]["f32"], 4 * (rest + 4 * expert));
    assert_eq!(found["kv_bytes_per_token"]["bf16"], 2 * 2 * 2 * 8 * 2);
    let tensors = found["tensors"].as_array().unwrap();
    assert!(
        tensors.iter().any(|t| t["name"] == "model.layers.1.mlp.experts.3.down_proj.weight" && t["shape"] == serde_json::json!([32, 32]))
    );
    let text = inspect(dir.path(), &["--tensors"]).ok();
    for part in ["mixture of experts", "4 query heads", "96 tokens", "model.norm.weight", "Nothing is wrong"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn every_problem_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path());
    // Another width for the dense layer: its three matrices are now misshapen.
    edit_config(dir.path(), "\"intermediate_size\": 48", "\"intermediate_size\": 40");
    let run = inspect(dir.path(), &[]).fails(1, &["error: ", "3 problems"]);
    for part in ["gate_proj", "up_proj", "down_proj", "[40, 32]", "[48, 32]"] {
        assert!(run.stdout.contains(part), "no {part:?} in {run:#?}");
    }
}

#[test]
fn a_truncated_file_is_named_and_the_config_still_described() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path());
    truncate(&dir.path().join("model.safetensors"));
    let run = inspect(dir.path(), &["--json"]).fails(1, &["cannot be used"]);
    let found: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(found["ok"], false);
    assert_eq!(found["hidden_size"], 32);
    assert!(found["problems"][0].as_str().unwrap().contains("model.safetensors"), "{found}");
}

#[test]
fn an_unknown_value_in_the_config_is_a_problem_of_its_field() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path());
    edit_config(dir.path(), "\"silu\"", "\"gelu\"");
    let run = inspect(dir.path(), &[]).fails(1, &["1 problem"]);
    assert!(run.stdout.contains("hidden_act") && run.stdout.contains("gelu"), "{run:#?}");
}

#[test]
fn a_broken_tokenizer_and_a_missing_directory_are_problems() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path());
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let run = inspect(dir.path(), &[]).fails(1, &["1 problem"]);
    assert!(run.stdout.contains("tokenizer.json"), "{run:#?}");
    let run = inspect(&dir.path().join("none"), &[]).fails(1, &["1 problem"]);
    assert!(run.stdout.contains("does not exist"), "{run:#?}");
}

#[test]
fn the_built_in_model_is_whole() {
    let found = ernie(["inspect", "--json"]).json();
    assert_eq!(found["ok"], true, "{found}");
    assert!(found["parameters"]["active"].as_u64() < found["parameters"]["total"].as_u64());
}

fn edit_config(dir: &Path, from: &str, to: &str) {
    let file = dir.join("config.json");
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains(from), "{text}");
    std::fs::write(file, text.replace(from, to)).unwrap();
}

#[test]
fn a_template_that_fails_on_every_conversation_is_found() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path());
    std::fs::write(dir.path().join("chat_template.jinja"), "{% for m in messages %}{{ m.content | no_such_filter }}{% endfor %}").unwrap();
    let run = inspect(dir.path(), &[]).fails(1, &["error: "]);
    assert!(run.stdout.contains("chat template") && run.stdout.contains("no_such_filter"), "{run:#?}");
}
