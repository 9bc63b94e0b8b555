//! The network's parameters by name: loading a checkpoint, exporting one, gradients, and in-place updates.
//!
//! A parameter's *internal* name is its path of fields (`model.layers.1.mlp.experts.gate_proj`), with the experts of a layer stacked in one
//! tensor. Its *checkpoint* names are those of the released models (`model.layers.1.mlp.experts.0.gate_proj.weight`, …).
use std::{
    collections::{BTreeMap, HashSet, btree_map::Entry},
    path::PathBuf,
};

use crate::{init::Init, ops, text::Ernie};
use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    prelude::*,
    tensor::TensorData,
};
use ernie_checkpoint::{Checkpoint, Config};
use ernie_kernels::{adamw, scratch};

/// What is known of a parameter beside its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Internal name.
    pub name: String,
    /// Shape, experts stacked.
    pub shape: Vec<usize>,
    /// Whether gradients reach it; false for the router's correction bias.
    pub trainable: bool,
}

/// Parameters, gradients or moments by internal name, row-major.
pub type NamedParameters = BTreeMap<String, Vec<f32>>;

/// A checkpoint could not become a network.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint itself is at fault.
    #[error(transparent)]
    Checkpoint(#[from] ernie_checkpoint::Error),
    /// A tensor that this network has no place for: leaving it out would compute something else than the checkpoint means.
    #[error("{}: tensor `{tensor}` belongs to a part that training does not have (vision, or biases of routed experts)", checkpoint.display())]
    Unread {
        /// Model directory.
        checkpoint: PathBuf,
        /// Its name.
        tensor: String,
    },
}

impl Parameter {
    /// The tensors of a checkpoint that this parameter is made of, each with its shape, in memory order.
    pub fn checkpoint_tensors(&self) -> Vec<(String, Vec<usize>)> {
        match self.name.rsplit_once(".experts.") {
            Some((layer, projection)) if !layer.ends_with("shared_experts") => (0..self.shape[0])
                .map(|expert| (format!("{layer}.experts.{expert}.{projection}.weight"), self.shape[1..].to_vec()))
                .collect(),
            _ => vec![(self.checkpoint_name(), self.shape.clone())],
        }
    }

    /// `model.mtp.mtp_block.…` is `model.mtp_block.0.…` in a checkpoint.
    fn checkpoint_name(&self) -> String {
        match self.name.strip_prefix("model.mtp.").and_then(|rest| rest.split_once('.')) {
            Some((part, rest)) => format!("model.{part}.0.{rest}"),
            None => self.name.clone(),
        }
    }
}

impl Ernie {
    /// The network of a checkpoint, in f32.
    ///
    /// # Errors
    /// If a tensor is missing, misshapen, not finite, or has no place in the network.
    pub fn load(checkpoint: &Checkpoint, device: &Device) -> Result<Self, LoadError> {
        checkpoint.validate()?;
        let mut config: Config = checkpoint.config().clone();
        config.tie_word_embeddings = checkpoint.tied();
        if !checkpoint.contains("model.mtp_linear_proj.0.weight") {
            // Some releases announce the block and leave its weights out.
            config.num_nextn_predict_layers = 0;
        }
        let mut unread = checkpoint.names().map(String::from).collect::<HashSet<_>>();
        let mut failure = None;
        let model = Self::with_init(&config, &mut Init::zeros(device)).map_parameters(|parameter, values| {
            if failure.is_some() {
                return values;
            }
            match read(checkpoint, parameter, &mut unread) {
                Ok(read) => read,
                Err(error) => {
                    failure = Some(error);
                    values
                }
            }
        });
        if let Some(error) = failure {
            return Err(error.into());
        }
        match unread.into_iter().min() {
            Some(tensor) => Err(LoadError::Unread { checkpoint: checkpoint.origin().to_path_buf(), tensor }),
            None => Ok(model),
        }
    }

    /// All parameters in the order of the network.
    pub fn parameters(&self) -> Vec<Parameter> {
        let mut parameters = Vec::new();
        self.visit_parameters(|parameter, _| parameters.push(parameter.clone()));
        parameters
    }

    /// All values by internal name.
    pub fn named_parameters(&self) -> NamedParameters {
        let mut named = BTreeMap::new();
        self.visit_parameters(|parameter, values| {
            named.insert(parameter.name.clone(), values);
        });
        named
    }

    /// All tensors under their checkpoint names, ready for `ernie_checkpoint::save`.
    pub fn export(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let mut tensors = Vec::new();
        self.visit_parameters(|parameter, values| tensors.extend(split(parameter, values)));
        tensors
    }

    /// Calls `f` with each parameter and a copy of its values.
    pub fn visit_parameters(&self, f: impl FnMut(&Parameter, Vec<f32>)) {
        self.visit(&mut Visitor { path: Path::default(), f });
    }

    /// Replaces each parameter's values by what `f` makes of them. Values move in and out without a copy where nothing else holds them.
    ///
    /// # Panics
    /// If `f` returns another number of values.
    pub fn map_parameters(self, f: impl FnMut(&Parameter, Vec<f32>) -> Vec<f32>) -> Self {
        self.map(&mut Mapper { path: Path::default(), f })
    }

    /// Gradients of a loss made by this network, by internal name; parameters that the loss does not reach are absent.
    pub fn backward(&self, loss: Tensor<1>) -> NamedParameters {
        self.collect_gradients(ops::backward(loss))
    }

    /// The parameters' gradients out of those of a tape.
    pub(crate) fn collect_gradients(&self, tape: burn::tensor::Gradients) -> NamedParameters {
        let mut visitor = GradientVisitor { path: Path::default(), tape, gradients: BTreeMap::new() };
        self.visit(&mut visitor);
        visitor.gradients
    }
}

/// `into += gradients`, parameter by parameter; parameters that only `gradients` has are moved in.
pub fn accumulate(into: &mut NamedParameters, gradients: NamedParameters) {
    for (name, gradient) in gradients {
        match into.entry(name) {
            Entry::Vacant(entry) => {
                entry.insert(gradient);
            }
            Entry::Occupied(mut entry) => {
                adamw::add(entry.get_mut(), &gradient);
                scratch::recycle(gradient);
            }
        }
    }
}

/// Cuts a parameter's values into the tensors of a checkpoint.
pub fn split(parameter: &Parameter, values: Vec<f32>) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let mut tensors = parameter.checkpoint_tensors();
    if let [(name, shape)] = &mut tensors[..] {
        return vec![(std::mem::take(name), std::mem::take(shape), values)];
    }
    let each = values.len() / tensors.len();
    tensors.into_iter().zip(values.chunks(each)).map(|((name, shape), part)| (name, shape, part.to_vec())).collect()
}

/// Shapes have been checked by [`Checkpoint::validate`] against the same configuration that shaped the network.
fn read(checkpoint: &Checkpoint, parameter: &Parameter, unread: &mut HashSet<String>) -> Result<Vec<f32>, ernie_checkpoint::Error> {
    let mut values = Vec::with_capacity(parameter.shape.iter().product());
    for (name, _) in parameter.checkpoint_tensors() {
        values.append(&mut checkpoint.tensor(&name)?.to_f32()?);
        unread.remove(&name);
    }
    Ok(values)
}

/// Where a walk through the modules is.
#[derive(Default)]
struct Path(Vec<Option<String>>);

impl Path {
    /// An enum's variant (dense or MoE) is no part of a name.
    fn enter(&mut self, name: &str, container: &str) {
        self.0.push((!container.starts_with("Enum:")).then(|| name.to_string()));
    }

    fn exit(&mut self) {
        self.0.pop();
    }

    fn parameter<const D: usize>(&self, param: &Param<Tensor<D>>) -> Parameter {
        let name = self.0.iter().flatten().map(String::as_str).collect::<Vec<_>>().join(".");
        Parameter { trainable: !name.ends_with("e_score_correction_bias"), name, shape: param.dims().to_vec() }
    }
}

struct Visitor<F> {
    path: Path,
    f: F,
}

impl<F: FnMut(&Parameter, Vec<f32>)> ModuleVisitor for Visitor<F> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        (self.f)(&self.path.parameter(param), ops::host_f32(&param.val()));
    }
}

struct Mapper<F> {
    path: Path,
    f: F,
}

impl<F: FnMut(&Parameter, Vec<f32>) -> Vec<f32>> ModuleMapper for Mapper<F> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let parameter = self.path.parameter(&param);
        let (id, tensor, mapper) = param.consume();
        let device = tensor.device();
        let dims = tensor.dims();
        let values = tensor.inner().into_data().try_into_vec::<f32>().expect("parameters are f32");
        let length = values.len();
        let values = (self.f)(&parameter, values);
        assert_eq!(values.len(), length, "{} must keep its size", parameter.name);
        let tensor = Tensor::from_data(TensorData::new(values, dims), &device);
        let tensor = if device.is_autodiff() { tensor.set_require_grad(parameter.trainable) } else { tensor };
        Param::from_mapped_value(id, tensor, mapper)
    }
}

struct GradientVisitor {
    path: Path,
    tape: burn::tensor::Gradients,
    gradients: NamedParameters,
}

impl ModuleVisitor for GradientVisitor {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad_remove(&mut self.tape) {
            let values = gradient.into_data().try_into_vec::<f32>().expect("gradients are f32");
            self.gradients.insert(self.path.parameter(param).name, values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accumulation_adds_and_adopts() {
        let gradients =
            |values: &[(&str, &[f32])]| -> NamedParameters { values.iter().map(|(name, g)| (name.to_string(), g.to_vec())).collect() };
        let mut sum = gradients(&[("a", &[1.0, 2.0])]);
        accumulate(&mut sum, gradients(&[("a", &[0.5, 0.5]), ("b", &[7.0])]));
        assert_eq!(sum, gradients(&[("a", &[1.5, 2.5]), ("b", &[7.0])]));
    }
}
