//! What a model directory is: typed `config.json`, safetensors in and out, tokenizer files, chat template.
//!
//! [`Checkpoint::open`] maps a directory of the released family (Hugging Face or `-Paddle` layout) and gives its tensors
//! under their Hugging Face names; [`save`] writes one, replacing an older model in one step. Nothing here panics on what
//! a file says, and nothing is allocated by a size that a file claims before that claim is checked against its length.

mod atomic;
mod chat_template;
mod checkpoint;
mod commit;
mod config;
mod conversation;
mod error;
mod files;
mod header;
mod layout;
mod mapped;
mod mapping;
mod numeric;
mod packed;
mod quantize;
mod save;
mod sentencepiece;
mod shards;
mod specs;
mod tensor;
mod tokenizer;
mod validate;

pub use atomic::{AtomicFile, atomic_write};
pub use chat_template::{ChatTemplate, ChatTemplateError, ChatTemplateOptions, Message};
pub use checkpoint::{Checkpoint, EmbeddedFiles};
pub use config::{
    AttentionKind, Config, ContextGate, Family, HiddenAct, Mechanisms, MlpKind, MoeConfig, Paragraphs, ParameterCounts, Quantization,
    VisionConfig, VisionExperts, VlConfig,
};
pub use conversation::{encode_conversation, end_of_turn_ids};
pub use error::{Error, Result};
pub use header::safetensors_header;
pub use layout::Layout;
pub use mapped::MappedFile;
pub use numeric::quantise_row;
pub use quantize::{QuantizeOptions, QuantizeProgress, QuantizeScheme, QuantizeSummary, quantize};
pub use save::{SaveDtype, SaveOptions, save};
pub use sentencepiece::SentencePieceError;
pub use specs::{TensorGroup, TensorRole, TensorSpec};
pub use tensor::{Dtype, Int4, Tensor};
pub use tokenizer::{DecodeStream, SpecialTokens, TokenBytes, Tokenizer, TokenizerError};
