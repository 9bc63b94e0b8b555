//! What a recipe refuses, and how it says so.
use super::*;

const GOOD: &str = r#"
[run]
name = "small"
out = "runs/small"
tokens = 100_000

[model]
vocab_size = 512
hidden_size = 64
num_hidden_layers = 2
intermediate_size = 128
max_position_embeddings = 128

[tokenizer]
vocab_size = 512

[data]
sequence_length = 128
batch_size = 4
gradient_accumulation = 2

[[data.source]]
name = "stories"
format = "separated"
paths = ["stories.txt"]
weight = 1.0
licence = "CC0"

[schedule]
kind = "cosine"
warmup_steps = 10
"#;

const PLENTY: u64 = 1 << 32;

/// The `[model]` of a recipe, with what [`GOOD`] leaves out.
fn config(recipe: &Recipe) -> Config {
    let mut model = recipe.model.clone();
    for (key, value) in [("num_attention_heads", 4), ("num_key_value_heads", 2)] {
        model[key] = value.into();
    }
    model["model_type"] = "ernie4_5".into();
    Config::from_json(&model.to_string(), Path::new("small.toml")).unwrap()
}

fn validate(recipe: &Recipe, memory_bytes: u64) -> Result<(), Error> {
    recipe.validate(&config(recipe), memory_bytes)
}

fn parse(text: &str) -> Result<Recipe, Error> {
    Recipe::from_toml(text, Path::new("small.toml"))
}

/// What is said about GOOD with `from` replaced by `to`.
fn complaint(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "`{from}` is not in the recipe");
    match parse(&GOOD.replacen(from, to, 1)).and_then(|recipe| validate(&recipe, PLENTY)) {
        Ok(()) => panic!("`{from}` → `{to}` was accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_good_recipe() {
    let recipe = parse(GOOD).unwrap();
    validate(&recipe, PLENTY).unwrap();
    assert_eq!(recipe.tokens_per_step(), 1024);
    assert_eq!(recipe.total_steps(), 98);
    assert_eq!(recipe.cache_dir(), Path::new("runs/small/cache"));
    let again = toml::to_string(&recipe).unwrap();
    assert_eq!(parse(&again).unwrap().run.tokens, Some(100_000));
}

#[test]
fn unknown_keys_name_their_line_and_the_nearest_valid_key() {
    let message = complaint("batch_size", "batchsize");
    assert!(
        message.contains("small.toml, line 19") && message.contains("`batchsize`") && message.contains("did you mean `batch_size`?"),
        "{message}"
    );
    let message = complaint("[schedule]\nkind", "[schedule]\nkinds");
    assert!(message.contains("line 29") && message.contains("missing field `kind`"), "{message}");
    let message = complaint("[schedule]", "[shedule]");
    assert!(message.contains("did you mean `schedule`?"), "{message}");
    let message = complaint("\"cosine\"", "\"cosin\"");
    assert!(message.contains("did you mean `cosine`?"), "{message}");
    let message = complaint("\"separated\"", "\"seperated\"");
    assert!(message.contains("did you mean `separated`?"), "{message}");
    let message = complaint("weight = 1.0", "weight = 1.0\ncolour = 3");
    assert!(message.contains("`colour`") && !message.contains("did you mean"), "{message}");
    let message = complaint("licence = \"CC0\"", "");
    assert!(message.contains("licence"), "{message}");
    let message = complaint("batch_size = 4", "batch_size = \"four\"");
    assert!(message.contains("line 19"), "{message}");
}

#[test]
fn values_that_could_not_train_name_the_key_and_the_fix() {
    for (from, to, key) in [
        ("tokens = 100_000", "", "run.steps"),
        ("tokens = 100_000", "tokens = 100\nsteps = 2", "run.tokens"),
        ("tokens = 100_000", "steps = 0", "run.steps"),
        ("tokens = 100_000", "steps = 50\ncheckpoint_every = 0", "run.checkpoint_every"),
        ("tokens = 100_000", "steps = 50\nthreads = 0", "run.threads"),
        ("tokens = 100_000", "steps = 9", "schedule.warmup_steps"),
        ("[tokenizer]\nvocab_size = 512", "[tokenizer]\nvocab_size = 1024", "tokenizer.vocab_size"),
        ("[tokenizer]\nvocab_size = 512", "[tokenizer]\nvocab_size = 100", "tokenizer.vocab_size"),
        ("[data]", "character_coverage = 1.5\n[data]", "tokenizer.character_coverage"),
        ("sequence_length = 128", "sequence_length = 256", "data.sequence_length"),
        ("sequence_length = 128", "sequence_length = 1", "data.sequence_length"),
        ("batch_size = 4", "batch_size = 0", "data.batch_size"),
        ("batch_size = 4", "batch_size = 4\nvalidation_fraction = 0.9", "data.validation_fraction"),
        ("weight = 1.0", "weight = 0.0", "data.source[0] (stories).weight"),
        ("weight = 1.0", "weight = nan", "data.source[0] (stories).weight"),
        ("weight = 1.0", "weight = 1.0\nepochs_max = 0", "data.source[0] (stories).epochs_max"),
        ("paths = [\"stories.txt\"]", "paths = []", "data.source[0] (stories).paths"),
        ("name = \"stories\"", "name = \"a/b\"", "data.source[0] (a/b).name"),
        ("format = \"separated\"", "format = \"wikitext\"\ntemplate = true", "data.source[0] (stories).template"),
        ("[schedule]", "[optimizer]\nbeta2 = 1.0\n[schedule]", "optimizer.beta2"),
        ("[schedule]", "[optimizer]\nlr = -1\n[schedule]", "optimizer.lr"),
        ("[schedule]", "[loss]\nbalance = -1\n[schedule]", "loss.balance"),
        ("[schedule]", "[schedule]\nmin_lr_ratio = 2.0", "schedule.min_lr_ratio"),
        ("paths = [\"stories.txt\"]", "paths = [\"../stories.txt\"]", "data.source[0] (stories).paths"),
    ] {
        let message = complaint(from, to);
        assert!(message.starts_with(&format!("recipe key `{key}`")), "`{to}`: {message}");
        assert!(message.contains("; "), "no fix in: {message}");
    }
    let large = GOOD.replace("tokens = 100_000", "steps = 50").replace("batch_size = 4", "batch_size = 1000000");
    let message = validate(&parse(&large).unwrap(), PLENTY).unwrap_err().to_string();
    assert!(message.contains("`data.batch_size`: 1000000 sequences") && message.contains("gradient_accumulation"), "{message}");
    let twice = format!("{GOOD}\n[[data.source]]\nname = \"stories\"\nformat = \"text\"\npaths = [\"b\"]\nweight = 1\nlicence = \"x\"\n");
    let message = validate(&parse(&twice).unwrap(), PLENTY).unwrap_err().to_string();
    assert!(message.contains("data.source[1]") && message.contains("own name"), "{message}");
}

#[test]
fn precision_is_one_of_two() {
    assert_eq!(parse(GOOD).unwrap().run.precision, Precision::F32);
    let with = |name: &str| parse(&GOOD.replacen("tokens = 100_000", &format!("tokens = 100_000\nprecision = \"{name}\""), 1));
    for (name, precision) in [("f32", Precision::F32), ("int8-mixed", Precision::Int8Mixed)] {
        assert_eq!(with(name).unwrap().run.precision, precision);
    }
    let message = with("int8_mixed").unwrap_err().to_string();
    assert!(message.contains("line 6") && message.contains("did you mean `int8-mixed`?"), "{message}");
}

#[test]
fn a_batch_must_fit_the_memory() {
    let recipe = parse(GOOD).unwrap();
    let needed = Account::of(&recipe, &config(&recipe)).total();
    validate(&recipe, needed).unwrap();
    let message = validate(&recipe, needed - 1).unwrap_err().to_string();
    assert!(message.contains("data.batch_size") && message.contains("gradient_accumulation"), "{message}");
    assert!(crate::memory::available_bytes() > 1 << 20);
}

#[test]
fn the_data_folder_must_exist() {
    let recipe = parse(GOOD).unwrap();
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(recipe.data_root(Some(dir.path())).unwrap(), dir.path());
    let message = recipe.data_root(Some(&dir.path().join("gone"))).unwrap_err().to_string();
    assert!(message.contains("gone") && message.contains("--data"), "{message}");
    let message = Recipe::from_file(&dir.path().join("none.toml")).unwrap_err().to_string();
    assert!(message.contains("none.toml"), "{message}");
}

#[test]
fn the_nano_recipe_is_valid() {
    let recipe = Recipe::from_file(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/nano.toml")).unwrap();
    recipe.validate(&crate::model_config(&recipe).unwrap(), 8 << 30).unwrap();
}

#[test]
fn the_share_of_heads_falls_from_all_to_the_target() {
    let loss = Loss { gate_target: 0.6, gate_warmup: 0.5, ..Loss::default() };
    for (step, share) in [(0, 1.0), (25, 0.8), (50, 0.6), (100, 0.6)] {
        assert!((loss.gate_target_at(step, 100) - share).abs() < 1e-12, "step {step}: {}", loss.gate_target_at(step, 100));
    }
    assert_eq!(Loss { gate_warmup: 0.0, ..loss }.gate_target_at(1, 100), 0.6);
}
