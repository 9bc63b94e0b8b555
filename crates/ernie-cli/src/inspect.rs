//! `ernie inspect`: what a model is, what it needs, and what is wrong with it.
use anyhow::Context;
use ernie_checkpoint::{ChatTemplateOptions, Checkpoint, Config, Family, Layout, Message, ParameterCounts, TensorGroup, TensorRole};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use crate::model::ModelArgument;

/// Show a model's sizes, memory and tensors, and everything that is wrong with it
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Show a model's family, sizes, parameters, memory and tensors. Every weight is read and checked: missing, surplus and misshapen \
        tensors, values that are not numbers, damaged files. If anything is wrong all of it is listed and the exit code is 1.",
    after_long_help = "Examples:\n  \
        ernie inspect                          the built-in model\n  \
        ernie inspect path/to/model\n  \
        ernie inspect path/to/model --tensors\n  \
        ernie inspect path/to/model --json"
)]
pub struct InspectArguments {
    /// Directory of a model in Hugging Face form [default: the built-in model]
    dir: Option<PathBuf>,
    /// The same as DIR, as the other commands spell it
    #[arg(long, value_name = "DIR", conflicts_with = "dir")]
    model: Option<PathBuf>,
    /// List every tensor with its type and shape
    #[arg(long)]
    tensors: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What there is to say about a model. Of a broken one, what could still be read.
#[derive(Serialize)]
struct Findings {
    model: String,
    ok: bool,
    problems: Vec<String>,
    #[serde(flatten)]
    description: Option<Description>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<TensorRow>>,
}

#[derive(Serialize)]
struct Description {
    family: &'static str,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_moe_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    tie_word_embeddings: bool,
    experts: Option<Experts>,
    parameters: Parameters,
    memory_bytes: ByDtype,
    kv_bytes_per_token: ByDtype,
    /// Of layers that see a window only, for a whole text.
    kv_bytes_of_window: ByDtype,
    stored_bytes: Option<u64>,
    stored_layout: Option<&'static str>,
}

#[derive(Serialize)]
struct Experts {
    routed: usize,
    top_k: usize,
    shared: usize,
    intermediate_size: usize,
}

#[derive(Serialize)]
struct Parameters {
    total: u64,
    active: u64,
    embedding: u64,
    head: u64,
    mtp: u64,
    vision: u64,
}

/// Bytes, by the type of the elements. Norms, biases and routers are f32 in any case; int8 has a scale per row.
#[derive(Serialize, Default)]
struct ByDtype {
    f32: u64,
    bf16: u64,
    int8: u64,
}

#[derive(Serialize)]
struct TensorRow {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
}

/// Runs the command.
pub fn run(arguments: &InspectArguments) -> anyhow::Result<()> {
    let model = ModelArgument::new(arguments.dir.as_deref().or(arguments.model.as_deref()));
    let findings = inspect(&model, arguments.tensors);
    let text = if arguments.json { serde_json::to_string(&findings)? + "\n" } else { table(&findings) };
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    match findings.problems.len() {
        0 => Ok(()),
        1 => anyhow::bail!("{} cannot be used: 1 problem", findings.model),
        several => anyhow::bail!("{} cannot be used: {several} problems", findings.model),
    }
}

fn inspect(model: &ModelArgument, list_tensors: bool) -> Findings {
    let mut problems = Vec::new();
    let mut note = |error: anyhow::Error| problems.push(one_line(&error));
    let config = model.config().map_err(&mut note).ok();
    // Without a config there is nothing to hold the weights against.
    let checkpoint = config.as_ref().and_then(|_| model.checkpoint().map_err(&mut note).ok());
    for error in checkpoint.iter().flat_map(Checkpoint::problems) {
        note(error.into());
    }
    if let Some(config) = &config {
        match model.tokenizer_if_any() {
            Ok(Some(tokenizer)) if tokenizer.vocab_size() > config.vocab_size => note(anyhow::anyhow!(
                "the tokenizer has {} pieces and the model's vocab_size is {}; they do not belong together",
                tokenizer.vocab_size(),
                config.vocab_size
            )),
            Ok(_) => {}
            Err(error) => note(error),
        }
        // A template can be well-formed and yet fail on every conversation.
        let trial = [Message::new("user", "Hello!")];
        let rendered = model.chat_template().and_then(|template| {
            template.render(&trial, true, &ChatTemplateOptions::default()).context("the chat template fails on a trial message")
        });
        if let Err(error) = rendered {
            note(error);
        }
    }
    let tensors = checkpoint.as_ref().filter(|_| list_tensors).map(tensor_rows);
    // The checkpoint knows better than its config.json whether the head is tied.
    let config = checkpoint.as_ref().map(|checkpoint| checkpoint.config().clone()).or(config);
    let description = config.map(|config| describe(&config, checkpoint.as_ref()));
    Findings { model: model.name(), ok: problems.is_empty(), problems, description, tensors }
}

/// The error and its causes.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn tensor_rows(checkpoint: &Checkpoint) -> Vec<TensorRow> {
    let row = |name: &str| {
        let (dtype, shape) = (checkpoint.dtype(name)?.name(), checkpoint.shape(name)?.to_vec());
        Some(TensorRow { name: name.to_owned(), dtype, shape })
    };
    checkpoint.names().filter_map(row).collect()
}

fn describe(config: &Config, checkpoint: Option<&Checkpoint>) -> Description {
    let ParameterCounts { total, active, embedding, head, vision, mtp } = config.parameter_counts();
    Description {
        family: match config.family {
            Family::Dense => "dense",
            Family::Moe => "moe",
            Family::VlMoe => "vl_moe",
        },
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_moe_layers: (0..config.num_hidden_layers).filter(|&layer| config.is_moe_layer(layer)).count(),
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        tie_word_embeddings: config.tie_word_embeddings,
        experts: config.moe.as_ref().map(|moe| Experts {
            routed: moe.num_experts,
            top_k: moe.top_k,
            shared: moe.num_shared_experts,
            intermediate_size: moe.intermediate_size,
        }),
        parameters: Parameters { total, active, embedding, head, mtp, vision },
        memory_bytes: weight_bytes(config, checkpoint),
        kv_bytes_per_token: by_dtype(|bytes| config.kv_bytes_per_token(bytes)),
        kv_bytes_of_window: by_dtype(|bytes| config.kv_bytes_of_window(bytes)),
        stored_bytes: checkpoint.map(Checkpoint::file_bytes),
        stored_layout: checkpoint.map(|checkpoint| match checkpoint.layout() {
            Layout::HuggingFace => "hugging_face",
            Layout::Paddle => "paddle",
        }),
    }
}

fn by_dtype(bytes_of: impl Fn(usize) -> u64) -> ByDtype {
    ByDtype { f32: bytes_of(4), bf16: bytes_of(2), int8: bytes_of(1) }
}

/// Memory of all weights: those that the model must have, and the optional ones that the checkpoint has.
fn weight_bytes(config: &Config, checkpoint: Option<&Checkpoint>) -> ByDtype {
    let mut bytes = ByDtype::default();
    for spec in config.tensor_specs() {
        let tied_head = spec.group == TensorGroup::Head && config.tie_word_embeddings;
        if tied_head || !(spec.required || checkpoint.is_some_and(|checkpoint| checkpoint.contains(&spec.name))) {
            continue;
        }
        let elements = spec.shape.iter().product::<usize>() as u64;
        let rows = spec.shape.first().copied().unwrap_or(0) as u64;
        let matrix = matches!(spec.role, TensorRole::Projection | TensorRole::Embedding);
        bytes.f32 += 4 * elements;
        bytes.bf16 += if matrix { 2 * elements } else { 4 * elements };
        bytes.int8 += if matrix { elements + 4 * rows } else { 4 * elements };
    }
    bytes
}

fn table(findings: &Findings) -> String {
    let mut out = String::new();
    let mut row = |label: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{label:<18}{value}");
    };
    row("model", findings.model.clone());
    if let Some(d) = &findings.description {
        let family = match d.family {
            "dense" => "ERNIE-4.5, dense",
            "moe" => "ERNIE-4.5, mixture of experts",
            _ => "ERNIE-4.5, vision-language mixture of experts",
        };
        row("family", family.to_owned());
        row(
            "layers",
            match d.num_moe_layers {
                0 => d.num_hidden_layers.to_string(),
                experts => format!("{}, {experts} of them with experts", d.num_hidden_layers),
            },
        );
        row("hidden size", d.hidden_size.to_string());
        row(
            "attention",
            format!("{} query heads, {} key/value heads, of size {}", d.num_attention_heads, d.num_key_value_heads, d.head_dim),
        );
        if d.num_moe_layers < d.num_hidden_layers {
            row("feed-forward", format!("width {}", d.intermediate_size));
        }
        if let Some(e) = &d.experts {
            row("experts", format!("{} of width {}, {} per token, {} shared", e.routed, e.intermediate_size, e.top_k, e.shared));
        }
        let head = if d.tie_word_embeddings { "the output head is the embedding" } else { "with an output head of its own" };
        row("vocabulary", format!("{}, {head}", d.vocab_size));
        row("context", format!("{} tokens", d.max_position_embeddings));
        let p = &d.parameters;
        let share = 100.0 * p.active as f64 / p.total.max(1) as f64;
        row("parameters", format!("{} total, {} active per token ({share:.0}%)", count(p.total), count(p.active)));
        if p.vision > 0 {
            row("", format!("{} in the vision side", count(p.vision)));
        }
        if p.mtp > 0 {
            row("", format!("{} in the multi-token-prediction block", count(p.mtp)));
        }
        let m = &d.memory_bytes;
        row("weights", format!("{} as f32, {} as bf16, {} as int8", bytes(m.f32), bytes(m.bf16), bytes(m.int8)));
        if let (Some(stored), Some(layout)) = (d.stored_bytes, d.stored_layout) {
            let layout = if layout == "paddle" { "the -Paddle layout" } else { "Hugging Face layout" };
            row("files", format!("{} in {layout}", bytes(stored)));
        }
        let kv = &d.kv_bytes_per_token;
        row("KV per token", format!("{} as f32, {} as bf16", bytes(kv.f32), bytes(kv.bf16)));
        let window = &d.kv_bytes_of_window;
        if window.f32 > 0 {
            row("KV of windows", format!("{} as f32, {} as bf16", bytes(window.f32), bytes(window.bf16)));
        }
    }
    if let Some(tensors) = &findings.tensors {
        let width = tensors.iter().map(|tensor| tensor.name.len()).max().unwrap_or(0);
        out.push('\n');
        for TensorRow { name, dtype, shape } in tensors {
            let _ = writeln!(out, "{name:<width$}  {dtype:<4}  {shape:?}");
        }
        let _ = writeln!(out, "{} tensors", tensors.len());
    }
    if findings.ok {
        out.push_str("\nNothing is wrong with it.\n");
    } else {
        out.push_str("\nWhat is wrong with it:\n");
        for problem in &findings.problems {
            let _ = writeln!(out, "  - {problem}");
        }
    }
    out
}

/// 9,216,000 → "9.22 M".
pub fn count(n: u64) -> String {
    scaled(n, 1000.0, &["", " k", " M", " G", " T"])
}

/// 1,536 → "1.50 KiB".
pub fn bytes(n: u64) -> String {
    scaled(n, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB"])
}

fn scaled(n: u64, base: f64, units: &[&str]) -> String {
    let mut value = n as f64;
    let mut unit = 0;
    while value >= base && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    if unit == 0 { format!("{n}{}", units[0]) } else { format!("{value:.2}{}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn numbers_are_scaled() {
        assert_eq!(count(999), "999");
        assert_eq!(count(9_216_000), "9.22 M");
        assert_eq!(bytes(1_536), "1.50 KiB");
        assert_eq!(bytes(12), "12 B");
    }

    #[test]
    fn int8_memory_counts_scales_and_leaves_vectors_alone() {
        let json = r#"{"model_type": "ernie4_5", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 32, "max_position_embeddings": 64, "tie_word_embeddings": true}"#;
        let config = Config::from_json(json, Path::new("config.json")).unwrap();
        // Embedding 32×8; q 8×8, k and v 4×8, o 8×8; gate and up 16×8, down 8×16; three norms of 8.
        let (matrices, rows, vectors) = (32 * 8 + 2 * 64 + 2 * 32 + 3 * 128, 32 + 8 + 4 + 4 + 8 + 16 + 16 + 8, 3 * 8);
        let bytes = weight_bytes(&config, None);
        assert_eq!(bytes.f32, 4 * (matrices + vectors));
        assert_eq!(bytes.bf16, 2 * matrices + 4 * vectors);
        assert_eq!(bytes.int8, matrices + 4 * rows + 4 * vectors);
    }
}
