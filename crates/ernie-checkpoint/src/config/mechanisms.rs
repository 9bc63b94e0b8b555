//! What the released family lacks: the object under `ernie_rs` of config.json. Without that key a model is a released one.
//!
//! Unlike other keys of a config an unknown one here is refused: it would be a part of the network that this program does not compute.

use serde_json::{Map, Value, json};

use super::Config;
use super::fields::Fields;
use crate::error::Result;

/// Name of the object.
pub(super) const KEY: &str = "ernie_rs";

/// Mechanisms of our own models, each off by default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Mechanisms {
    /// What the attention of each layer sees, `layer_types`; without it every layer sees everything.
    pub layer_types: Option<Vec<AttentionKind>>,
    /// How many tokens back, itself included, a token of a [`AttentionKind::Sliding`] layer sees: `sliding_window`.
    pub sliding_window: Option<usize>,
    /// Where the paragraphs of a text end, for [`AttentionKind::Paragraph`] layers: `paragraphs`.
    pub paragraphs: Option<Paragraphs>,
    /// Gates over the heads of attention, by what a token brings: `context_gate`.
    pub context_gate: Option<ContextGate>,
}

/// Gates over attention heads: g = σ(w·x + u·d + b), d the semantic density of the token (`ernie_kernels::density`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ContextGate {
    /// A head whose gate is below it gives nothing, and is not computed.
    pub threshold: f64,
}

/// Where a text's paragraphs end: after an end token, once the paragraph is long enough; and where it is as long as it may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paragraphs {
    /// Tokens that end a paragraph, such as those of line breaks; ascending.
    pub end_tokens: Vec<u32>,
    /// Least tokens of a paragraph, at least [`Paragraphs::LEAST`].
    pub min_tokens: usize,
    /// Most tokens of a paragraph.
    pub max_tokens: usize,
}

impl Paragraphs {
    /// No paragraph is shorter: of 32 positions that stand together in the engine's cache at most one ends a paragraph.
    pub const LEAST: usize = 32;
    const MIN_TOKENS: usize = 32;
    const MAX_TOKENS: usize = 256;

    /// Whether a paragraph of `length` tokens, the last of them `token`, ends with it.
    pub fn ends(&self, token: u32, length: usize) -> bool {
        length >= self.max_tokens || length >= self.min_tokens && self.end_tokens.binary_search(&token).is_ok()
    }

    /// Bounds of the paragraphs of packed documents, `[0, …, t]` from the documents' bounds `cu_seqlens`: no document's paragraph reaches into the next.
    pub fn bounds(&self, ids: &[u32], cu_seqlens: &[u32]) -> Vec<u32> {
        let mut bounds = vec![0];
        for document in cu_seqlens.windows(2) {
            let mut length = 0;
            for row in document[0]..document[1] {
                length += 1;
                if row + 1 == document[1] || self.ends(ids[row as usize], length) {
                    bounds.push(row + 1);
                    length = 0;
                }
            }
        }
        bounds
    }

    fn parse(own: &Fields<'_>) -> Result<Option<Self>> {
        let Some(fields) = own.section("paragraphs", "ernie_rs.paragraphs.")? else { return Ok(None) };
        const KNOWN: [&str; 3] = ["end_tokens", "min_tokens", "max_tokens"];
        if let Some((key, value)) = fields.map.iter().find(|(key, _)| !KNOWN.contains(&key.as_str())) {
            return Err(fields.error(key, format!("no such key; {} are known", KNOWN.join(", ")), value));
        }
        let mut end_tokens = match fields.get(&["end_tokens"])? {
            None => Vec::new(),
            Some((name, value)) => {
                let id = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
                let ids = value.as_array().and_then(|items| items.iter().map(id).collect::<Option<Vec<u32>>>());
                ids.ok_or_else(|| fields.error(name, "a list of token ids", value))?
            }
        };
        end_tokens.sort_unstable();
        end_tokens.dedup();
        let min_tokens = fields.size(&["min_tokens"])?.unwrap_or(Self::MIN_TOKENS);
        let max_tokens = fields.size(&["max_tokens"])?.unwrap_or(Self::MAX_TOKENS);
        Ok(Some(Self { end_tokens, min_tokens, max_tokens }))
    }
}

/// What a layer's attention sees, in the spelling of transformers' `layer_types`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionKind {
    /// `full_attention`: all tokens before.
    Full,
    /// `sliding_attention`: the last `sliding_window` tokens.
    Sliding,
    /// `paragraph_attention`, our own: the tokens before in the same paragraph, and a summary of each earlier paragraph.
    Paragraph,
}

impl AttentionKind {
    fn from_name(name: &str) -> Option<Self> {
        [AttentionKind::Full, AttentionKind::Sliding, AttentionKind::Paragraph].into_iter().find(|kind| kind.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            AttentionKind::Full => "full_attention",
            AttentionKind::Sliding => "sliding_attention",
            AttentionKind::Paragraph => "paragraph_attention",
        }
    }
}

impl Mechanisms {
    /// Whether none is on: the model is like a released one.
    pub fn is_empty(&self) -> bool {
        *self == Mechanisms::default()
    }

    pub(super) fn parse(root: &Fields<'_>) -> Result<Self> {
        let Some(own) = root.section(KEY, "ernie_rs.")? else { return Ok(Self::default()) };
        const KNOWN: [&str; 4] = ["layer_types", "sliding_window", "paragraphs", "context_gate"];
        if let Some((key, value)) = own.map.iter().find(|(key, _)| !KNOWN.contains(&key.as_str())) {
            return Err(own.error(key, format!("no such key; {} are known", KNOWN.join(", ")), value));
        }
        let layer_types = match own.get(&["layer_types"])? {
            None => None,
            Some((name, value)) => {
                let kind = |item: &Value| item.as_str().and_then(AttentionKind::from_name);
                let kinds = value.as_array().and_then(|items| items.iter().map(kind).collect::<Option<Vec<_>>>());
                let expected = "a list of \"full_attention\", \"sliding_attention\" and \"paragraph_attention\"";
                Some(kinds.ok_or_else(|| own.error(name, expected, value))?)
            }
        };
        let context_gate = match own.section("context_gate", "ernie_rs.context_gate.")? {
            None => None,
            Some(gate) => {
                if let Some((key, value)) = gate.map.iter().find(|(key, _)| *key != "threshold") {
                    return Err(gate.error(key, "no such key; threshold is known", value));
                }
                Some(ContextGate { threshold: gate.float(&["threshold"])?.unwrap_or(0.5) })
            }
        };
        let paragraphs = Paragraphs::parse(&own)?;
        Ok(Self { layer_types, sliding_window: own.size(&["sliding_window"])?, paragraphs, context_gate })
    }

    /// The object to write, if there is anything to say.
    pub(super) fn to_json(&self) -> Option<Value> {
        if self.is_empty() {
            return None;
        }
        let mut object = Map::new();
        if let Some(kinds) = &self.layer_types {
            object.insert("layer_types".into(), kinds.iter().map(|kind| kind.name()).collect());
        }
        if let Some(window) = self.sliding_window {
            object.insert("sliding_window".into(), json!(window));
        }
        if let Some(paragraphs) = &self.paragraphs {
            let Paragraphs { end_tokens, min_tokens, max_tokens } = paragraphs;
            object.insert("paragraphs".into(), json!({"end_tokens": end_tokens, "min_tokens": min_tokens, "max_tokens": max_tokens}));
        }
        if let Some(gate) = &self.context_gate {
            object.insert("context_gate".into(), json!({"threshold": gate.threshold}));
        }
        Some(Value::Object(object))
    }
}

impl Config {
    /// What the attention of layer `layer` sees. The block for multi-token prediction sees all.
    pub fn attention_kind(&self, layer: usize) -> AttentionKind {
        let kinds = self.mechanisms.layer_types.as_ref();
        kinds.and_then(|kinds| kinds.get(layer)).copied().unwrap_or(AttentionKind::Full)
    }

    /// Where paragraphs end, if layer `layer` attends to paragraphs.
    pub fn paragraphs(&self, layer: usize) -> Option<&Paragraphs> {
        self.mechanisms.paragraphs.as_ref().filter(|_| self.attention_kind(layer) == AttentionKind::Paragraph)
    }

    /// How many tokens back, itself included, a token of layer `layer` sees, if it sees a window.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.mechanisms.sliding_window.filter(|_| self.attention_kind(layer) == AttentionKind::Sliding)
    }

    /// How many tokens back, itself included, the keys and values of layer `layer` are needed; `None`: all. Those of paragraphs that are over are
    /// summed up.
    pub fn reach(&self, layer: usize) -> Option<usize> {
        self.window(layer).or(self.paragraphs(layer).map(|paragraphs| paragraphs.max_tokens))
    }

    /// Layers whose keys and values are not needed for ever ([`Config::reach`]).
    pub fn local_layers(&self) -> usize {
        (0..self.num_hidden_layers).filter(|&layer| self.reach(layer).is_some()).count()
    }

    /// Layers that attend to paragraphs.
    pub fn paragraph_layers(&self) -> usize {
        (0..self.num_hidden_layers).filter(|&layer| self.paragraphs(layer).is_some()).count()
    }
}
