//! A packed batch: documents one after another, with their bounds.
use std::sync::Arc;

use crate::steering::Steering;

/// Target value of a position that is not scored.
pub const IGNORE: i32 = ernie_kernels::cross_entropy::IGNORE;

/// `t` tokens of several documents in one row.
///
/// `targets[i]` is the token that follows `ids[i]` in its document, or [`IGNORE`]; `cu_seqlens` is `[0, …, t]`, rising: document `j` holds the
/// tokens `cu_seqlens[j]..cu_seqlens[j + 1]`.
#[derive(Debug, Clone, Default)]
pub struct PackedBatch {
    /// Token ids, `[t]`.
    pub ids: Arc<[u32]>,
    /// Next tokens, `[t]`, [`IGNORE`] where there is none.
    pub targets: Arc<[i32]>,
    /// Document bounds, `[documents + 1]`.
    pub cu_seqlens: Arc<[u32]>,
    /// Factors of the tokens' losses, `[t]`; all 1 without them.
    pub weights: Option<Arc<[f32]>>,
    /// Domain of each token, `[t]`, [`NO_DOMAIN`](crate::steering::NO_DOMAIN) for none; the model itself does not look at it.
    pub domains: Option<Arc<[u16]>>,
    /// What decides about experts beside the routers; they alone without it.
    pub steering: Option<Steering>,
}

impl PackedBatch {
    /// Documents of plain token ids; each token's target is the next one of its document.
    ///
    /// Empty documents are skipped.
    pub fn from_documents<'a>(documents: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let (mut ids, mut targets, mut cu_seqlens) = (Vec::new(), Vec::new(), vec![0]);
        for document in documents.into_iter().filter(|d| !d.is_empty()) {
            ids.extend_from_slice(document);
            targets.extend(document[1..].iter().map(|&id| id as i32));
            targets.push(IGNORE);
            cu_seqlens.push(ids.len() as u32);
        }
        Self { ids: ids.into(), targets: targets.into(), cu_seqlens: cu_seqlens.into(), ..Self::default() }
    }

    /// The batch one token further on, for multi-token prediction: for each position the id of the *next* token, and the token after that as
    /// target. The last position of a document has no next token in the batch; its id is its own target if it has one (a document cut
    /// between two batches), else itself, and it is not scored: causality keeps it from reaching a position that is.
    pub fn shifted(&self) -> Self {
        let mut ids = self.ids.to_vec();
        let mut targets = vec![IGNORE; ids.len()];
        for bounds in self.cu_seqlens.windows(2) {
            let (start, end) = (bounds[0] as usize, bounds[1] as usize);
            if start == end {
                continue;
            }
            ids[start..end - 1].copy_from_slice(&self.ids[start + 1..end]);
            targets[start..end - 1].copy_from_slice(&self.targets[start + 1..end]);
            if self.targets[end - 1] >= 0 {
                ids[end - 1] = self.targets[end - 1] as u32;
            }
        }
        Self { ids: ids.into(), targets: targets.into(), ..self.clone() }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Number of positions that are scored.
    pub fn scored(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_packed_with_their_own_targets() {
        let batch = PackedBatch::from_documents([&[5, 6, 7][..], &[], &[8], &[9, 10]]);
        assert_eq!(&batch.ids[..], [5, 6, 7, 8, 9, 10]);
        assert_eq!(&batch.targets[..], [6, 7, IGNORE, IGNORE, 10, IGNORE]);
        assert_eq!(&batch.cu_seqlens[..], [0, 3, 4, 6]);
        assert_eq!(batch.scored(), 3);
    }

    #[test]
    fn shifting_stays_inside_documents() {
        let shifted = PackedBatch::from_documents([&[5, 6, 7][..], &[8], &[9, 10]]).shifted();
        assert_eq!(&shifted.ids[..], [6, 7, 7, 8, 10, 10]);
        assert_eq!(&shifted.targets[..], [7, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE]);
    }
}
