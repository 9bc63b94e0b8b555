//! What the machine can do at most: the numbers that speed is a share of. Measured anew each time, for a shared machine is not the same twice.
#![allow(unsafe_code)] // loops of instructions on registers

use std::time::{Duration, Instant};

use super::dot_i8::{self, PANEL, Tokens};
use super::isa::{Isa, isa, simd_fn};
use super::matrix::MatMut;
use super::pool::Pool;
use super::tile::{COLS, ROWS, Update, tile};
use crate::memory::Memory;

/// Memory that is read to measure bandwidth: far larger than caches.
const READ_BYTES: usize = 512 << 20;
/// Memory of one task: a stream of its own.
const STREAM_BYTES: usize = 1 << 20;
/// Time of one measurement of arithmetic; the best of a few counts.
const TIME: Duration = Duration::from_millis(40);
const TRIES: usize = 5;

/// The limits of this machine with the threads of a pool.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Reading memory that no cache holds, 10⁹ bytes per second.
    pub bandwidth_gb_s: f64,
    /// Multiplying and adding bytes, 10⁹ operations per second, a multiply-add being two.
    pub int8_gop_s: f64,
    /// Multiplying and adding f32, 10⁹ operations per second.
    pub f32_gflop_s: f64,
}

impl Limits {
    /// Measures all three; about a second, and half a GiB of memory for that time. `None` for the bandwidth's memory not to be had.
    pub fn measure(pool: &Pool) -> std::io::Result<Self> {
        let bandwidth_gb_s = bandwidth(pool)?;
        Ok(Limits { bandwidth_gb_s, int8_gop_s: arithmetic(pool, int8_loop), f32_gflop_s: arithmetic(pool, f32_loop) })
    }
}

fn bandwidth(pool: &Pool) -> std::io::Result<f64> {
    let mut memory = Memory::zeroed(READ_BYTES)?;
    // Pages that were never written are all the same one.
    pool.for_each_piece(memory.bytes_mut(), STREAM_BYTES, |index, piece| piece.fill(index as u8));
    let streams = READ_BYTES / STREAM_BYTES;
    let best = (0..TRIES).map(|_| {
        let began = Instant::now();
        pool.run(streams, &|index| {
            let words: &[u64] = bytemuck::cast_slice(&memory.bytes()[index * STREAM_BYTES..][..STREAM_BYTES]);
            std::hint::black_box(sum(words));
        });
        READ_BYTES as f64 / began.elapsed().as_secs_f64() / 1e9
    });
    Ok(best.fold(0.0, f64::max))
}

simd_fn! {
    fn sum<FMA>(words: &[u64]) -> u64 {
        words.iter().fold(0, |sum, word| sum ^ word)
    }
}

/// Billions of operations per second of all threads together; `body` computes for about so many rounds and returns how many operations that was.
fn arithmetic(pool: &Pool, body: fn(usize) -> f64) -> f64 {
    let rate = || {
        let began = Instant::now();
        let rates = std::sync::Mutex::new(0.0);
        // One task for each thread, each measuring itself until the time is over.
        pool.run(pool.threads(), &|_| {
            let (start, mut operations) = (Instant::now(), 0.0);
            while began.elapsed() < TIME {
                operations += body(2000);
            }
            let rate = operations / start.elapsed().as_secs_f64().max(TIME.as_secs_f64() / 2.0);
            *rates.lock().unwrap_or_else(std::sync::PoisonError::into_inner) += rate;
        });
        rates.into_inner().unwrap_or_default() / 1e9
    };
    (0..TRIES).map(|_| rate()).fold(0.0, f64::max)
}

fn int8_loop(rounds: usize) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 && is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the features have just been asked for; the loop touches registers alone.
        return unsafe { avx512::int8(rounds) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx2 && !is_x86_feature_detected!("avxvnni") {
        // SAFETY: as above.
        return unsafe { avx2::int8(rounds) };
    }
    let _: Isa = isa();
    // The tile on operands in the first-level cache: what the instructions of this machine reach.
    const WORDS: usize = 64;
    let (x, w) = ([1u8; 12 * 4 * WORDS], vec![129u8; 2 * WORDS * 4 * PANEL]);
    let mut sums = [0i32; 24 * PANEL];
    let times = rounds / WORDS;
    for _ in 0..times {
        dot_i8::tile(&mut sums, Tokens { bytes: &x, stride: 4 * WORDS, count: 12 }, &w, 2, WORDS, dot_i8::Fetch::Nothing);
        std::hint::black_box(&mut sums);
    }
    (times * 12 * 2 * PANEL * 4 * WORDS * 2) as f64
}

fn f32_loop(rounds: usize) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        // SAFETY: as above.
        return unsafe { avx512::f32(rounds) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx2 {
        // SAFETY: as above.
        return unsafe { avx2::f32(rounds) };
    }
    const K: usize = 64;
    let (a, b) = ([1.0f32; ROWS * K], [1.0f32; COLS * K]);
    let mut c = [0.0f32; ROWS * COLS];
    let times = rounds / K;
    for _ in 0..times {
        tile::<ROWS, 1, ROWS>(&mut MatMut::new(&mut c, ROWS, COLS), &a, &b, K, Update::Set);
        std::hint::black_box(&mut c);
    }
    (times * ROWS * COLS * K * 2) as f64
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    /// Independent sums: enough to cover the latency of any multiply-add.
    const SUMS: usize = 24;

    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma")]
    pub unsafe fn int8(rounds: usize) -> f64 {
        let mut sums = [_mm512_setzero_si512(); SUMS];
        let (a, b) = (_mm512_set1_epi8(std::hint::black_box(3)), _mm512_set1_epi8(std::hint::black_box(2)));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        let mut total = sums[0];
        for sum in &sums[1..] {
            total = _mm512_xor_si512(total, *sum);
        }
        std::hint::black_box(_mm512_reduce_add_epi32(total));
        (rounds * SUMS * 16 * 4 * 2) as f64
    }

    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
    pub unsafe fn f32(rounds: usize) -> f64 {
        let mut sums = [_mm512_set1_ps(1.0); SUMS];
        let (a, b) = (_mm512_set1_ps(std::hint::black_box(0.5)), _mm512_set1_ps(std::hint::black_box(0.25)));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        let mut total = sums[0];
        for sum in &sums[1..] {
            total = _mm512_add_ps(total, *sum);
        }
        std::hint::black_box(_mm512_reduce_add_ps(total));
        (rounds * SUMS * 16 * 2) as f64
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    /// As above, and no more than there are registers for.
    const SUMS: usize = 12;

    /// Bytes are multiplied as pairs of 16 bits (see [`super::dot_i8`]).
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn int8(rounds: usize) -> f64 {
        let (mut sums, b) = ([_mm256_set1_epi16(std::hint::black_box(3)); SUMS], _mm256_set1_epi16(std::hint::black_box(2)));
        for _ in 0..rounds {
            for sum in &mut sums {
                // Times the sum itself: a product of two that never change would be computed once.
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*sum, b));
            }
        }
        let mut total = sums[0];
        for sum in &sums[1..] {
            total = _mm256_xor_si256(total, *sum);
        }
        std::hint::black_box(total);
        (rounds * SUMS * 8 * 2 * 2) as f64
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn f32(rounds: usize) -> f64 {
        let mut sums = [_mm256_set1_ps(1.0); SUMS];
        let (a, b) = (_mm256_set1_ps(std::hint::black_box(0.5)), _mm256_set1_ps(std::hint::black_box(0.25)));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        let mut total = sums[0];
        for sum in &sums[1..] {
            total = _mm256_add_ps(total, *sum);
        }
        std::hint::black_box(total);
        (rounds * SUMS * 8 * 2) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any machine that can build this does more than a billion of either, and more than a hundredth of that while it builds something else.
    #[test]
    fn arithmetic_has_a_limit() {
        let pool = Pool::new(1);
        assert!(arithmetic(&pool, int8_loop) > 0.01 && arithmetic(&pool, f32_loop) > 0.01);
    }
}
