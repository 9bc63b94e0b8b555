use super::*;
use crate::int8::scalar;
use crate::testing::Random;

/// Random weights as they are packed, and their values.
fn matrix(random: &mut Random, pool: &Pool, n: usize, k: usize, group: usize) -> (Matrix4, Vec<f32>) {
    let q: Vec<u8> = (0..n * k).map(|_| random.below(16) as u8).collect();
    let scales: Vec<bf16> = random.vec(n * k / group, 0.01).iter().map(|s| bf16::from_f32(s.abs() + 1e-4)).collect();
    let w = Matrix4::pack(pool, n, k, group, |row, bytes, own| {
        for (byte, pair) in bytes.iter_mut().zip(q[row * k..].chunks_exact(2)) {
            *byte = pair[0] | pair[1] << 4;
        }
        own.copy_from_slice(&scales[row * (k / group)..][..k / group]);
    });
    let values = q.iter().enumerate().map(|(i, &q)| (f32::from(q) - 8.0) * scales[i / group].to_f32()).collect();
    (w.unwrap(), values)
}

fn close(name: &str, got: &[f32], expected: &[f64]) {
    let scale = expected.iter().fold(0.0f64, |max, e| max.max(e.abs()));
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(*g) - e).abs() <= 4e-6 * scale, "{name}[{i}]: {g} for {e}");
    }
}

#[test]
fn groups_of_rows_meet_their_own_experts_and_never_each_other() {
    let mut random = Random::new(60);
    for (k, n, group, with_bias) in
        [(32, 32, 32, false), (128, 64, 32, true), (192, 96, 64, false), (256, 160, 128, true), (64, 32, 8, true)]
    {
        let (experts, pool) = (4, Pool::new(2));
        let (w, values) = matrix(&mut random, &pool, experts * n, k, group);
        let bias = random.vec(experts * n, 1.0);
        let w = if with_bias { w.with_bias(&bias) } else { w };
        // Expert 1 has no rows; the others have as many as use every height of tile.
        for sizes in [[1, 0, 2, 3], [5, 0, 7, 13], [40, 0, 25, 12]] {
            let m: usize = sizes.iter().sum();
            let x = random.vec(m * k, 2.0);
            let mut rows = Rows8::new();
            rows.quantise(&pool, &x, k);
            rows.sum_groups(group);
            let (mut groups, mut start) = (Groups::default(), 0);
            for (expert, size) in sizes.into_iter().enumerate() {
                groups.push(start..start + size, expert * n);
                start += size;
            }
            let quantised = scalar::quantised(&x, k);
            let mut expected = Vec::new();
            let mut start = 0;
            for (expert, size) in sizes.into_iter().enumerate() {
                let bias = with_bias.then(|| &bias[expert * n..][..n]);
                expected.extend(scalar::linear(&quantised[start * k..][..size * k], &values[expert * n * k..][..n * k], bias, n, k));
                start += size;
            }
            let mut y = vec![0.0; m * n];
            grouped(&pool, &mut y, &rows, &w, n, &groups, Into::Set);
            close("set", &y, &expected);
            let mut inner = vec![0.0; m * n / 2];
            grouped(&pool, &mut inner, &rows, &w, n, &groups, Into::SwiGlu);
            let swiglu: Vec<f64> = (0..m * n / 2)
                .map(|place| {
                    let (token, col) = (place / (n / 2), place % (n / 2));
                    let at = |part: usize| expected[token * n + (col / PANEL * 2 + part) * PANEL + col % PANEL];
                    at(0) / (1.0 + (-at(0)).exp()) * at(1)
                })
                .collect();
            close("swiglu", &inner, &swiglu);
            // Each row alone, on one thread.
            let mut start = 0;
            for (expert, size) in sizes.into_iter().enumerate() {
                for token in start..start + size {
                    let mut row = Rows8::new();
                    row.quantise(&pool, &x[token * k..][..k], k);
                    row.sum_groups(group);
                    let mut alone = vec![0.0; n];
                    let mut groups = Groups::default();
                    groups.push(0..1, expert * n);
                    grouped(&Pool::new(1), &mut alone, &row, &w, n, &groups, Into::Set);
                    assert_eq!(alone, y[token * n..][..n], "{sizes:?}, token {token}");
                }
                start += size;
            }
        }
    }
}
