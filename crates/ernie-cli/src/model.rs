//! `--model DIR`: which model a command works on, and its parts as the command needs them.
use anyhow::Context;
use ernie_checkpoint::{ChatTemplate, Checkpoint, Config, Tokenizer};
use std::path::{Path, PathBuf};

use crate::embedded;

/// The files in which a tokenizer may be, any one of them.
const TOKENIZER_FILES: [&str; 4] = ["tokenizer.json", "tokenizer.model", "spm.model", "ernie_token_100k.model"];

/// The model of a command.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArgument {
    /// Directory of a model in Hugging Face form [default: the built-in model]
    #[arg(long = "model", value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl ModelArgument {
    /// As `--model DIR`, for a command that names the directory otherwise.
    pub fn new(dir: Option<&Path>) -> Self {
        Self { dir: dir.map(Path::to_path_buf) }
    }

    /// The directory, or what the built-in model is called.
    pub fn name(&self) -> String {
        self.dir.as_ref().map_or_else(|| embedded::NAME.to_owned(), |dir| dir.display().to_string())
    }

    /// Its configuration and weights, memory-mapped.
    pub fn checkpoint(&self) -> anyhow::Result<Checkpoint> {
        let opened = match &self.dir {
            None => embedded::checkpoint(),
            Some(dir) => {
                is_model_directory(dir)?;
                Checkpoint::open(dir)
            }
        };
        opened.with_context(|| format!("cannot open {}", self.name()))
    }

    /// Its configuration alone.
    pub fn config(&self) -> anyhow::Result<Config> {
        match &self.dir {
            None => Ok(embedded::checkpoint()?.config().clone()),
            Some(dir) => {
                is_model_directory(dir)?;
                Ok(Config::from_dir(dir)?)
            }
        }
    }

    /// Its tokenizer; `None` if the directory has no tokenizer file, an error if it has a broken one.
    pub fn tokenizer_if_any(&self) -> anyhow::Result<Option<Tokenizer>> {
        match &self.dir {
            None => embedded::tokenizer().map(Some),
            Some(dir) if TOKENIZER_FILES.iter().any(|file| dir.join(file).exists()) => {
                Ok(Some(Tokenizer::from_dir(dir).with_context(|| format!("cannot use the tokenizer of {}", dir.display()))?))
            }
            Some(_) => Ok(None),
        }
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> anyhow::Result<Tokenizer> {
        if let Some(dir) = &self.dir {
            is_model_directory(dir)?;
        }
        self.tokenizer_if_any()?.with_context(|| {
            format!("{} has no tokenizer (tokenizer.json or tokenizer.model); add the file, or give token ids with --ids", self.name())
        })
    }

    /// Its chat template; the family's own where it has none.
    pub fn chat_template(&self) -> anyhow::Result<ChatTemplate> {
        let own = match &self.dir {
            None => None,
            Some(dir) => ChatTemplate::from_dir(dir).with_context(|| format!("cannot use the chat template of {}", dir.display()))?,
        };
        Ok(own.unwrap_or_else(ChatTemplate::builtin))
    }
}

/// The first thing to get wrong, told before anything tries to read files.
pub fn is_model_directory(dir: &Path) -> anyhow::Result<()> {
    if !dir.is_dir() {
        let what = if dir.exists() { "is a file" } else { "does not exist" };
        anyhow::bail!("{} {what}; give the directory of a model, with config.json and *.safetensors in it", dir.display());
    }
    Ok(())
}
