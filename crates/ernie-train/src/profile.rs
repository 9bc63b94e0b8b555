//! Where the time of a run goes: operators of the network, and what stands around them in a step and between steps.
use std::time::{Duration, Instant};

use ernie_model::ops::profile::{Operator, Times, timed};

/// Seconds of wall-clock time. The rows below `step_seconds` sum to it, and with validation and checkpoints to [`Profile::seconds`].
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Profile {
    /// Steps of this process.
    pub steps: u64,
    /// All steps.
    pub step_seconds: f64,
    /// The network's operators, those that were called.
    pub operators: Vec<OperatorSeconds>,
    /// Drawing and packing batches.
    pub data: f64,
    /// Clipping and AdamW, with the routers' own updates.
    pub optimizer: f64,
    /// What else a step does: the tape, operations of Burn between the operators, sums of gradients, telemetry.
    pub rest: f64,
    /// Validations.
    pub validation: f64,
    /// Checkpoints, and writing the finished model.
    pub checkpoints: f64,
}

/// Seconds of one operator.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct OperatorSeconds {
    /// See [`Operator`].
    pub operator: String,
    /// Its forward passes, those of layers that are computed again included.
    pub forward: f64,
    /// Its backward passes.
    pub backward: f64,
}

impl Profile {
    /// Steps, validations and checkpoints.
    pub fn seconds(&self) -> f64 {
        self.step_seconds + self.validation + self.checkpoints
    }

    /// The table's rows in order: name, forward and backward seconds where it has both, seconds.
    pub fn rows(&self) -> Vec<(&str, Option<[f64; 2]>, f64)> {
        let operators = self.operators.iter().map(|o| (o.operator.as_str(), Some([o.forward, o.backward]), o.forward + o.backward));
        let around = [
            ("optimizer", self.optimizer),
            ("data", self.data),
            ("rest of the steps", self.rest),
            ("validation", self.validation),
            ("checkpoints", self.checkpoints),
        ];
        operators.chain(around.map(|(name, seconds)| (name, None, seconds))).collect()
    }
}

/// What is not an operator.
#[derive(Debug, Clone, Copy)]
#[repr(usize)]
pub(crate) enum Part {
    /// A whole step.
    Step,
    /// See the fields of [`Profile`].
    Data,
    Optimizer,
    Validation,
    Checkpoints,
}

/// Adds up durations while a run goes. Only the operators' cost something to measure, and only they can be left out.
#[derive(Debug, Default)]
pub(crate) struct Clocks {
    on: bool,
    steps: u64,
    operators: Times,
    parts: [Duration; 5],
}

impl Clocks {
    pub(crate) fn new(on: bool) -> Self {
        Self { on, ..Self::default() }
    }

    /// What happened since `start` was `part`.
    pub(crate) fn add(&mut self, part: Part, start: Instant) {
        self.parts[part as usize] += start.elapsed();
        self.steps += u64::from(matches!(part, Part::Step));
    }

    /// What `f` gives, with the time of the operators that it calls, if that is asked for; for [`Clocks::add_operators`].
    pub(crate) fn time<T>(&self, f: impl FnOnce() -> T) -> (T, Times) {
        if self.on { timed(f) } else { (f(), Times::default()) }
    }

    /// Counts what [`Clocks::time`] measured.
    pub(crate) fn add_operators(&mut self, times: Times) {
        self.operators += times;
    }

    /// None where nobody asked for one.
    pub(crate) fn profile(&self) -> Option<Profile> {
        let of = |part: Part| self.parts[part as usize];
        let known = self.operators.total() + of(Part::Data) + of(Part::Optimizer);
        let called = |operator: &Operator| !(self.operators.forward(*operator) + self.operators.backward(*operator)).is_zero();
        let operators = Operator::ALL.into_iter().filter(called).map(|operator| OperatorSeconds {
            operator: operator.as_str().to_owned(),
            forward: self.operators.forward(operator).as_secs_f64(),
            backward: self.operators.backward(operator).as_secs_f64(),
        });
        self.on.then(|| Profile {
            steps: self.steps,
            step_seconds: of(Part::Step).as_secs_f64(),
            operators: operators.collect(),
            data: of(Part::Data).as_secs_f64(),
            optimizer: of(Part::Optimizer).as_secs_f64(),
            rest: of(Part::Step).saturating_sub(known).as_secs_f64(),
            validation: of(Part::Validation).as_secs_f64(),
            checkpoints: of(Part::Checkpoints).as_secs_f64(),
        })
    }
}
