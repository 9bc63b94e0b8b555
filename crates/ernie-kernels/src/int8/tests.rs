use super::*;
use crate::testing::Random;

fn matrix(random: &mut Random, pool: &Pool, n: usize, k: usize) -> (Matrix8, Vec<f32>) {
    let q: Vec<i8> = (0..n * k).map(|_| random.below(255) as u8 as i8).map(|q| q.max(-127)).collect();
    let scales: Vec<f32> = random.vec(n, 0.01).iter().map(|s| s.abs() + 1e-4).collect();
    let w = Matrix8::pack(pool, n, k, |row, out| {
        out.copy_from_slice(&q[row * k..][..k]);
        scales[row]
    });
    let values = q.iter().enumerate().map(|(i, &q)| f32::from(q) * scales[i / k]).collect();
    (w.unwrap(), values)
}

fn close(name: &str, got: &[f32], expected: &[f64]) {
    let scale = expected.iter().fold(0.0f64, |max, e| max.max(e.abs()));
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(*g) - e).abs() <= 2e-6 * scale, "{name}[{i}]: {g} for {e}");
    }
}

#[test]
fn linear_equals_its_twin_and_never_depends_on_the_batch_or_the_threads() {
    let mut random = Random::new(50);
    for (m, n, k) in [(1, 16, 4), (1, 300, 130), (3, 17, 33), (5, 64, 64), (8, 50, 100), (13, 130, 257), (40, 48, 72), (200, 33, 20)] {
        let pool = Pool::new(2);
        let (w, values) = matrix(&mut random, &pool, n, k);
        let (x, bias, start) = (random.vec(m * k, 3.0), random.vec(n, 1.0), random.vec(m * n, 1.0));
        let mut rows = Rows8::new();
        rows.quantise(&pool, &x, k);
        let quantised = scalar::quantised(&x, k);
        for row in 0..m {
            assert_eq!(rows.dequantised(row), quantised[row * k..][..k]);
        }
        for with_bias in [false, true] {
            let (w, _) =
                if with_bias { (w_with(&w, &bias, &pool, &values, n, k), ()) } else { (w_with(&w, &[], &pool, &values, n, k), ()) };
            let mut y = vec![0.0; m * n];
            linear(&pool, &mut y, &rows, &w, Into::Set);
            let expected = scalar::linear(&quantised, &values, with_bias.then_some(&bias[..]), n, k);
            close("set", &y, &expected);
            let mut sum = start.clone();
            linear(&pool, &mut sum, &rows, &w, Into::Add);
            close("add", &sum, &expected.iter().zip(&start).map(|(e, s)| e + f64::from(*s)).collect::<Vec<_>>());
            let mut alone = vec![0.0; n];
            for token in 0..m {
                let mut row = Rows8::new();
                row.quantise(&pool, &x[token * k..][..k], k);
                linear(&Pool::new(1), &mut alone, &row, &w, Into::Set);
                assert_eq!(alone, y[token * n..][..n], "[{m}, {n}, {k}] token {token}");
            }
        }
    }
}

/// The same weights again, with a bias unless it is empty.
fn w_with(w: &Matrix8, bias: &[f32], pool: &Pool, values: &[f32], n: usize, k: usize) -> Matrix8 {
    let copy = Matrix8::pack(pool, n, k, |row, out| {
        let scale = w.scales[row];
        out.iter_mut().zip(&values[row * k..]).for_each(|(q, value)| *q = (value / scale).round() as i8);
        scale
    });
    let copy = copy.unwrap();
    if bias.is_empty() { copy } else { copy.with_bias(bias) }
}

#[test]
fn gate_and_up_become_swiglu() {
    let mut random = Random::new(51);
    let pool = Pool::new(2);
    for (m, i, k) in [(1, 16, 8), (2, 48, 40), (5, 80, 64), (9, 16, 30), (30, 144, 36)] {
        // Rows of gate and up alternate by panels.
        let (w, values) = matrix(&mut random, &pool, 2 * i, k);
        let x = random.vec(m * k, 1.0);
        let mut rows = Rows8::new();
        rows.quantise(&pool, &x, k);
        let mut y = vec![0.0; m * i];
        linear(&pool, &mut y, &rows, &w, Into::SwiGlu);
        let both = scalar::linear(&scalar::quantised(&x, k), &values, None, 2 * i, k);
        let expected: Vec<f64> = (0..m * i)
            .map(|place| {
                let (token, col) = (place / i, place % i);
                let row = |part: usize| token * 2 * i + (col / PANEL * 2 + part) * PANEL + col % PANEL;
                let (gate, up) = (both[row(0)], both[row(1)]);
                gate / (1.0 + (-gate).exp()) * up
            })
            .collect();
        close("swiglu", &y, &expected);
    }
}

#[test]
fn groups_take_their_own_part_of_the_matrix() {
    let mut random = Random::new(52);
    let pool = Pool::new(2);
    let (parts, n, k) = (4, 40usize, 24);
    let stride = n.next_multiple_of(PANEL);
    let (w, values) = matrix(&mut random, &pool, parts * stride, k);
    let x = random.vec(30 * k, 1.0);
    let (mut all, mut rows) = (Rows8::new(), Rows8::new());
    all.quantise(&pool, &x, k);
    let order: Vec<u32> = (0..30).map(|i| i * 7 % 30).collect();
    rows.gather(&all, &order);
    let mut groups = Groups::default();
    for (group, part) in [(0..1, 2), (1..14, 0), (14..14, 1), (15..30, 3)] {
        groups.push(group, part * stride);
    }
    let mut y = vec![7.0; 30 * n];
    grouped(&pool, &mut y, &rows, &w, n, &groups, Into::Set);
    let quantised = scalar::quantised(&x, k);
    for (place, &row) in order.iter().enumerate() {
        let Some(group) = groups.rows.iter().position(|rows| rows.contains(&place)) else {
            assert!(y[place * n..][..n].iter().all(|&y| y == 7.0), "a row of no group is left alone");
            continue;
        };
        let expected = scalar::linear(&quantised[row as usize * k..][..k], &values[groups.firsts[group] * k..], None, n, k);
        close("group", &y[place * n..][..n], &expected);
    }
}

#[test]
fn rows_come_back_and_what_is_no_number_shows() {
    let mut random = Random::new(53);
    let pool = Pool::new(1);
    let (w, values) = matrix(&mut random, &pool, 35, 22);
    let mut row = vec![0.0; 22];
    for index in 0..35 {
        w.copy_row(index, &mut row);
        assert_eq!(row, values[index * 22..][..22]);
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = random.vec(2 * 22, 1.0);
        x[25] = bad;
        let mut rows = Rows8::new();
        rows.quantise(&pool, &x, 22);
        let mut y = vec![0.0; 2 * 35];
        linear(&pool, &mut y, &rows, &w, Into::Set);
        assert!(y[..35].iter().all(|y| y.is_finite()) && y[35..].iter().all(|y| y.is_nan()));
    }
    assert_eq!(quantise_row(&mut [1; 3], &[0.0; 3]), (0.0, 0));
    let (scale, _) = quantise_row(&mut [1; 3], &[1e-40, 0.0, -1e-41]);
    assert!(scale.is_finite(), "subnormal values");
}

#[test]
fn a_norm_comes_before_the_bytes() {
    let mut random = Random::new(54);
    let pool = Pool::new(2);
    let (x, w) = (random.vec(20 * 50, 2.0), random.vec(50, 1.0));
    let (mut rows, mut normalised) = (Rows8::new(), vec![0.0; x.len()]);
    norm(&pool, &mut normalised, &x, &w, 1e-5);
    rows.quantise(&pool, &normalised, 50);
    for (x, y) in x.chunks_exact(50).zip(normalised.chunks_exact(50)) {
        let mean = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() / 50.0;
        for ((x, y), w) in x.iter().zip(y).zip(&w) {
            assert!((f64::from(*y) - f64::from(*x) * f64::from(*w) / (mean + 1e-5).sqrt()).abs() < 1e-5);
        }
    }
    // In one pass, with the values and without.
    for with_values in [true, false] {
        let (mut at_once, mut values) = (Rows8::new(), vec![0.0; if with_values { x.len() } else { 0 }]);
        at_once.quantise_norm(&pool, &mut values, &x, &w, 1e-5);
        assert!(values.is_empty() || values == normalised);
        for row in 0..20 {
            assert_eq!((at_once.dequantised(row), at_once.of[row].excess), (rows.dequantised(row), rows.of[row].excess));
        }
    }
    let quantised = scalar::quantised(&normalised, 50);
    for row in 0..20 {
        assert_eq!(rows.dequantised(row), quantised[row * 50..][..50]);
    }
}
