use super::*;
use crate::testing::Random;

const SHAPES: [(usize, usize, usize); 5] = [(1, 1, 4), (4, 2, 16), (3, 1, 6), (16, 2, 128), (2, 2, 72)];

fn past(window: Option<usize>) -> Past<'static> {
    window.map_or(Past::All, Past::Window)
}

/// Two layers and scattered blocks; the other layer holds other values.
fn filled(k: &[f32], v: &[f32], blocks: &[u32], kv_heads: usize, d: usize, dtype: KvDtype) -> KvBlocks {
    let mut kv = KvBlocks::new(2, 40, kv_heads, d, dtype).unwrap();
    for (position, (k, v)) in k.chunks_exact(kv_heads * d).zip(v.chunks_exact(kv_heads * d)).enumerate() {
        let (block, offset) = (blocks[position / BLOCK], position % BLOCK);
        kv.store(1, block, offset, k, v);
        kv.store(0, block, offset, v, k);
    }
    kv
}

#[test]
fn equals_its_twin_and_never_depends_on_what_is_computed_together() {
    let pool = Pool::new(2);
    let blocks = [7, 3, 39, 0, 12];
    for (q_heads, kv_heads, d) in SHAPES {
        for (dtype, tolerance) in [(KvDtype::F32, 2e-6), (KvDtype::Bf16, 8e-3), (KvDtype::Int8, 1.5e-2)] {
            let positions = 131;
            let q = Random::new(1).vec(positions * q_heads * d, 4.0);
            let (k, v) = (Random::new(2).vec(positions * kv_heads * d, 1.0), Random::new(3).vec(positions * kv_heads * d, 1.0));
            let kv = filled(&k, &v, &blocks, kv_heads, d, dtype);
            for window in [None, Some(1), Some(7), Some(32), Some(50), Some(131)] {
                let what = format!("{q_heads}/{kv_heads} heads of {d}, {dtype:?}, window {window:?}");
                let layer = Layer { kv: &kv, layer: 1, q_heads, past: past(window), gates: None };
                let queries = Mat::new(&q, positions, q_heads * d);
                let expected = scalar::attention(&q, &k, &v, window.unwrap_or(positions), q_heads, kv_heads, d);
                let mut all = vec![0.0; q.len()];
                let mut spans = Spans::default();
                spans.push(positions, 0, &blocks);
                attention(&pool, &mut all, queries, None, layer, &mut spans);
                for (g, e) in all.iter().zip(&expected) {
                    assert!((f64::from(*g) - e).abs() < tolerance, "{what}: {g} for {e}");
                }
                // The same queries in pieces, several of them in one step and on one thread, without the blocks that no query sees.
                for cuts in [&[0, 1, 2, 40, 131][..], &[0, 33, 64, 65, 131], &[0, 130, 131]] {
                    let mut pieces = vec![0.0; q.len()];
                    let mut spans = Spans::default();
                    for cut in cuts.windows(2) {
                        let gone = window.map_or(0, |window: usize| (cut[0] + 1usize).saturating_sub(window) / BLOCK);
                        spans.push_from(cut[1] - cut[0], cut[0], gone, &blocks[gone..cut[1].div_ceil(BLOCK)]);
                    }
                    attention(&Pool::new(1), &mut pieces, queries, None, layer, &mut spans);
                    assert_eq!(pieces, all, "{what}, cut at {cuts:?}");
                }
            }
        }
    }
}

#[test]
fn heads_whose_gate_is_shut_are_left_out_and_change_no_other() {
    let pool = Pool::new(2);
    let blocks = [7, 3, 39, 0, 12];
    for (q_heads, kv_heads, d) in SHAPES {
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            let positions = 131;
            let q = Random::new(1).vec(positions * q_heads * d, 4.0);
            let (k, v) = (Random::new(2).vec(positions * kv_heads * d, 1.0), Random::new(3).vec(positions * kv_heads * d, 1.0));
            let kv = filled(&k, &v, &blocks, kv_heads, d, dtype);
            for window in [None, Some(20)] {
                let run = |gates: Option<&[f32]>, rows: std::ops::Range<usize>| {
                    let mut out = vec![f32::NAN; rows.len() * q_heads * d];
                    let mut spans = Spans::default();
                    spans.push(rows.len(), rows.start, &blocks[..rows.end.div_ceil(BLOCK)]);
                    let queries = Mat::new(&q, positions, q_heads * d).rows_of(rows.clone());
                    let gates = gates.map(|gates| &gates[rows.start * q_heads..rows.end * q_heads]);
                    attention(&pool, &mut out, queries, None, Layer { kv: &kv, layer: 1, q_heads, past: past(window), gates }, &mut spans);
                    out
                };
                let all = run(None, 0..positions);
                let mut random = Random::new(8);
                // Some rows with all heads shut, some with none.
                let gates: Vec<f32> =
                    (0..positions * q_heads).map(|i| if random.below(3) == 0 || i / q_heads % 7 == 3 { 0.0 } else { 1.0 }).collect();
                let gated = run(Some(&gates), 0..positions);
                for (head, gate) in gates.iter().enumerate() {
                    let (got, whole) = (&gated[head * d..][..d], &all[head * d..][..d]);
                    assert!(if *gate == 0.0 { got.iter().all(|x| *x == 0.0) } else { got == whole }, "head {head}, window {window:?}");
                }
                // Token by token the same bits; and a factor is a factor.
                for row in [0, 3, 64, 130] {
                    assert_eq!(run(Some(&gates), row..row + 1), gated[row * q_heads * d..][..q_heads * d]);
                }
                let halves: Vec<f32> = gates.iter().map(|gate| gate / 2.0).collect();
                assert!(run(Some(&halves), 0..positions).iter().zip(&gated).all(|(half, whole)| *half * 2.0 == *whole));
            }
        }
    }
}

#[test]
fn queries_may_stand_among_other_columns() {
    let (q_heads, kv_heads, d, positions) = (2, 1, 8, 5);
    let wide = Random::new(4).vec(positions * 40, 1.0);
    let q: Vec<f32> = wide.chunks_exact(40).flat_map(|row| row[..16].to_vec()).collect();
    let (k, v) = (Random::new(5).vec(positions * d, 1.0), Random::new(6).vec(positions * d, 1.0));
    let kv = filled(&k, &v, &[9], kv_heads, d, KvDtype::F32);
    let (mut a, mut b) = (vec![0.0; q.len()], vec![0.0; q.len()]);
    let mut spans = Spans::default();
    spans.push(positions, 0, &[9]);
    let layer = Layer { kv: &kv, layer: 1, q_heads, past: Past::All, gates: None };
    attention(&Pool::new(1), &mut a, Mat::new(&q, positions, 16), None, layer, &mut spans);
    attention(&Pool::new(1), &mut b, Mat::new(&wide, positions, 40), None, layer, &mut spans);
    assert_eq!(a, b);
}

#[test]
fn what_another_sequence_left_in_a_block_is_never_seen() {
    let (d, positions) = (8, 3);
    let (k, v) = (Random::new(7).vec(positions * d, 1.0), Random::new(8).vec(positions * d, 1.0));
    for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
        let mut kv = KvBlocks::new(1, 1, 1, d, dtype).unwrap();
        for offset in 0..BLOCK {
            kv.store(0, 0, offset, &[f32::NAN; 8], &[f32::NAN; 8]);
        }
        for (offset, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
            kv.store(0, 0, offset, k, v);
        }
        let q = Random::new(9).vec(positions * d, 1.0);
        let mut out = vec![0.0; q.len()];
        let mut spans = Spans::default();
        spans.push(positions, 0, &[0]);
        let layer = Layer { kv: &kv, layer: 0, q_heads: 1, past: Past::All, gates: None };
        attention(&Pool::new(1), &mut out, Mat::new(&q, positions, d), None, layer, &mut spans);
        assert!(out.iter().all(|x| x.is_finite()), "{dtype:?}");
    }
}

/// Turned and stored in one pass, and queries turned on their way: the bits of turning them first.
#[test]
fn appended_rows_and_queries_are_turned_by_their_positions() {
    let (q_heads, kv_heads, d) = (4, 2, 16);
    let (q, k) = (q_heads * d, kv_heads * d);
    let width = q + 2 * k;
    let rope = RopeTable::new(10_000.0, d, 200);
    for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
        // Two sequences: 70 positions that come in steps of 33, 30 and 7, and 5 at once, with the blocks in no order.
        let mut kv = KvBlocks::new(2, 12, kv_heads, d, dtype).unwrap();
        let mut expected = KvBlocks::new(2, 12, kv_heads, d, dtype).unwrap();
        let sequences: [(&[u32], &[usize]); 2] = [(&[9, 2, 7], &[33, 30, 7]), (&[4], &[0, 5, 0])];
        let pool = Pool::new(2);
        let mut starts = [0, 0];
        for step in 0..3 {
            let mut spans = Spans::default();
            for ((blocks, steps), start) in sequences.iter().zip(&starts) {
                if steps[step] > 0 {
                    spans.push(steps[step], *start, blocks);
                }
            }
            let rows = Random::new(step as u64 + 20).vec(spans.rows() * width, 1.0);
            append(&pool, &mut kv, 1, Mat::new(&rows, spans.rows(), width), q, &rope, &mut spans);
            let mut turned = rows.clone();
            let mut row = 0;
            for ((blocks, steps), start) in sequences.iter().zip(&mut starts) {
                for position in *start..*start + steps[step] {
                    let own = &mut turned[row * width..][..width];
                    rope::rotate_row(&mut own[..q + k], &rope, position);
                    expected.store(1, blocks[position / BLOCK], position % BLOCK, &own[q..q + k], &own[q + k..]);
                    row += 1;
                }
                *start += steps[step];
            }
            assert_eq!(kv.memory.bytes(), expected.memory.bytes(), "{dtype:?}, step {step}");
            let (mut first, mut later) = (vec![0.0; spans.rows() * q], vec![0.0; spans.rows() * q]);
            let count = spans.rows();
            let layer = Layer { kv: &kv, layer: 1, q_heads, past: Past::Window(40), gates: None };
            attention(&pool, &mut first, Mat::new(&rows, count, width), Some(&rope), layer, &mut spans);
            attention(&pool, &mut later, Mat::new(&turned, count, width), None, layer, &mut spans);
            assert_eq!(first, later, "{dtype:?}, step {step}");
        }
    }
}
