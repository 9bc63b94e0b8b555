//! Between text and tokens: ids on the command line, text that streams out, conversations as the model was trained to see them.
use anyhow::Context;
use ernie_checkpoint::{ChatTemplate, ChatTemplateOptions, DecodeStream, Message, Tokenizer};
use std::io::Read;
use std::path::Path;

/// A text argument; `-` stands for all of standard input.
pub fn text_or_stdin(argument: &str) -> anyhow::Result<String> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("cannot read standard input as UTF-8 text")?;
    Ok(text)
}

/// A whole text file, gzipped or not.
pub fn text_file(path: &Path) -> anyhow::Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let bytes = if path.extension().is_some_and(|extension| extension == "gz") {
        let mut plain = Vec::new();
        flate2::read::MultiGzDecoder::new(&bytes[..])
            .read_to_end(&mut plain)
            .with_context(|| format!("{} is no gzip file", path.display()))?;
        plain
    } else {
        bytes
    };
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!("{}: byte {at} is not UTF-8; convert the file", path.display())
    })
}

/// The tokenizer's streaming decoder for the engine; without a tokenizer there is no text.
pub struct StreamDecoder<'t>(Option<DecodeStream<'t>>);

impl<'t> StreamDecoder<'t> {
    /// A decoder for one generation.
    pub fn new(tokenizer: Option<&'t Tokenizer>) -> Self {
        Self(tokenizer.map(|tokenizer| tokenizer.decode_stream(true)))
    }
}

impl ernie_engine::TextDecoder for StreamDecoder<'_> {
    fn push(&mut self, id: u32) -> String {
        self.0.as_mut().map_or_else(String::new, |stream| stream.push(id))
    }

    fn finish(&mut self) -> String {
        self.0.as_mut().map_or_else(String::new, |stream| stream.finish())
    }
}

/// The ids of a conversation up to where the assistant speaks next.
pub fn encode_conversation(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    options: &ChatTemplateOptions,
) -> anyhow::Result<Vec<u32>> {
    ernie_checkpoint::encode_conversation(tokenizer, template, messages, true, options).context("the chat template failed")
}
