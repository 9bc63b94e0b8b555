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
    /// Gates over the heads of attention, by what a token brings: `context_gate`.
    pub context_gate: Option<ContextGate>,
}

/// Gates over attention heads: g = σ(w·x + u·d + b), d the semantic density of the token (`ernie_kernels::density`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ContextGate {
    /// A head whose gate is below it gives nothing, and is not computed.
    pub threshold: f64,
}

/// What a layer's attention sees, in the spelling of transformers' `layer_types`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionKind {
    /// `full_attention`: all tokens before.
    Full,
    /// `sliding_attention`: the last `sliding_window` tokens.
    Sliding,
}

impl AttentionKind {
    fn from_name(name: &str) -> Option<Self> {
        [AttentionKind::Full, AttentionKind::Sliding].into_iter().find(|kind| kind.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            AttentionKind::Full => "full_attention",
            AttentionKind::Sliding => "sliding_attention",
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
        const KNOWN: [&str; 3] = ["layer_types", "sliding_window", "context_gate"];
        if let Some((key, value)) = own.map.iter().find(|(key, _)| !KNOWN.contains(&key.as_str())) {
            return Err(own.error(key, format!("no such key; {} are known", KNOWN.join(", ")), value));
        }
        let layer_types = match own.get(&["layer_types"])? {
            None => None,
            Some((name, value)) => {
                let kind = |item: &Value| item.as_str().and_then(AttentionKind::from_name);
                let kinds = value.as_array().and_then(|items| items.iter().map(kind).collect::<Option<Vec<_>>>());
                let expected = "a list of \"full_attention\" and \"sliding_attention\"";
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
        Ok(Self { layer_types, sliding_window: own.size(&["sliding_window"])?, context_gate })
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
        if let Some(gate) = &self.context_gate {
            object.insert("context_gate".into(), json!({"threshold": gate.threshold}));
        }
        Some(Value::Object(object))
    }
}

impl Config {
    /// How many tokens back, itself included, a token of layer `layer` sees; `None`: all. The block for multi-token prediction sees all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        match self.mechanisms.layer_types.as_ref()?.get(layer)? {
            AttentionKind::Sliding => self.mechanisms.sliding_window,
            AttentionKind::Full => None,
        }
    }

    /// Layers whose attention sees a window only.
    pub fn windowed_layers(&self) -> usize {
        (0..self.num_hidden_layers).filter(|&layer| self.window(layer).is_some()).count()
    }
}
