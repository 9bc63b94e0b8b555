//! Token embedding: rows of `w[vocabulary, h]` by id, and the gradient that adds them back.

use rayon::prelude::*;

/// Parts of the vocabulary that are summed independently: fixed, so that the order of each sum is that of the tokens.
const PARTS: usize = 32;

/// `y[t, h]` = the rows `ids[t]` of `w[vocabulary, h]`.
pub fn gather(y: &mut [f32], w: &[f32], ids: &[u32]) {
    let h = width(y, w, ids);
    if h == 0 {
        return;
    }
    y.par_chunks_mut(h).with_min_len(64).zip(ids).for_each(|(y, &id)| y.copy_from_slice(&w[id as usize * h..][..h]));
}

/// `dw[vocabulary, h]` += the rows of `dy[t, h]`, each to the row of its id. What dw held before stays: start from zeros for a gradient.
pub fn scatter_add(dw: &mut [f32], dy: &[f32], ids: &[u32]) {
    let h = width(dy, dw, ids);
    if h == 0 {
        return;
    }
    let part = (dw.len() / h).div_ceil(PARTS);
    dw.par_chunks_mut(part * h).enumerate().for_each(|(i, dw)| {
        let first = i * part;
        let rows = dw.len() / h;
        for (&id, dy) in ids.iter().zip(dy.chunks_exact(h)) {
            let row = (id as usize).wrapping_sub(first);
            if row < rows {
                for (dw, dy) in dw[row * h..][..h].iter_mut().zip(dy) {
                    *dw += dy;
                }
            }
        }
    });
}

/// The row width, 0 if there are no tokens.
fn width(tokens: &[f32], w: &[f32], ids: &[u32]) -> usize {
    let h = tokens.len() / ids.len().max(1);
    assert_eq!(tokens.len(), h * ids.len(), "{} values for {} ids", tokens.len(), ids.len());
    if let Some(&largest) = ids.iter().max() {
        assert!(h > 0 && w.len().is_multiple_of(h), "{} weights are no rows of {h}", w.len());
        assert!((largest as usize) < w.len() / h, "id {largest} in a vocabulary of {}", w.len() / h);
    }
    h
}

/// The same by plain loops, one token after the other.
pub mod scalar {
    /// y; see [`gather`](super::gather).
    pub fn gather(w: &[f32], ids: &[u32], h: usize) -> Vec<f32> {
        ids.iter().flat_map(|&id| w[id as usize * h..][..h].iter().copied()).collect()
    }

    /// dw; see [`scatter_add`](super::scatter_add).
    pub fn scatter_add(dw: &mut [f32], dy: &[f32], ids: &[u32], h: usize) {
        for (i, dy) in dy.iter().enumerate() {
            dw[ids[i / h] as usize * h + i % h] += dy;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn equals_the_plain_loops() {
        let mut random = Random::new(13);
        for (t, h, vocabulary) in [(1, 1, 1), (5, 3, 2), (300, 20, 77), (40, 64, 1000)] {
            let (w, dy) = (random.vec(vocabulary * h, 1.0), random.vec(t * h, 1.0));
            let ids: Vec<u32> = (0..t).map(|_| random.below(vocabulary) as u32).collect();
            let mut y = vec![f32::NAN; t * h];
            gather(&mut y, &w, &ids);
            assert_eq!(y, scalar::gather(&w, &ids, h));
            let (mut dw, mut expected) = (w.clone(), w.clone());
            scatter_add(&mut dw, &dy, &ids);
            scalar::scatter_add(&mut expected, &dy, &ids, h);
            assert_eq!(dw, expected);
        }
    }

    #[test]
    fn no_tokens_change_nothing() {
        let mut dw = vec![1.0; 6];
        scatter_add(&mut dw, &[], &[]);
        gather(&mut [], &dw, &[]);
        assert_eq!(dw, [1.0; 6]);
    }
}
