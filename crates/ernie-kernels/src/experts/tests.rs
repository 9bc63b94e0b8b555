use super::*;
use crate::testing::{Random, assert_close, assert_gradient, narrow, weighted_sum, wide};

struct Case {
    shape: Shape,
    x: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    biases: Option<[Vec<f32>; 3]>,
    indices: Vec<u32>,
    routing: Vec<f32>,
    dy: Vec<f32>,
}

impl Case {
    fn new(shape: Shape, with_biases: bool) -> Self {
        let Shape { tokens, hidden, intermediate, experts, top_k } = shape;
        let mut random = Random::new(17);
        let matrix = experts * hidden * intermediate;
        let mut biases =
            || [random.vec(experts * intermediate, 1.0), random.vec(experts * intermediate, 1.0), random.vec(experts * hidden, 1.0)];
        let biases = with_biases.then(&mut biases);
        // Each token's experts are distinct; the last expert gets nothing where there are enough others.
        let used = if experts > top_k { experts - 1 } else { experts };
        let indices = (0..tokens).flat_map(|_| {
            let first = random.below(used);
            (0..top_k).map(move |slot| ((first + slot) % used) as u32)
        });
        let indices = indices.collect();
        Case {
            shape,
            x: random.vec(tokens * hidden, 1.0),
            gate: random.vec(matrix, 1.0),
            up: random.vec(matrix, 1.0),
            down: random.vec(matrix, 1.0),
            biases,
            indices,
            routing: random.vec(tokens * top_k, 1.0),
            dy: random.vec(tokens * hidden, 1.0),
        }
    }

    fn weights(&self) -> Weights<'_> {
        let bias = |which: usize| self.biases.as_ref().map(|biases| &biases[which][..]);
        Weights {
            gate: &self.gate,
            up: &self.up,
            down: &self.down,
            gate_bias: bias(0),
            up_bias: bias(1),
            down_bias: bias(2),
            precision: Precision::F32,
        }
    }

    fn scalar_weights(&self) -> scalar::Weights {
        let Shape { hidden, intermediate, experts, .. } = self.shape;
        let widths = [intermediate, intermediate, hidden];
        let bias = |which: usize| self.biases.as_ref().map_or(vec![0.0; experts * widths[which]], |biases| wide(&biases[which]));
        scalar::Weights {
            gate: wide(&self.gate),
            up: wide(&self.up),
            down: wide(&self.down),
            gate_bias: bias(0),
            up_bias: bias(1),
            down_bias: bias(2),
        }
    }

    /// y on a residual of dy; dx, drouting, dgate, dup, ddown and, where there are biases, theirs.
    fn run(&self) -> Vec<Vec<f32>> {
        let unset = |x: &Vec<f32>| vec![f32::NAN; x.len()];
        let (mut y, mut dx, mut drouting) = (self.dy.clone(), unset(&self.x), unset(&self.routing));
        let (mut dgate, mut dup, mut ddown) = (unset(&self.gate), unset(&self.up), unset(&self.down));
        let mut dbiases: Vec<Vec<f32>> = self.biases.iter().flatten().map(unset).collect();
        let saved = forward(&mut y, &self.x, &self.weights(), &self.indices, &self.routing, self.shape);
        let mut of_biases = dbiases.iter_mut().map(|bias| &mut bias[..]);
        let gradients = Gradients {
            x: &mut dx,
            gate: &mut dgate,
            up: &mut dup,
            down: &mut ddown,
            routing: &mut drouting,
            gate_bias: of_biases.next(),
            up_bias: of_biases.next(),
            down_bias: of_biases.next(),
        };
        backward(&saved, gradients, &self.x, &self.weights(), &self.routing, &self.dy);
        [vec![y, dx, drouting, dgate, dup, ddown], dbiases].concat()
    }
}

const NAMES: [&str; 9] = ["y", "dx", "drouting", "dgate", "dup", "ddown", "dgate_bias", "dup_bias", "ddown_bias"];

fn shape(tokens: usize, hidden: usize, intermediate: usize, experts: usize, top_k: usize) -> Shape {
    Shape { tokens, hidden, intermediate, experts, top_k }
}

#[test]
fn equals_the_plain_loops() {
    let shapes = [shape(1, 1, 1, 1, 1), shape(1, 6, 5, 4, 2), shape(9, 7, 3, 2, 2), shape(65, 20, 33, 8, 6), shape(600, 16, 24, 3, 1)];
    for (shape, with_biases) in shapes.into_iter().flat_map(|shape| [(shape, false), (shape, true)]) {
        let case = Case::new(shape, with_biases);
        let (weights, x, routing) = (case.scalar_weights(), wide(&case.x), wide(&case.routing));
        let y =
            scalar::forward(&x, &weights, &case.indices, &routing, shape).iter().zip(&case.dy).map(|(y, r)| y + f64::from(*r)).collect();
        let d = scalar::backward(&x, &weights, &case.indices, &routing, &wide(&case.dy), shape);
        let w = d.weights;
        let expected = [y, d.x, d.routing, w.gate, w.up, w.down, w.gate_bias, w.up_bias, w.down_bias];
        let got = case.run();
        assert_eq!(got.len(), if with_biases { 9 } else { 6 });
        for ((name, got), expected) in NAMES.iter().zip(&got).zip(&expected) {
            assert_close(name, got, &narrow(expected), 1e-5);
        }
    }
}

#[test]
fn gradients_equal_differences() {
    let case = Case::new(shape(3, 4, 3, 3, 2), true);
    let d = case.run();
    let (weights, x, routing) = (case.scalar_weights(), wide(&case.x), wide(&case.routing));
    let loss = |x: &[f64], weights: &scalar::Weights, routing: &[f64]| {
        weighted_sum(&scalar::forward(x, weights, &case.indices, routing, case.shape), &case.dy)
    };
    assert_gradient("dx", &d[1], &case.x, |x| loss(x, &weights, &routing));
    assert_gradient("drouting", &d[2], &case.routing, |routing| loss(&x, &weights, routing));
    let with = |change: &dyn Fn(&mut scalar::Weights)| {
        let mut changed = weights.clone();
        change(&mut changed);
        loss(&x, &changed, &routing)
    };
    let biases = case.biases.as_ref().expect("this case has biases");
    assert_gradient("dgate", &d[3], &case.gate, |w| with(&|weights| weights.gate = w.to_vec()));
    assert_gradient("dup", &d[4], &case.up, |w| with(&|weights| weights.up = w.to_vec()));
    assert_gradient("ddown", &d[5], &case.down, |w| with(&|weights| weights.down = w.to_vec()));
    assert_gradient("dgate_bias", &d[6], &biases[0], |b| with(&|weights| weights.gate_bias = b.to_vec()));
    assert_gradient("dup_bias", &d[7], &biases[1], |b| with(&|weights| weights.up_bias = b.to_vec()));
    assert_gradient("ddown_bias", &d[8], &biases[2], |b| with(&|weights| weights.down_bias = b.to_vec()));
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let case = Case::new(shape(700, 24, 40, 5, 2), true);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        pool.install(|| case.run())
    };
    assert_eq!(on(1), on(4));
}
