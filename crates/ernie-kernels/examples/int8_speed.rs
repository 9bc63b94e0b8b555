//! How fast 8-bit products are on this machine: for one matrix and several batch sizes, GB/s of weights and Gop/s, medians.
//!
//! cargo run --release -p ernie-kernels --example int8_speed [n] [k] [threads]
use std::time::Instant;

use ernie_kernels::arch::pool::Pool;
use ernie_kernels::int8::{Into, Matrix8, Rows8, linear};

fn main() {
    let mut arguments = std::env::args().skip(1).map(|a| a.parse().expect("a number"));
    let (n, k, threads) = (arguments.next().unwrap_or(100_352), arguments.next().unwrap_or(1024), arguments.next().unwrap_or(2));
    let pool = Pool::new(threads);
    let began = Instant::now();
    let w = Matrix8::pack(&pool, n, k, |row, out| {
        out.iter_mut().enumerate().for_each(|(i, q)| *q = (row * 31 + i * 7) as u8 as i8);
        0.01
    });
    let w = w.expect("memory for the matrix");
    println!("pack {:.3} s, {} MB", began.elapsed().as_secs_f64(), w.bytes() / 1_000_000);
    let mut rows = Rows8::new();
    for m in [1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 256, 512] {
        let x: Vec<f32> = (0..m * k).map(|i| (i % 97) as f32 - 48.0).collect();
        rows.quantise(&pool, &x, k);
        let mut y = vec![0.0; m * n];
        let mut seconds: Vec<f64> = (0..(2000 / m).clamp(3, 30))
            .map(|_| {
                let began = Instant::now();
                linear(&pool, &mut y, &rows, &w, Into::Set);
                began.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        println!(
            "m {m:4}  {:8.3} ms  {:6.1} GB/s  {:7.0} Gop/s",
            median * 1e3,
            w.bytes() as f64 / median / 1e9,
            2e-9 * (m * n * k) as f64 / median
        );
    }
}
