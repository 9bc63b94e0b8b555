//! What an answer must look like, token by token: a grammar, say. The engine asks before each choice which tokens may come and tells which one came.
use std::fmt::Debug;

/// Which tokens may come next.
///
/// The engine calls [`Constraint::allow`] before it chooses a token and [`Constraint::accept`] with what it chose, on its own thread and in turn, so time
/// spent here holds up all requests. Guesses ahead need nothing more: each is checked with the mask of its own place, and what is wrong is never accepted.
pub trait Constraint: Debug + Send {
    /// Fills `allowed`, which is empty, with the tokens that may come next: at least one. An end-of-sequence token belongs to them if the text may end.
    ///
    /// # Errors
    /// Why it cannot be said, for people; the request fails with it.
    fn allow(&mut self, allowed: &mut TokenSet) -> Result<(), String>;

    /// Takes the token that was chosen, one of those allowed.
    ///
    /// # Errors
    /// As [`Constraint::allow`].
    fn accept(&mut self, token: u32) -> Result<(), String>;

    /// Whether nothing may follow what was accepted: the answer ends here.
    fn is_complete(&self) -> bool;
}

/// A set of token ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenSet {
    words: Vec<u32>,
}

impl TokenSet {
    /// Adds a token.
    pub fn insert(&mut self, token: u32) {
        let word = token as usize / 32;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (token % 32);
    }

    /// Adds the tokens of a bit set, 32 to a word, the lowest bit first.
    pub fn insert_words(&mut self, words: &[u32]) {
        self.words.resize(self.words.len().max(words.len()), 0);
        self.words.iter_mut().zip(words).for_each(|(word, more)| *word |= more);
    }

    /// Whether a token belongs to it.
    pub fn contains(&self, token: u32) -> bool {
        self.words.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// Takes all tokens out.
    pub fn clear(&mut self) {
        self.words.clear();
    }

    /// `logits` into `masked`, −∞ for tokens outside the set.
    pub(crate) fn mask(&self, logits: &[f32], masked: &mut Vec<f32>) {
        masked.clear();
        masked.resize(logits.len(), f32::NEG_INFINITY);
        for ((masked, logits), &word) in masked.chunks_mut(32).zip(logits.chunks(32)).zip(&self.words) {
            if word != 0 {
                for (bit, (masked, logit)) in masked.iter_mut().zip(logits).enumerate() {
                    if word >> bit & 1 == 1 {
                        *masked = *logit;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::TokenSet;

    #[test]
    fn a_set_masks_what_it_does_not_have() {
        let logits: Vec<f32> = (0..70).map(|i| i as f32).collect();
        let mut set = TokenSet::default();
        for token in [0, 31, 32, 69] {
            set.insert(token);
        }
        // Beyond the vocabulary there is nothing to allow.
        set.insert(1000);
        set.insert_words(&[1 << 5]);
        let mut masked = vec![7.0; 3];
        set.mask(&logits, &mut masked);
        for (token, (masked, logit)) in masked.iter().zip(&logits).enumerate() {
            let allowed = [0, 5, 31, 32, 69].contains(&token);
            assert_eq!(set.contains(token as u32), allowed, "{token}");
            assert_eq!(*masked, if allowed { *logit } else { f32::NEG_INFINITY }, "{token}");
        }
        assert_eq!(masked.len(), 70);
        set.clear();
        assert!(!set.contains(5) && set == TokenSet::default());
    }
}
