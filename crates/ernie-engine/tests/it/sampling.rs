//! The sampler against naive formulas and against the distribution it says it draws from.
use ernie_engine::{Error, Sampler, SamplingParams};

/// Reproducible values in [-scale, scale).
fn logits(len: usize, scale: f32, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
        })
        .collect()
}

/// The documented order, step by step on whole vectors in f64.
fn naive(params: &SamplingParams, prompt: &[u32], output: &[u32], logits: &[f32]) -> Vec<f64> {
    let mut x: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
    for (id, x) in x.iter_mut().enumerate() {
        let count = output.iter().filter(|&&o| o as usize == id).count() as f64;
        if count > 0.0 || prompt.contains(&(id as u32)) {
            let r = f64::from(params.repetition_penalty);
            *x = if *x > 0.0 { *x / r } else { *x * r };
        }
        *x -= count * f64::from(params.frequency_penalty);
        if count > 0.0 {
            *x -= f64::from(params.presence_penalty);
        }
        for (_, bias) in params.logit_bias.iter().filter(|(biased, _)| *biased as usize == id) {
            *x += f64::from(*bias);
        }
        *x = f64::from(*x as f32) / f64::from(params.temperature);
    }
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[b].partial_cmp(&x[a]).unwrap().then(a.cmp(&b)));
    let mut p: Vec<f64> = x.iter().map(|v| (v - x[order[0]]).exp()).collect();
    let normalise = |p: &mut Vec<f64>| {
        let sum: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
    };
    if params.top_k > 0 {
        order.iter().skip(params.top_k).for_each(|&id| p[id] = 0.0);
    }
    normalise(&mut p);
    if params.top_p < 1.0 {
        let mut sum = 0.0;
        for &id in &order {
            if sum >= f64::from(params.top_p) {
                p[id] = 0.0;
            } else {
                sum += p[id];
            }
        }
        normalise(&mut p);
    }
    let floor = p[order[0]] * f64::from(params.min_p);
    p.iter_mut().for_each(|p| *p = if *p < floor { 0.0 } else { *p });
    normalise(&mut p);
    p
}

fn variants() -> Vec<SamplingParams> {
    let base = SamplingParams::default();
    vec![
        base.clone(),
        SamplingParams { temperature: 0.3, ..base.clone() },
        SamplingParams { temperature: 2.5, top_k: 7, ..base.clone() },
        SamplingParams { top_k: 1000, ..base.clone() },
        SamplingParams { top_p: 0.8, ..base.clone() },
        SamplingParams { top_p: 1e-9, ..base.clone() },
        SamplingParams { min_p: 0.1, temperature: 0.7, ..base.clone() },
        SamplingParams { top_k: 9, top_p: 0.9, min_p: 0.05, temperature: 1.3, ..base.clone() },
        SamplingParams { repetition_penalty: 1.4, ..base.clone() },
        SamplingParams { repetition_penalty: 0.6, presence_penalty: 0.8, ..base.clone() },
        SamplingParams { frequency_penalty: 0.5, top_p: 0.95, ..base.clone() },
        SamplingParams { frequency_penalty: -0.5, presence_penalty: -1.0, top_k: 12, ..base.clone() },
        SamplingParams { logit_bias: vec![(3, 2.5), (0, -20.0), (3, 0.5)], ..base.clone() },
        SamplingParams { logit_bias: vec![(17, -1.0)], repetition_penalty: 1.3, top_p: 0.9, ..base },
    ]
}

#[test]
fn distributions_equal_the_naive_formula() {
    let prompt = [3, 3, 4, 17];
    for params in variants() {
        let mut sampler = Sampler::new(&params).unwrap();
        sampler.observe_prompt(&prompt);
        let mut output = Vec::new();
        for step in 0..12 {
            let logits = logits(40, 3.0, step);
            let mut got = vec![0.0; logits.len()];
            for (id, p) in sampler.distribution(&logits).unwrap() {
                got[id as usize] = p;
            }
            let expected = naive(&params, &prompt, &output, &logits);
            for id in 0..logits.len() {
                assert!((got[id] - expected[id]).abs() < 1e-6, "{params:?}, step {step}, token {id}: {} for {}", got[id], expected[id]);
                assert_eq!(got[id] == 0.0, expected[id] == 0.0, "{params:?}, step {step}, token {id} kept or not");
            }
            output.push(sampler.sample(&logits).unwrap());
        }
    }
}

#[test]
fn draws_follow_the_distribution() {
    let logits = logits(30, 2.5, 5);
    for (seed, params) in variants().into_iter().take(8).enumerate() {
        let params = SamplingParams { seed: seed as u64, ..params };
        let mut sampler = Sampler::new(&params).unwrap();
        let expected = sampler.distribution(&logits).unwrap();
        let (n, mut counts) = (20_000, vec![0u32; logits.len()]);
        for _ in 0..n {
            counts[sampler.sample(&logits).unwrap() as usize] += 1;
        }
        // Rare tokens are pooled so that each cell expects at least ten draws.
        let (mut chi_square, mut cells) = (0.0, 0);
        let (mut rare_expected, mut rare_got) = (0.0, 0.0);
        for (id, p) in expected {
            let (e, got) = (p * f64::from(n), f64::from(std::mem::take(&mut counts[id as usize])));
            if e < 10.0 {
                rare_expected += e;
                rare_got += got;
            } else {
                chi_square += (got - e).powi(2) / e;
                cells += 1;
            }
        }
        if rare_expected >= 10.0 {
            chi_square += (rare_got - rare_expected).powi(2) / rare_expected;
            cells += 1;
        }
        assert_eq!(counts.iter().sum::<u32>(), 0, "{params:?}: drew a token that was ruled out");
        // Mean cells − 1, standard deviation √(2(cells − 1)): five of them above.
        let degrees = f64::from(cells - 1);
        assert!(chi_square < degrees + 5.0 * (2.0 * degrees).sqrt() + 1e-9, "{params:?}: chi-square {chi_square}, {cells} cells");
    }
}

#[test]
fn the_same_seed_gives_the_same_tokens() {
    let draw = |seed| {
        let mut sampler = Sampler::new(&SamplingParams { seed, ..SamplingParams::default() }).unwrap();
        (0..50).map(|step| sampler.sample(&logits(100, 1.0, step)).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[test]
fn greedy_takes_the_largest_and_of_equal_ones_the_first() {
    let mut sampler = Sampler::new(&SamplingParams::greedy()).unwrap();
    assert_eq!(sampler.sample(&[1.0, 3.0, 2.0, 3.0]).unwrap(), 1);
    assert_eq!(sampler.sample(&[-0.0, 0.0]).unwrap(), 0);
    assert_eq!(sampler.sample(&[f32::NEG_INFINITY, -5.0]).unwrap(), 1);
    let mut sampler = Sampler::new(&SamplingParams { top_k: 2, ..SamplingParams::default() }).unwrap();
    for _ in 0..50 {
        assert!(sampler.sample(&[0.0, 1.0, 1.0, 1.0]).unwrap() < 3, "of three equal tokens the first two are kept");
    }
}

#[test]
fn penalties_change_what_greedy_takes() {
    let params = SamplingParams { frequency_penalty: 0.4, ..SamplingParams::greedy() };
    let mut sampler = Sampler::new(&params).unwrap();
    let taken: Vec<u32> = (0..6).map(|_| sampler.sample(&[1.0, 0.9, 0.0]).unwrap()).collect();
    // 1 − 0.4·n₀ against 0.9 − 0.4·n₁.
    assert_eq!(taken, [0, 1, 0, 1, 0, 1]);
    let mut sampler = Sampler::new(&SamplingParams { repetition_penalty: 2.0, ..SamplingParams::greedy() }).unwrap();
    sampler.observe_prompt(&[0]);
    assert_eq!(sampler.sample(&[1.0, 0.6]).unwrap(), 1, "a token of the prompt counts as repeated");
    let mut sampler = Sampler::new(&SamplingParams { presence_penalty: 1.0, ..SamplingParams::greedy() }).unwrap();
    sampler.observe_prompt(&[0]);
    assert_eq!(sampler.sample(&[1.0, 0.6]).unwrap(), 0, "presence counts the output only");
    let biased = |bias: f32| SamplingParams { logit_bias: vec![(1, bias), (99, 5.0)], ..SamplingParams::greedy() };
    for (bias, taken) in [(0.3, 0), (0.5, 1), (-100.0, 0), (100.0, 1)] {
        assert_eq!(Sampler::new(&biased(bias)).unwrap().sample(&[1.0, 0.6]).unwrap(), taken, "bias {bias}");
    }
    let forbidden = Sampler::new(&biased(100.0)).unwrap().sample(&[1.0, f32::NEG_INFINITY]).unwrap();
    assert_eq!(forbidden, 0, "a bias brings nothing back that is ruled out");
    let extreme = SamplingParams { repetition_penalty: f32::MIN_POSITIVE, frequency_penalty: f32::MAX, ..SamplingParams::default() };
    let mut sampler = Sampler::new(&extreme).unwrap();
    for _ in 0..5 {
        sampler.sample(&[1.0, -1.0, f32::MAX, f32::MIN]).unwrap();
    }
}

#[test]
fn logits_that_are_no_numbers_are_an_error() {
    for params in [SamplingParams::greedy(), SamplingParams::default(), SamplingParams { top_p: 0.5, ..SamplingParams::default() }] {
        let mut sampler = Sampler::new(&params).unwrap();
        assert!(matches!(sampler.sample(&[0.0, f32::NAN]), Err(Error::BadLogit { id: 1, .. })));
        assert!(matches!(sampler.sample(&[f32::INFINITY, 0.0]), Err(Error::BadLogit { id: 0, .. })));
        assert!(matches!(sampler.sample(&[f32::NEG_INFINITY; 2]), Err(Error::BadLogit { .. })));
        assert!(matches!(sampler.sample(&[]), Err(Error::BadLogit { .. })));
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY, 0.0]).unwrap(), 1, "−∞ rules a token out");
    }
}

#[test]
fn a_tiny_temperature_is_greedy_and_overflows_nowhere() {
    let mut sampler = Sampler::new(&SamplingParams { temperature: 1e-38, ..SamplingParams::default() }).unwrap();
    for step in 0..20 {
        let logits = logits(50, 1e30, step);
        let largest = (0..50).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        assert_eq!(sampler.sample(&logits).unwrap() as usize, largest);
    }
}

#[test]
fn parameters_out_of_range_are_named() {
    let base = SamplingParams::default();
    let cases = [
        ("temperature", SamplingParams { temperature: -0.1, ..base.clone() }),
        ("temperature", SamplingParams { temperature: f32::NAN, ..base.clone() }),
        ("temperature", SamplingParams { temperature: f32::INFINITY, ..base.clone() }),
        ("top_p", SamplingParams { top_p: 0.0, ..base.clone() }),
        ("top_p", SamplingParams { top_p: 1.01, ..base.clone() }),
        ("top_p", SamplingParams { top_p: f32::NAN, ..base.clone() }),
        ("min_p", SamplingParams { min_p: -0.1, ..base.clone() }),
        ("min_p", SamplingParams { min_p: 1.1, ..base.clone() }),
        ("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..base.clone() }),
        ("presence_penalty", SamplingParams { presence_penalty: f32::NAN, ..base.clone() }),
        ("frequency_penalty", SamplingParams { frequency_penalty: f32::INFINITY, ..base.clone() }),
        ("logit_bias", SamplingParams { logit_bias: vec![(0, 1.0), (1, f32::NAN)], ..base.clone() }),
        ("stop", SamplingParams { stop: vec![String::new()], ..base.clone() }),
        ("max_tokens", SamplingParams { max_tokens: 0, ..base }),
    ];
    for (name, params) in cases {
        match Sampler::new(&params) {
            Err(Error::Parameter { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    let message = Sampler::new(&SamplingParams { top_p: 1.5, ..SamplingParams::default() }).unwrap_err().to_string();
    assert_eq!(message, "parameter `top_p`: expected a number in (0, 1], got 1.5");
}
