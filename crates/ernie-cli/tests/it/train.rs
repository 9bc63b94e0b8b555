//! `ernie train` on a recipe that takes seconds.
use crate::program::{Run, ernie};
use std::path::Path;

/// A recipe and its text in a folder.
pub fn project() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let story = |n: usize| format!("Number {n} is a small story about a cat that sat on mat {n} and saw {} birds.\n<|endoftext|>\n", n * n);
    std::fs::create_dir(dir.path().join("data")).unwrap();
    std::fs::write(dir.path().join("data/stories.txt"), (0..400).map(story).collect::<String>()).unwrap();
    let recipe = r#"
[run]
name = "tiny"
out = "OUT"
steps = 6
validate_every = 3
validate_tokens = 512
checkpoint_every = 3
log_every = 1

[model]
model_type = "ernie4_5_moe"
vocab_size = 384
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
max_position_embeddings = 256
use_bias = false
tie_word_embeddings = true
moe_num_experts = 4
moe_k = 2
moe_intermediate_size = 16
moe_num_shared_experts = 1
moe_layer_start_index = 1
moe_layer_end_index = 1
moe_layer_interval = 1

[tokenizer]
vocab_size = 384

[data]
sequence_length = 64
batch_size = 2
validation_fraction = 0.1

[[data.source]]
name = "stories"
format = "separated"
paths = ["stories.txt"]
weight = 1.0
licence = "CC0-1.0"

[schedule]
kind = "constant"
warmup_steps = 2

[export]
dir = "EXPORT"
dtype = "int8"
"#;
    let place = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(dir.path().join("tiny.toml"), recipe.replace("OUT", &place("out")).replace("EXPORT", &place("export"))).unwrap();
    dir
}

pub fn train(dir: &Path, flags: &[&str]) -> Run {
    let (recipe, data) = (dir.join("tiny.toml"), dir.join("data"));
    ernie([&["train", recipe.to_str().unwrap(), "--data", data.to_str().unwrap(), "--quiet"], flags].concat())
}

#[test]
fn a_run_ends_in_a_model_that_generates_and_a_card_that_describes_it() {
    let dir = project();
    let report = train(dir.path(), &["--json"]).json();
    assert_eq!(report["finished"], true);
    assert_eq!(report["steps"], 6);
    assert_eq!(report["validation"][0][0], "stories");
    let export = dir.path().join("export");
    let model = export.to_str().unwrap();
    assert_eq!(ernie(["inspect", model, "--json"]).json()["ok"], true);

    let card = std::fs::read_to_string(export.join("MODEL_CARD.md")).unwrap();
    for part in ["CC0-1.0", "stories", "6 steps", "Perplexity", "loss.svg", "ernie train", "int8", "4 of width 16, 2 per token"] {
        assert!(card.contains(part), "no {part:?} in\n{card}");
    }
    assert!(export.join("loss.svg").exists());
    // The commands that the card quotes give the texts that it quotes.
    let prompt = "The old king looked out of the window and";
    let again = ernie(["generate", "--model", model, "--seed", "2", "--max-tokens", "120", prompt]).ok();
    let quoted: Vec<String> = format!("{prompt}{}", again.strip_suffix('\n').unwrap()).lines().map(|line| format!("   {line}")).collect();
    assert!(card.contains(&quoted.join("\n")), "no\n{}\nin\n{card}", quoted.join("\n"));
}

#[test]
fn a_sweep_compares_its_arms() {
    let dir = project();
    let out = dir.path().join("sweep");
    let sweep = format!(
        "name = \"rate\"\nrecipe = \"tiny.toml\"\nout = {out:?}\nseeds = [1, 2]\ntext = \"The old king\"\n[[arm]]\nname = \"as it is\"\n[[arm]]\nname = \"slow\"\nset = {{ \"optimizer.lr\" = 1e-6 }}\n"
    );
    let file = dir.path().join("sweep.toml");
    std::fs::write(&file, sweep).unwrap();
    let data = dir.path().join("data");
    let (file, data) = (file.to_str().unwrap(), data.to_str().unwrap());
    let report = ernie(["train", file, "--sweep", "--data", data, "--quiet", "--json"]).json();
    assert_eq!(report["runs"].as_array().unwrap().len(), 4);
    assert!(report["arms"][1]["against_first"]["loss_difference"]["mean"].as_f64().unwrap() > 0.0, "{report}");
    // Finished: the table comes at once.
    let table = ernie(["train", file, "--sweep", "--data", data, "--quiet"]).ok();
    assert!(table.contains("slow") && table.contains("report.html") && table.contains("least used"), "{table}");
    // The experts of both arms, on the sweep's text.
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert_eq!(page.matches("seed 1, token by token</figcaption><img").count(), 2);
    ernie(["train", file, "--sweep", "--steps", "3"]).fails(2, &["--steps"]);
}

#[test]
fn a_dry_run_reports_and_trains_nothing() {
    let dir = project();
    let plan = train(dir.path(), &["--dry-run", "--json"]).json();
    assert_eq!(plan["steps"], 6);
    assert_eq!(plan["tokens"], 6 * 2 * 64);
    assert_eq!(plan["sources"][0]["licence"], "CC0-1.0");
    assert!(plan["predicted_peak_bytes"].as_u64().unwrap() > plan["memory"]["parameters"].as_u64().unwrap());
    let table = train(dir.path(), &["--dry-run"]).ok();
    assert!(table.contains("MiB at the peak"), "{table}");
    assert!(table.contains("stories") && table.contains("active per token"), "{table}");
    assert!(!dir.path().join("out/checkpoints").exists() && !dir.path().join("export").exists());
}

#[test]
fn a_trial_run_goes_elsewhere_and_exports_nothing() {
    let dir = project();
    let out = dir.path().join("trial");
    let text = train(dir.path(), &["--steps", "2", "--out", out.to_str().unwrap()]).ok();
    assert!(text.contains("steps     2") && text.contains("perplexity"), "{text}");
    assert!(out.join("model/config.json").exists());
    assert!(!dir.path().join("export").exists() && !dir.path().join("out").exists());
}

#[test]
fn a_profile_shows_where_the_time_went() {
    let dir = project();
    let out = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let table = train(dir.path(), &["--steps", "2", "--profile", "--out", &out("asked")]).ok();
    for row in ["forward", "gate up", "experts", "attention", "head", "optimizer", "data", "rest of the steps", "2 steps and all"] {
        assert!(table.contains(row), "no {row:?} in\n{table}");
    }
    let json = train(dir.path(), &["--steps", "2", "--profile", "--json", "--out", &out("json")]).json();
    assert!(json["profile"]["operators"][0]["forward"].as_f64().unwrap() > 0.0, "{json}");
    let plain = train(dir.path(), &["--steps", "2", "--out", &out("unasked")]).ok();
    assert!(plain.contains("perplexity") && !plain.contains("forward") && !plain.contains("optimizer"), "{plain}");
    ernie(["train", "tiny.toml", "--sweep", "--profile"]).fails(2, &["--profile"]);
}

#[test]
fn the_peak_of_memory_is_the_predicted_one() {
    let dir = project();
    let file = dir.path().join("tiny.toml");
    // Large enough that the process itself does not count: some 200 to 350 MiB.
    let small = std::fs::read_to_string(&file).unwrap();
    let dense = small
        .replace("hidden_size = 32", "hidden_size = 256")
        .replace("intermediate_size = 48", "intermediate_size = 768")
        .replace("num_attention_heads = 2", "num_attention_heads = 8")
        .replace("num_key_value_heads = 1", "num_key_value_heads = 4")
        .replace("head_dim = 16", "head_dim = 32")
        .replace("num_hidden_layers = 2", "num_hidden_layers = 5")
        .replace("sequence_length = 64\nbatch_size = 2", "sequence_length = 128\nbatch_size = 16");
    let experts =
        dense.replace("moe_intermediate_size = 16", "moe_intermediate_size = 256").replace("layer_end_index = 1", "layer_end_index = 4");
    let dense = dense.replace("layer_start_index = 1", "layer_start_index = 0").replace("layer_interval = 1", "layer_interval = 100");
    let mut worst = 0.0f64;
    for (name, recipe) in [("dense", &dense), ("experts", &experts)] {
        for (precision, recompute, accumulated) in [("f32", false, 1), ("int8-mixed", false, 1), ("f32", true, 1), ("f32", false, 2)] {
            let recipe = recipe.replace("[run]", &format!("[run]\nrecompute = {recompute}"));
            let recipe = recipe.replace("batch_size = 16", &format!("batch_size = 16\ngradient_accumulation = {accumulated}"));
            std::fs::write(&file, recipe).unwrap();
            let out = dir.path().join(format!("{name}-{precision}-{recompute}-{accumulated}"));
            let flags = ["--steps", "3", "--precision", precision, "--out", out.to_str().unwrap(), "--threads", "2", "--json"];
            let predicted = train(dir.path(), &[&flags[..], &["--dry-run"]].concat()).json()["predicted_peak_bytes"].as_f64().unwrap();
            let peak = train(dir.path(), &flags).json()["peak_rss_bytes"].as_f64();
            let Some(peak) = peak else { return };
            let (error, mib) = (predicted / peak - 1.0, f64::from(1 << 20));
            println!(
                "{name} {precision} recompute {recompute} batches {accumulated}: {:.0} of {:.0} MiB, {:+.1}%",
                predicted / mib,
                peak / mib,
                error * 100.0
            );
            assert!(peak > 120.0 * mib, "too small to say anything: {peak}");
            worst = worst.max(error.abs());
        }
    }
    // The allocator gives memory back a second after it is freed, so the peak is lower where steps take longer: by up to a tenth on a busy machine.
    assert!(worst <= 0.15, "a prediction is off by {worst}");
}

#[test]
fn what_cannot_train_is_refused_with_the_fix() {
    let dir = project();
    let file = dir.path().join("tiny.toml");
    let recipe = std::fs::read_to_string(&file).unwrap();
    let with = |from: &str, to: &str| {
        assert!(recipe.contains(from));
        std::fs::write(&file, recipe.replace(from, to)).unwrap();
        train(dir.path(), &[])
    };
    with("log_every", "log_evry").fails(1, &["tiny.toml", "log_evry", "did you mean `log_every`"]);
    with("stories.txt", "tales.txt").fails(1, &["tales.txt", "finds no file"]);
    with("model_type = \"ernie4_5_moe\"", "model_type = \"other\"").fails(1, &["model_type", "other"]);
    with("batch_size = 2", "batch_size = 200000000").fails(1, &["batch_size"]);
    assert!(!dir.path().join("out/checkpoints").exists());
    ernie(["train", "none.toml"]).fails(1, &["none.toml"]);
}
