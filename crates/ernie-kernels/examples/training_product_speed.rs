//! How fast products of training are on this machine, in both precisions: nanoseconds to pack an element of either operand, from rows and from columns, and
//! Gop/s of the product of packed operands. Medians.
//!
//! cargo run --release -p ernie-kernels --example training_product_speed [rounds] (`RAYON_NUM_THREADS` sets the threads)
use std::time::Instant;

use ernie_kernels::arch::gemm::{Threads, Update};
use ernie_kernels::arch::matrix::{Mat, MatMut};
use ernie_kernels::arch::quantised::Rounding;
use ernie_kernels::matmul::{Left, Precision, Right, multiply};

/// Rows and columns of the result and the length of a sum: a layer of width 256 and one of 512 forwards, a gradient of weights, a part of the head.
const SHAPES: [(usize, usize, usize); 6] =
    [(2048, 768, 256), (2048, 256, 768), (2048, 1536, 512), (768, 256, 2048), (1536, 512, 2048), (512, 8192, 256)];
/// Operands in turn, so that they come from memory as in a step.
const SETS: usize = 6;

fn main() {
    let rounds = std::env::args().nth(1).map_or(7, |rounds| rounds.parse().expect("a number of rounds"));
    for precision in [Precision::F32, Precision::Int8Mixed] {
        println!(
            "{precision:?}: rows x columns x depth | ns to pack an element: left, left^T (gradients: stochastic), right, right^T | Gop/s"
        );
        for (m, n, k) in SHAPES {
            let values = |count: usize| (0..count).map(|i| (i * 7 % 13) as f32 - 6.0).collect::<Vec<f32>>();
            let (a, b): (Vec<_>, Vec<_>) = (0..SETS).map(|_| (values(m * k), values(n * k))).unzip();
            let mut c = vec![vec![0.0; m * n]; SETS];
            let mut seconds: [Vec<f64>; 5] = Default::default();
            for _ in 0..rounds {
                let mut timed = |what: usize, run: &mut dyn FnMut(usize)| {
                    let began = Instant::now();
                    (0..SETS).for_each(run);
                    seconds[what].push(began.elapsed().as_secs_f64() / SETS as f64);
                };
                let left = |x: Mat<'_>, rounding| Left::new(&[x], precision, rounding, Threads::All);
                let right = |x: Mat<'_>| Right::new(&[x], precision, Threads::All);
                let (mut lefts, mut rights) = (Vec::new(), Vec::new());
                timed(0, &mut |i| lefts.push(left(Mat::new(&a[i], m, k), Rounding::Nearest)));
                timed(1, &mut |i| drop(left(Mat::new(&a[i], k, m).t(), Rounding::Stochastic)));
                timed(2, &mut |i| rights.push(right(Mat::new(&b[i], n, k))));
                timed(3, &mut |i| drop(right(Mat::new(&b[i], k, n).t())));
                timed(4, &mut |i| multiply(MatMut::new(&mut c[i], m, n), &lefts[i], &rights[i], Update::Set, Threads::All));
            }
            let median = seconds.map(|mut seconds| {
                seconds.sort_by(f64::total_cmp);
                seconds[seconds.len() / 2]
            });
            let packing = [m, m, n, n]
                .map(|rows| (rows * k) as f64 / 1e9)
                .into_iter()
                .zip(median)
                .map(|(elements, s)| format!("{:.2}", s / elements));
            let speed = (2 * m * n * k) as f64 / median[4] / 1e9;
            println!("{m:5} x {n:4} x {k:4} | {} | {speed:.0}", packing.collect::<Vec<_>>().join(" "));
        }
    }
}
