//! Trains small golden models for a few steps on the CPU and on wgpu, side by side, and fails where the two do not agree.
//!
//! The CPU runs the fused kernels with their hand-written backwards; wgpu runs the plain operators with Burn's own. Model, batch and
//! optimizer settings are the goldens', for whose batches no choice of an expert hangs on rounding. `benchmarks/gpu_step.sh` runs this on
//! software Vulkan.
use std::{
    error::Error,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use ernie_checkpoint::Checkpoint;
use ernie_model::{Ernie, LossWeights, NamedParameters, PackedBatch, gpu_training_device, ops, training_device};
use ernie_train::optimizer::{AdamW, AdamWConfig};
use serde_json::Value;

/// Dense with biases, dense with odd sizes, mixture of experts, multi-token prediction.
const MODELS: [&str; 4] = ["dense_bias_mqa", "dense_untied_gqa", "moe_k2", "moe_mtp"];
const STEPS: usize = 3;
/// Every term of the training loss takes part.
const LOSS_WEIGHTS: LossWeights = LossWeights { balance: 0.01, z: 0.001, mtp: 0.1, pull: 0.0, gate: 0.0, gate_target: 0.0 };

/// Largest difference of a loss, in nats.
const LOSS_TOLERANCE: f64 = 1e-5;
/// Largest ‖g_wgpu − g_cpu‖ / ‖g_cpu‖ of a parameter's gradient.
const GRADIENT_TOLERANCE: f64 = 1e-4;
/// Largest ‖w_wgpu − w_cpu‖ / ‖w_cpu − w_start‖ of a parameter after all steps: what the steps changed, not what the weights are. AdamW
/// divides each gradient by its size, so that elements with a gradient near zero carry its rounding into the weights undiminished.
const UPDATE_TOLERANCE: f64 = 1e-3;

fn main() -> ExitCode {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/models");
    println!("device: {}", gpu_training_device().identity().map_or(String::from("unnamed"), |identity| identity.name));
    let mut failures = Vec::new();
    for name in MODELS {
        match compare(name, models.join(name)) {
            Ok(found) => failures.extend(found),
            Err(error) => failures.push(format!("{name}: {error}")),
        }
    }
    println!("tolerances: loss {LOSS_TOLERANCE:e}, gradient {GRADIENT_TOLERANCE:e}, update {UPDATE_TOLERANCE:e}");
    failures.iter().for_each(|failure| println!("DIFFERENT: {failure}"));
    if failures.is_empty() {
        println!("wgpu and the CPU agree");
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Prints a line for each step and one for the weights; returns what is out of tolerance.
fn compare(name: &str, dir: PathBuf) -> Result<Vec<String>, Box<dyn Error>> {
    let golden: Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json"))?)?;
    let batch = batch(&golden)?;
    let checkpoint = Checkpoint::open(&dir)?;
    let mut cpu = Run::new(Ernie::load(&checkpoint, &training_device())?, &golden, &batch)?;
    let mut gpu = Run::new(Ernie::load(&checkpoint, &gpu_training_device())?, &golden, &batch)?;
    let start = cpu.model.named_parameters();
    let mut failures = Vec::new();
    if gpu.model.named_parameters() != start {
        failures.push(format!("{name}: weights as loaded"));
    }
    for step in 1..=STEPS {
        let (expected, got) = (cpu.step(&batch), gpu.step(&batch));
        let loss = (got.loss - expected.loss).abs();
        let (gradient, worst) = largest(&got.gradients, &expected.gradients, None);
        println!(
            "{name:<18} step {step}  loss cpu {:.6} wgpu {:.6} |Δ| {loss:.1e}  {} gradients, worst {gradient:.1e} ({worst})  cpu {:.3} s, wgpu {:.2} s",
            expected.loss,
            got.loss,
            expected.gradients.len(),
            expected.duration.as_secs_f64(),
            got.duration.as_secs_f64(),
        );
        if got.usage != expected.usage {
            failures.push(format!("{name}: step {step} chose other experts"));
        }
        if exceeds(loss, LOSS_TOLERANCE) {
            failures.push(format!("{name}: loss of step {step} is off by {loss:.1e}"));
        }
        if exceeds(gradient, GRADIENT_TOLERANCE) {
            failures.push(format!("{name}: gradient of {worst} in step {step} is off by {gradient:.1e}"));
        }
    }
    let (expected, got) = (cpu.model.named_parameters(), gpu.model.named_parameters());
    let (update, worst) = largest(&got, &expected, Some(&start));
    println!("{name:<18} weights after {STEPS} steps: off by {update:.1e} of their update at most ({worst})");
    if exceeds(update, UPDATE_TOLERANCE) {
        failures.push(format!("{name}: {worst} after {STEPS} steps is off by {update:.1e} of its update"));
    }
    Ok(failures)
}

/// A model in training.
struct Run {
    model: Ernie,
    optimizer: AdamW,
    lr: f64,
}

/// What one step computed.
struct Step {
    loss: f64,
    gradients: NamedParameters,
    usage: Vec<(usize, Vec<u64>)>,
    duration: Duration,
}

impl Run {
    fn new(mut model: Ernie, golden: &Value, batch: &PackedBatch) -> Result<Self, Box<dyn Error>> {
        model.reserve_positions(batch.tokens());
        let settings = &golden["adamw"];
        let number = |value: &Value| value.as_f64().ok_or("golden.json lacks a setting of adamw");
        let config = AdamWConfig {
            beta1: number(&settings["betas"][0])?,
            beta2: number(&settings["betas"][1])?,
            eps: number(&settings["eps"])?,
            weight_decay: number(&settings["weight_decay"])?,
        };
        Ok(Self { model, optimizer: AdamW::new(config), lr: number(&settings["lr"])? })
    }

    /// Loss, gradients and update; the values on the host are the proof that the device is done.
    fn step(&mut self, batch: &PackedBatch) -> Step {
        let start = Instant::now();
        let losses = self.model.loss(batch, &LOSS_WEIGHTS);
        let loss = f64::from(ops::scalar(&losses.total));
        let gradients = self.model.backward(losses.total);
        self.model = self.optimizer.update(self.model.clone(), self.lr, gradients.clone(), 1.0, |_, _| {});
        Step { loss, gradients, usage: losses.usage, duration: start.elapsed() }
    }
}

/// The golden's sequences, packed.
fn batch(golden: &Value) -> Result<PackedBatch, Box<dyn Error>> {
    let ids: Vec<Vec<u32>> = serde_json::from_value(golden["ids"].clone())?;
    let targets: Vec<Vec<i32>> = serde_json::from_value(golden["targets"].clone())?;
    let mut cu_seqlens = vec![0];
    ids.iter().for_each(|row| cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + row.len() as u32));
    Ok(PackedBatch { ids: ids.concat().into(), targets: targets.concat().into(), cu_seqlens: cu_seqlens.into(), ..PackedBatch::default() })
}

/// The largest `‖got − expected‖ / ‖expected − origin‖` of a parameter (without origin: zero), and whose it is. Where the divisor is zero,
/// as for a parameter that no step changes, the difference itself counts.
fn largest(got: &NamedParameters, expected: &NamedParameters, origin: Option<&NamedParameters>) -> (f64, String) {
    assert!(got.keys().eq(expected.keys()), "both have the same parameters");
    let mut worst = (0.0, String::from("none"));
    for (name, expected) in expected {
        let zeros = vec![0.0; expected.len()];
        let size = distance(expected, origin.map_or(&zeros, |origin| &origin[name]));
        let difference = distance(&got[name], expected);
        let relative = if size == 0.0 { difference } else { difference / size };
        if exceeds(relative, worst.0) {
            worst = (relative, name.clone());
        }
    }
    worst
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum::<f64>().sqrt()
}

/// NaN exceeds everything.
fn exceeds(value: f64, limit: f64) -> bool {
    value.is_nan() || value > limit
}
