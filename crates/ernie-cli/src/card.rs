//! The model card: what the exported weights are made of and what they can do, in figures and samples of those weights.
use ernie_checkpoint::{ChatTemplate, ChatTemplateOptions, Checkpoint, Config, Message, Tokenizer};
use ernie_engine::{Model, SamplingParams};
use ernie_train::data::SourceReport;
use ernie_train::{Recipe, Report};
use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::path::Path;

use crate::encoding::{self, StreamDecoder};
use crate::inspect;

/// Sampling of the card's samples; `ernie generate` has the same defaults.
const TEMPERATURE: f32 = 0.8;
const TOP_P: f32 = 0.95;
const MAX_TOKENS: usize = 120;

/// What the samples continue or answer: (as a chat message, text). The seed of each is its place, from 1.
const PROMPTS: [(bool, &str); 10] = [
    (false, "Once upon a time there was a little rabbit who"),
    (false, "The old king looked out of the window and"),
    (false, "One day, Lily found a red ball in the garden."),
    (false, "Long ago in a village by the river, a girl"),
    (false, "春风"),
    (false, "明月"),
    (true, "Hello! How are you?"),
    (true, "I would like a coffee, please."),
    (true, "你好！"),
    (true, "我想看一部电影，你有什么推荐吗？"),
];

/// Everything the card tells.
pub struct Card<'a> {
    /// The run.
    pub recipe: &'a Recipe,
    /// Its file, as named on the command line.
    pub recipe_file: &'a Path,
    /// How it went.
    pub report: &'a Report,
    /// The model directory that the card lies in.
    pub dir: &'a Path,
    /// The form of its weights.
    pub dtype: &'a str,
    /// What it was trained on.
    pub sources: Vec<SourceReport>,
    /// Loss per source of the exported weights, in nats per token.
    pub validation: Vec<(String, f64)>,
    /// Text that the exported weights generated.
    pub samples: Vec<Sample>,
    /// Its sizes.
    pub config: &'a Config,
    /// Bytes of its weight files.
    pub weight_bytes: u64,
}

/// One sample, as it came.
pub struct Sample {
    chat: bool,
    prompt: &'static str,
    seed: u64,
    text: String,
}

/// Generates the samples with the weights in `dir`: one for each prompt that leaves room in the model's context, the first that comes.
pub fn samples(dir: &Path) -> anyhow::Result<Vec<Sample>> {
    let model = Model::load(&Checkpoint::open(dir)?)?;
    let tokenizer = Tokenizer::from_dir(dir)?;
    let template = ChatTemplate::from_dir(dir)?.unwrap_or_else(ChatTemplate::builtin);
    let sample = |(index, (chat, prompt)): (usize, (bool, &'static str))| -> anyhow::Result<Option<Sample>> {
        let seed = index as u64 + 1;
        let mut params =
            SamplingParams { temperature: TEMPERATURE, top_p: TOP_P, max_tokens: MAX_TOKENS, seed, ..SamplingParams::default() };
        let ids = if chat {
            params.stop_ids = ernie_checkpoint::end_of_turn_ids(&tokenizer);
            encoding::encode_conversation(&tokenizer, &template, &[Message::new("user", prompt)], &ChatTemplateOptions::default())?
        } else {
            tokenizer.encode(prompt, true)?
        };
        if ids.len() >= model.config().max_position_embeddings {
            return Ok(None);
        }
        let decoder = StreamDecoder::new(Some(&tokenizer));
        let generation = ernie_engine::generate(&model, &ids, &params, decoder, |_| ControlFlow::Continue(()))?;
        Ok(Some(Sample { chat, prompt, seed, text: generation.text }))
    };
    PROMPTS.into_iter().enumerate().map(sample).filter_map(Result::transpose).collect()
}

/// "1 h 32 min", "4 min 10 s", "12 s".
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

impl Card<'_> {
    /// The card's text.
    pub fn markdown(&self) -> String {
        let mut out = format!("# {}\n\n", self.recipe.run.name);
        let _ = writeln!(
            out,
            "A small language model trained from random weights by `ernie`. It writes and talks like the texts below, knows little, and may be \
             wrong or rude: use it to try the program, not as a source of facts.\n"
        );
        self.write_architecture(&mut out);
        self.write_data(&mut out);
        self.write_training(&mut out);
        self.write_validation(&mut out);
        self.write_samples(&mut out);
        let _ = write!(
            out,
            "## How to make it again\n\n```sh\nernie train {} --data DIR\n```\n\n`DIR` is the folder with the sources. The recipe holds every setting; the \
             same recipe, data and machine give the same weights.\n",
            self.recipe_file.display()
        );
        out
    }

    fn write_architecture(&self, out: &mut String) {
        let c = self.config;
        let counts = c.parameter_counts();
        let mut row = |label: &str, value: String| {
            let _ = writeln!(out, "| {label} | {value} |");
        };
        row("Architecture", format!("ERNIE-4.5 decoder{}", if c.moe.is_some() { ", mixture of experts" } else { "" }));
        row("---", "---".into());
        let share = 100.0 * counts.active as f64 / counts.total.max(1) as f64;
        row(
            "Parameters",
            format!("{} total, {} active per token ({share:.0}%)", inspect::count(counts.total), inspect::count(counts.active)),
        );
        row("Layers, width", format!("{}, {}", c.num_hidden_layers, c.hidden_size));
        row(
            "Attention",
            format!("{} query heads, {} key/value heads, of size {}", c.num_attention_heads, c.num_key_value_heads, c.head_dim),
        );
        if let Some(moe) = &c.moe {
            let layers = (0..c.num_hidden_layers).filter(|&layer| c.is_moe_layer(layer)).count();
            row(
                "Experts",
                format!(
                    "{} of width {}, {} per token, {} shared, in {layers} layers",
                    moe.num_experts, moe.intermediate_size, moe.top_k, moe.num_shared_experts
                ),
            );
        }
        row("Vocabulary, context", format!("{} tokens, {} positions", c.vocab_size, c.max_position_embeddings));
        row("Weights", format!("{}, {} on disk", self.dtype, inspect::bytes(self.weight_bytes)));
        out.push('\n');
    }

    fn write_data(&self, out: &mut String) {
        out.push_str("## Data\n\n| Source | Licence | Documents | Tokens | Share | Epochs |\n|---|---|--:|--:|--:|--:|\n");
        for s in &self.sources {
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {:.1}% | {:.2} |",
                s.name,
                s.licence,
                s.train_documents,
                s.train_tokens,
                100.0 * s.share,
                s.epochs
            );
        }
        let _ = writeln!(
            out,
            "\nDocuments and tokens are those of the training part; share is the source's part of the training mixture, epochs how often its tokens \
             were seen. {:.1}% of the documents, chosen by their hash, were kept for validation.\n",
            100.0 * self.recipe.data.validation_fraction
        );
    }

    fn write_training(&self, out: &mut String) {
        let r = self.report;
        let _ = writeln!(
            out,
            "## Training\n\n{} steps, {} tokens in {} ({:.0} tok/s). Sequences of {} tokens, {} tokens per step, AdamW with a peak learning rate of \
             {}.\n\n![Loss over the run](loss.svg)\n",
            r.steps,
            r.tokens,
            duration(r.seconds),
            r.tokens as f64 / r.seconds.max(f64::MIN_POSITIVE),
            self.recipe.data.sequence_length,
            self.recipe.tokens_per_step(),
            self.recipe.optimizer.lr
        );
    }

    fn write_validation(&self, out: &mut String) {
        out.push_str("## Validation\n\nOf the weights in this directory, on documents that training did not see.\n\n");
        out.push_str("| Source | Loss (nats per token) | Perplexity |\n|---|--:|--:|\n");
        for (source, loss) in &self.validation {
            let _ = writeln!(out, "| {source} | {loss:.3} | {:.2} |", loss.exp());
        }
        out.push('\n');
    }

    fn write_samples(&self, out: &mut String) {
        let _ = writeln!(
            out,
            "## Samples\n\nUnedited: for each prompt the first text that came, with the seed that is its number. Temperature {TEMPERATURE}, top-p {TOP_P}, at \
             most {MAX_TOKENS} tokens.\n"
        );
        for Sample { chat, prompt, seed, text } in &self.samples {
            let flag = if *chat { " --chat" } else { "" };
            let dir = self.dir.display();
            let _ = writeln!(
                out,
                "{seed}. `ernie generate --model {dir}{flag} --seed {seed} --max-tokens {MAX_TOKENS} \"{prompt}\"`\n\n{}\n",
                quoted(&if *chat { text.clone() } else { format!("{prompt}{text}") })
            );
        }
    }
}

/// Text as an indented code block within a list item: shown as it is, whatever it holds.
fn quoted(text: &str) -> String {
    let fence = "`".repeat(text.split(|c| c != '`').map(str::len).max().unwrap_or(0).max(2) + 1);
    let body: Vec<String> = text.lines().map(|line| format!("   {line}")).collect();
    format!("   {fence}text\n{}\n   {fence}", body.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(duration(12.4), "12 s");
        assert_eq!(duration(250.0), "4 min 10 s");
        assert_eq!(duration(5_520.0), "1 h 32 min");
    }

    #[test]
    fn a_sample_cannot_close_its_own_fence() {
        assert_eq!(quoted("a\nb"), "   ```text\n   a\n   b\n   ```");
        assert_eq!(quoted("x ```` y"), "   `````text\n   x ```` y\n   `````");
    }
}
