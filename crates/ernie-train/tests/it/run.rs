//! A run small enough for tests: a made-up corpus and a MoE of a few thousand parameters.
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use ernie_checkpoint::Checkpoint;
use ernie_train::data::{self, Corpus};
use ernie_train::{Recipe, TrainOptions};

/// A folder with a corpus, and where runs may go.
pub struct Bench {
    pub root: PathBuf,
}

impl Bench {
    /// Writes 300 short documents of a small grammar, the same every time.
    pub fn new(root: &Path) -> Self {
        let (who, what, whom) =
            (["the cat", "a dog", "my bird", "小猫"], ["sees", "likes", "finds", "喜欢"], ["the sun", "a ball", "the sea", "花"]);
        let mut documents = Vec::new();
        for index in 0..300usize {
            let sentence = |shift: usize| {
                let n = index * 7 + shift * 13;
                format!("{} {} {}.", who[n % 4], what[n / 4 % 4], whom[n / 16 % 4])
            };
            documents.push((0..3 + index % 9).map(sentence).collect::<Vec<_>>().join(" "));
        }
        fs::create_dir_all(root.join("data")).unwrap();
        fs::write(root.join("data/corpus.txt"), documents.join("\n<|endoftext|>\n")).unwrap();
        Self { root: root.to_path_buf() }
    }

    /// A recipe for `steps` steps into `out`, with two micro-batches a step, an MTP block and every auxiliary loss on.
    pub fn recipe(&self, out: &str, steps: u64) -> Recipe {
        Recipe::from_toml(&self.toml(out, steps), Path::new("test recipe")).unwrap()
    }

    /// Options that read this corpus, whatever ERNIE_DATA says.
    pub fn options(&self) -> TrainOptions {
        TrainOptions { quiet: true, data_root: Some(self.root.join("data")), ..TrainOptions::default() }
    }

    /// What the recipe's run trains on.
    pub fn corpus(&self, recipe: &Recipe) -> Arc<Corpus> {
        data::prepare(recipe, &self.root.join("data"), &mut |_| {}).unwrap().corpus
    }

    pub fn toml(&self, out: &str, steps: u64) -> String {
        let (out, data, cache) = (self.root.join(out), self.root.join("data"), self.root.join("cache"));
        format!(
            r#"
[run]
name = "test"
seed = 5
out = {out:?}
steps = {steps}
validate_every = 20
validate_tokens = 256
checkpoint_every = 3
keep_last = 2
log_every = 1

[model]
architectures = ["Ernie4_5_MoeForCausalLM"]
model_type = "ernie4_5_moe"
vocab_size = 400
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
max_position_embeddings = 64
tie_word_embeddings = true
use_bias = false
eos_token_id = 2
moe_num_experts = 4
moe_k = 2
moe_intermediate_size = 16
moe_num_shared_experts = 1
moe_layer_start_index = 1
num_nextn_predict_layers = 1

[tokenizer]
vocab_size = 400

[data]
root = {data:?}
cache = {cache:?}
sequence_length = 32
batch_size = 4
gradient_accumulation = 2
validation_fraction = 0.05

[[data.source]]
name = "grammar"
format = "separated"
paths = ["corpus.txt"]
weight = 1.0
licence = "made for this test"

[optimizer]
lr = 5e-3

[schedule]
kind = "wsd"
warmup_steps = 2
decay_fraction = 0.25
min_lr_ratio = 0.1

[loss]
balance = 1e-2
z_loss = 1e-4
orthogonality = 1e-3
bias_update_rate = 1e-3
mtp_weight = 0.1
"#
        )
    }
}

/// Every tensor of a model directory, as bits.
pub fn bits(model: &Path) -> BTreeMap<String, Vec<u32>> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let bits = |name: &str| checkpoint.tensor(name).unwrap().to_f32().unwrap().into_iter().map(f32::to_bits).collect();
    checkpoint.names().map(|name| (name.to_string(), bits(name))).collect()
}
