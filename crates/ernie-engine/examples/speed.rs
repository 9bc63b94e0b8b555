use std::time::Instant;
use ernie_engine::*;
fn main() {
    let dir = std::env::args().nth(1).unwrap();
    let pp: usize = std::env::args().nth(2).map_or(512, |v| v.parse().unwrap());
    let t = Instant::now();
    let path: &std::path::Path = dir.as_ref();
    let ckpt = ernie_checkpoint::Checkpoint::open(path).unwrap();
    let dtype = match std::env::args().nth(3).as_deref() { Some("f32") => WeightDtype::F32, Some("auto") => WeightDtype::Auto, _ => WeightDtype::Int8 };
    let model = Model::load_with(&ckpt, LoadOptions { dtype, threads: 2 }).unwrap();
    println!("load {:.3}", t.elapsed().as_secs_f64());
    let ids: Vec<u32> = (0..pp).map(|i| 3 + (i as u32 * 7919) % 10000).collect();
    for _ in 0..3 {
        let mut s = Session::with_cache(&model, pp + 200, KvDtype::Bf16).unwrap();
        let t = Instant::now();
        s.prefill(&ids).unwrap();
        let p = t.elapsed().as_secs_f64();
        let t = Instant::now();
        for i in 0..64 { s.decode(5 + i).unwrap(); }
        let d = t.elapsed().as_secs_f64() / 64.0;
        println!("prefill {:.1} tok/s  decode {:.1} tok/s ({:.2} ms)", pp as f64 / p, 1.0 / d, d * 1e3);
    }
}
