//! Where the time of the network goes, by operator and direction.
//!
//! One thread calls the operators, and each divides its work among threads inside: what counts is the wall-clock time of the call, on the calling
//! thread. What is measured belongs to that thread while [`timed`] runs; otherwise no clock is read.
use std::{
    cell::RefCell,
    ops::AddAssign,
    time::{Duration, Instant},
};

/// A fused operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Operator {
    /// Rows of the embedding.
    Embedding,
    /// RMS norms on their own: before gates of heads, before the head.
    Norm,
    /// Norm, then queries, keys and values.
    Qkv,
    /// Rotary positions with attention, to tokens or to paragraphs.
    Attention,
    /// The projection after attention, added to the residual.
    Output,
    /// Norm, then gate and up of dense and shared layers.
    GateUp,
    /// SwiGLU, then down, added to the residual.
    Down,
    /// Norm, then routed experts: gathering, products, SwiGLU, weighted sum; added to the residual.
    Experts,
    /// Other products: routers behind their norm, gates of heads, the projection before multi-token prediction.
    Linear,
    /// How much new a token brings.
    Density,
    /// Heads behind their gates.
    HeadGates,
    /// Head with cross-entropy. In training its forward pass makes the gradients too; the backward pass only scales them.
    Head,
}

impl Operator {
    /// In the order of a layer.
    pub const ALL: [Operator; 12] = [
        Operator::Embedding,
        Operator::Norm,
        Operator::Qkv,
        Operator::Attention,
        Operator::Output,
        Operator::GateUp,
        Operator::Down,
        Operator::Experts,
        Operator::Linear,
        Operator::Density,
        Operator::HeadGates,
        Operator::Head,
    ];

    /// Lower-case name, as it stands in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Operator::Embedding => "embedding",
            Operator::Norm => "norm",
            Operator::Qkv => "qkv",
            Operator::Attention => "attention",
            Operator::Output => "output",
            Operator::GateUp => "gate_up",
            Operator::Down => "down",
            Operator::Experts => "experts",
            Operator::Linear => "linear",
            Operator::Density => "density",
            Operator::HeadGates => "head_gates",
            Operator::Head => "head",
        }
    }
}

/// Time by operator, forwards and backwards.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Times([[Duration; 2]; Operator::ALL.len()]);

impl Times {
    /// Of forward passes, those of layers that are computed again included.
    pub fn forward(&self, operator: Operator) -> Duration {
        self.0[operator as usize][0]
    }

    /// Of backward passes.
    pub fn backward(&self, operator: Operator) -> Duration {
        self.0[operator as usize][1]
    }

    /// Of all operators.
    pub fn total(&self) -> Duration {
        self.0.iter().flatten().sum()
    }
}

impl AddAssign for Times {
    fn add_assign(&mut self, other: Self) {
        self.0.iter_mut().flatten().zip(other.0.iter().flatten()).for_each(|(sum, time)| *sum += *time);
    }
}

thread_local! {
    static TIMES: RefCell<Option<Times>> = const { RefCell::new(None) };
}

/// What `f` gives, and how long the operators that it called on this thread took.
pub fn timed<T>(f: impl FnOnce() -> T) -> (T, Times) {
    let outer = TIMES.replace(Some(Times::default()));
    let result = f();
    (result, TIMES.replace(outer).unwrap_or_default())
}

/// Counts for an operator's pass from now until it is dropped.
pub(super) struct Clock {
    operator: Operator,
    pass: usize,
    start: Option<Instant>,
}

/// A forward pass begins.
pub(super) fn forward(operator: Operator) -> Clock {
    Clock::new(operator, 0)
}

/// A backward pass begins.
pub(super) fn backward(operator: Operator) -> Clock {
    Clock::new(operator, 1)
}

impl Clock {
    fn new(operator: Operator, pass: usize) -> Self {
        let on = TIMES.with_borrow(Option::is_some);
        Self { operator, pass, start: on.then(Instant::now) }
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        if let Some(start) = self.start {
            TIMES.with_borrow_mut(|times| {
                if let Some(times) = times {
                    times.0[self.operator as usize][self.pass] += start.elapsed();
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_count_inside_of_timed_alone() {
        let pause = || std::thread::sleep(Duration::from_millis(2));
        drop(forward(Operator::Norm));
        let ((), times) = timed(|| {
            let _clock = backward(Operator::Head);
            pause();
        });
        drop(forward(Operator::Norm));
        assert!(times.backward(Operator::Head) >= Duration::from_millis(2));
        assert_eq!(times.total(), times.backward(Operator::Head), "nothing else was called");
        let mut sum = times;
        sum += times;
        assert_eq!(sum.total(), 2 * times.total());
        assert_eq!(timed(pause).1, Times::default(), "each begins anew");
    }

    #[test]
    fn operators_stand_at_their_numbers() {
        for (index, operator) in Operator::ALL.into_iter().enumerate() {
            assert_eq!(operator as usize, index, "{}", operator.as_str());
        }
    }
}
