//! The routed layers: each token goes through a few experts, and through the shared ones.
//!
//! Dimensions as in [`crate::model`]; `n` counts choices (tokens × experts per token), ordered by expert so that each expert takes all its tokens
//! at once and its weights are read once, and only if somebody chose it.
use ernie_kernels::arch::pool::Pool;
use ernie_kernels::float::{self, WeightsRef};
use ernie_kernels::int4::{self, Matrix4};
use ernie_kernels::int8::{self, Into, Matrix8, Rows8};
use ernie_kernels::router;

use crate::error::Result;
use crate::model::SwiGlu;
use crate::profile::{Part, Profile};
use crate::runner::MoeWorkspace;
use crate::weights::{GateUp, Input, Linear, Loader, Needs};

/// Rows that one task of a loop over tokens takes.
const ROWS_PER_TASK: usize = 16;

/// Routed experts and shared ones.
#[derive(Debug)]
pub(crate) struct Moe {
    gate_eh: Vec<f32>,
    /// Added to the probabilities to select experts, and to nothing else.
    correction_bias_e: Option<Vec<f32>>,
    experts_e: usize,
    top_k: usize,
    norm_min: f32,
    experts: Experts,
    /// All shared experts as one, for every token; none in the 300B model.
    pub shared: Option<SwiGlu>,
}

#[derive(Debug)]
enum Experts {
    Float(Vec<(GateUp, Linear)>),
    /// All of them in two matrices, one expert's rows after the other's.
    Int8 {
        gate_up: Matrix8,
        down: Matrix8,
    },
    /// The same of 4 bits.
    Int4 {
        gate_up: Matrix4,
        down: Matrix4,
    },
}

impl Moe {
    pub fn load(load: &Loader<'_>, config: &ernie_checkpoint::Config, prefix: &str) -> Result<Self> {
        let moe = config.moe.as_ref().expect("a layer is MoE only by `config.moe`");
        let (h, i, e) = (config.hidden_size, moe.intermediate_size, moe.num_experts);
        let bias_name = format!("{prefix}.moe_statics.e_score_correction_bias");
        let experts = format!("{prefix}.experts");
        // Code that writes such models disagrees whether routed experts have biases where the other projections do, so the files decide.
        let bias = load.checkpoint.contains(&format!("{experts}.0.gate_proj.bias"));
        let shared = || SwiGlu::load(load, &format!("{prefix}.shared_experts"), h, i * moe.num_shared_experts, config.use_bias);
        let float = |index| {
            let name = format!("{experts}.{index}");
            Ok((load.gate_up(&name, i, h, bias)?, load.down(&name, h, i, bias)?))
        };
        Ok(Moe {
            gate_eh: load.f32(&format!("{prefix}.gate.weight"), &[e, h])?,
            // Present in every released checkpoint, and used whenever it is there, as the released code does: a config may be wrong about it.
            correction_bias_e: load.checkpoint.contains(&bias_name).then(|| load.f32(&bias_name, &[1, e])).transpose()?,
            experts_e: e,
            top_k: moe.top_k,
            norm_min: moe.norm_min as f32,
            experts: if let Some((gate_up, down)) = load.experts4(&experts, e, i, h, bias)? {
                Experts::Int4 { gate_up, down }
            } else if let Some((gate_up, down)) = load.experts8(&experts, e, i, h, bias)? {
                Experts::Int8 { gate_up, down }
            } else {
                Experts::Float((0..e).map(float).collect::<Result<_>>()?)
            },
            shared: (moe.num_shared_experts > 0).then(shared).transpose()?,
        })
    }

    /// Bytes of the routed experts.
    pub fn expert_bytes(&self) -> usize {
        match &self.experts {
            Experts::Float(experts) => experts.iter().map(|(gate_up, down)| gate_up.bytes() + down.bytes()).sum(),
            Experts::Int8 { gate_up, down } => gate_up.bytes() + down.bytes(),
            Experts::Int4 { gate_up, down } => gate_up.bytes() + down.bytes(),
        }
    }

    /// What it reads of its input: the router always the values.
    pub fn needs(&self) -> Needs {
        let bytes = !matches!(self.experts, Experts::Float(_)) || self.shared.as_ref().is_some_and(SwiGlu::is_int8);
        if bytes { Needs::Both } else { Needs::Values }
    }

    /// p = softmax(W_g x); S = the s experts of largest p + bias; w = p\[S\] / max(Σ p\[S\], norm_min). Then every choice finds its place.
    fn route(&self, pool: &Pool, x_th: &[f32], h: usize, work: &mut MoeWorkspace) {
        let (e, s, t) = (self.experts_e, self.top_k, x_th.len() / h);
        work.p_te.resize(t * e, 0.0);
        float::linear(pool, &mut work.p_te, x_th, WeightsRef::F32(&self.gate_eh), None, t, e, h, false);
        work.p_te.chunks_exact_mut(e).for_each(softmax);
        router::select_into(&mut work.selected_ts, &mut work.scores, &work.p_te, self.correction_bias_e.as_deref(), e, s);
        work.w_ts.clear();
        for (selected_s, p_e) in work.selected_ts.chunks_exact(s).zip(work.p_te.chunks_exact(e)) {
            let sum: f32 = selected_s.iter().map(|&expert| p_e[expert as usize]).sum();
            work.w_ts.extend(selected_s.iter().map(|&expert| p_e[expert as usize] / sum.max(self.norm_min)));
        }
        // Counting sort of the choices by expert.
        work.starts_e.clear();
        work.starts_e.resize(e + 1, 0);
        for &expert in &work.selected_ts {
            work.starts_e[expert as usize + 1] += 1;
        }
        for expert in 0..e {
            work.starts_e[expert + 1] += work.starts_e[expert];
        }
        work.place_ts.resize(t * s, 0);
        work.token_n.resize(t * s, 0);
        work.next_e.clear();
        work.next_e.extend_from_slice(&work.starts_e[..e]);
        for (choice, &expert) in work.selected_ts.iter().enumerate() {
            let place = work.next_e[expert as usize];
            work.next_e[expert as usize] += 1;
            work.place_ts[choice] = place as u32;
            work.token_n[place] = (choice / s) as u32;
        }
    }

    /// x += Σ_s w_s · expert_s(input), the sum in the order of selection whatever else is in the batch. `input` is the normed x, `[t, h]`.
    pub fn forward(&self, pool: &Pool, x_th: &mut [f32], input: Input<'_>, work: &mut MoeWorkspace, profile: &mut Profile) {
        let (s, h) = (self.top_k, self.gate_eh.len() / self.experts_e);
        let n = x_th.len() / h * s;
        self.route(pool, input.values, h, work);
        work.y_nh.resize(n * h, 0.0);
        match &self.experts {
            Experts::Int8 { gate_up, down } => {
                let up = group_rows(self.experts_e, gate_up.n(), down.n(), input.rows, work);
                profile.lap(Part::Router);
                int8::grouped(pool, &mut work.inner_ni, &work.rows, gate_up, up, &work.groups_up, Into::SwiGlu);
                profile.lap(Part::ExpertsUp);
                work.rows.quantise(pool, &work.inner_ni, up / 2);
                int8::grouped(pool, &mut work.y_nh, &work.rows, down, h, &work.groups_down, Into::Set);
            }
            Experts::Int4 { gate_up, down } => {
                let up = group_rows(self.experts_e, gate_up.n(), down.n(), input.rows, work);
                work.rows.sum_groups(gate_up.group());
                profile.lap(Part::Router);
                int4::grouped(pool, &mut work.inner_ni, &work.rows, gate_up, up, &work.groups_up, Into::SwiGlu);
                profile.lap(Part::ExpertsUp);
                work.rows.quantise(pool, &work.inner_ni, up / 2);
                work.rows.sum_groups(down.group());
                int4::grouped(pool, &mut work.y_nh, &work.rows, down, h, &work.groups_down, Into::Set);
            }
            Experts::Float(experts) => {
                work.x_nh.resize(n * h, 0.0);
                for (x_h, &token) in work.x_nh.chunks_exact_mut(h).zip(&work.token_n) {
                    x_h.copy_from_slice(&input.values[token as usize * h..][..h]);
                }
                profile.lap(Part::Router);
                for ((gate_up, down), bounds) in experts.iter().zip(work.starts_e.windows(2)) {
                    if bounds[0] == bounds[1] {
                        continue;
                    }
                    let rows = bounds[0] * h..bounds[1] * h;
                    let mut inner = std::mem::take(&mut work.inner_ni);
                    inner.resize((bounds[1] - bounds[0]) * gate_up.i, 0.0);
                    // A float layer reads no bytes.
                    gate_up.forward(pool, &mut inner, &mut work.both, Input { values: &work.x_nh[rows.clone()], rows: &work.rows });
                    profile.lap(Part::ExpertsUp);
                    down.forward(pool, &mut work.y_nh[rows], Input { values: &inner, rows: &work.rows }, false);
                    profile.lap(Part::ExpertsDown);
                    work.inner_ni = inner;
                }
            }
        }
        let (places, weights, y_nh) = (&work.place_ts, &work.w_ts, &work.y_nh);
        pool.for_each_piece(x_th, ROWS_PER_TASK * h, |task, rows| {
            for (row, x_h) in rows.chunks_exact_mut(h).enumerate() {
                let choices = (task * ROWS_PER_TASK + row) * s..(task * ROWS_PER_TASK + row + 1) * s;
                for (&place, &weight) in places[choices.clone()].iter().zip(&weights[choices]) {
                    for (x, y) in x_h.iter_mut().zip(&y_nh[place as usize * h..][..h]) {
                        *x += weight * y;
                    }
                }
            }
        });
        profile.lap(Part::ExpertsDown);
    }
}

/// Puts the rows of each expert's tokens together, in `work.rows`, and says which are whose and where that expert's weights begin in the two matrices
/// of `up` and `down` rows for all of them. Returns the rows of one expert in the first.
fn group_rows(experts: usize, up: usize, down: usize, rows: &Rows8, work: &mut MoeWorkspace) -> usize {
    let (each_up, each_down) = (up / experts, down / experts);
    work.rows.gather(rows, &work.token_n);
    work.groups_up.clear();
    work.groups_down.clear();
    for (expert, bounds) in work.starts_e.windows(2).enumerate() {
        if bounds[0] < bounds[1] {
            work.groups_up.push(bounds[0]..bounds[1], expert * each_up);
            work.groups_down.push(bounds[0]..bounds[1], expert * each_down);
        }
    }
    work.inner_ni.resize(work.token_n.len() * each_up / 2, 0.0);
    each_up
}

/// In f32, like the released router.
fn softmax(p_e: &mut [f32]) {
    let max = p_e.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let mut sum = 0.0;
    for p in p_e.iter_mut() {
        *p = (*p - max).exp();
        sum += *p;
    }
    p_e.iter_mut().for_each(|p| *p /= sum);
}
