//! What this machine can do at most: bandwidth, 8-bit and f32 arithmetic.
use ernie_kernels::arch::{limits::Limits, pool::Pool};

fn main() {
    let threads = std::env::args().nth(1).map_or(2, |a| a.parse().expect("a number of threads"));
    println!("{:.1?}", Limits::measure(&Pool::new(threads)).expect("memory"));
}
