//! Random numbers that depend on a seed and a counter alone, so that the n-th draw of a request is the same whatever else the program does.

/// A counter-based generator: draw n is a hash of (seed, n), the finaliser of SplitMix64 (Steele, Lea, Flood 2014) over a Weyl sequence.
#[derive(Clone, Debug)]
pub struct Random {
    key: u64,
    counter: u64,
}

impl Random {
    /// A sequence of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Random { key: mix(seed ^ 0x6a09_e667_f3bc_c908), counter: 0 }
    }

    /// The next number, uniform in [0, 1) with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        self.counter = self.counter.wrapping_add(1);
        let bits = mix(self.key.wrapping_add(self.counter.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        (bits >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn is_uniform_and_differs_between_seeds() {
        for seed in [0, 1, 2, u64::MAX] {
            let mut random = Random::new(seed);
            let mut bins = [0u32; 20];
            for _ in 0..20_000 {
                bins[(random.uniform() * 20.0) as usize] += 1;
            }
            let chi_square: f64 = bins.iter().map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0).sum();
            assert!(chi_square < 45.0, "seed {seed}: chi-square {chi_square} with 19 degrees of freedom");
        }
        assert_ne!(Random::new(0).uniform(), Random::new(1).uniform());
        assert_eq!(Random::new(7).uniform(), Random::new(7).uniform());
    }
}
