//! What the tests of the operators share: a pseudo-random generator and comparisons.

use std::process::Command;

/// SplitMix64: the same numbers on every machine.
pub struct Random(u64);

impl Random {
    /// A sequence of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// `len` numbers uniform in [-scale, scale).
    pub fn vec(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.uniform() * scale).collect()
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }
}

/// Asserts that each difference is at most `tolerance` times the largest magnitude expected, taken as 0.01 where all are smaller (gradients
/// that cancel to nothing leave the rounding of their terms).
#[track_caller]
pub fn assert_close(name: &str, got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len(), "{name}: lengths");
    let scale = expected.iter().fold(1e-2f32, |a, x| a.max(x.abs()));
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((g - e).abs() <= tolerance * scale, "{name}[{i}]: got {g}, expected {e}, allowed {}", tolerance * scale);
    }
}

/// Asserts that `gradient` is the derivative of `loss` at `x`, by central differences in f64.
#[track_caller]
pub fn assert_gradient(name: &str, gradient: &[f32], x: &[f32], loss: impl Fn(&[f64]) -> f64) {
    const STEP: f64 = 1e-5;
    assert_eq!(gradient.len(), x.len(), "{name}: lengths");
    let mut point: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let mut differences = Vec::with_capacity(x.len());
    for i in 0..x.len() {
        let here = point[i];
        point[i] = here + STEP;
        let above = loss(&point);
        point[i] = here - STEP;
        let below = loss(&point);
        point[i] = here;
        differences.push(((above - below) / (2.0 * STEP)) as f32);
    }
    assert_close(name, gradient, &differences, 2e-5);
}

/// Σ weights·values: a loss whose gradient with respect to the values is `weights`.
pub fn weighted_sum(values: &[f64], weights: &[f32]) -> f64 {
    assert_eq!(values.len(), weights.len());
    values.iter().zip(weights).map(|(v, &w)| v * f64::from(w)).sum()
}

/// f32 to f64.
pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// f64 to f32.
pub fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

/// The instruction set is chosen once per process, so the other ones get processes of their own.
#[test]
fn every_test_passes_on_the_lesser_instruction_sets() {
    if std::env::var_os("ERNIE_ISA").is_some() {
        return;
    }
    // Without tiles the best one is what this process tests.
    let lesser = if crate::arch::amx::available() { &["portable", "avx2", "avx512"][..] } else { &["portable", "avx2"] };
    for isa in lesser {
        let tests = Command::new(std::env::current_exe().expect("the test binary has a path"))
            .env("ERNIE_ISA", isa)
            .output()
            .expect("the test binary starts");
        let report = String::from_utf8_lossy(&tests.stdout);
        assert!(tests.status.success() && report.contains("test result: ok"), "with ERNIE_ISA={isa}:\n{report}");
        let obeyed = "arch::isa::tests::the_instruction_set_is_the_one_that_the_variable_names ... ok";
        assert!(report.contains(obeyed), "with ERNIE_ISA={isa} nobody asked which instruction set was in use:\n{report}");
    }
}
