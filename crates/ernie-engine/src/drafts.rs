//! Guesses of what follows, from the text itself: where the last few tokens have stood before, the tokens that followed them then are likely to follow
//! again (prompt lookup: summaries, edits and code repeat their prompt). The model checks a whole guess in one pass, which costs little more than
//! a single token where memory is the limit, and only what it would have chosen itself is kept.
use std::collections::HashMap;

/// Tokens that must have stood before.
const KEY: usize = 3;

/// Rows that one pass checks, guesses and the tokens before them: more cost more than they bring.
pub(crate) const CHECKED_TOGETHER: usize = 16;

/// How much to guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftOptions {
    /// Most tokens of a guess; 0 guesses nothing.
    pub max_tokens: usize,
}

impl Default for DraftOptions {
    fn default() -> Self {
        DraftOptions { max_tokens: 12 }
    }
}

/// Guesses for one sequence.
#[derive(Debug)]
pub(crate) struct Drafter {
    /// Where each run of [`KEY`] tokens ended last.
    ends: HashMap<[u32; KEY], u32>,
    /// Tokens already in `ends`.
    indexed: usize,
    /// Tokens to guess next time: grows while guesses are right.
    length: usize,
    max: usize,
    /// Guesses in a row of which nothing was right.
    misses: u32,
    /// Steps in which nothing is guessed yet.
    pause: u32,
}

/// The longest pause, in steps, is two to this power: a text that begins to repeat itself is noticed within a sentence or two.
const LONGEST_PAUSE: u32 = 6;

impl Drafter {
    /// For a text of about `tokens` tokens, for which memory is taken now; a longer one takes more when it comes to that.
    pub fn new(options: DraftOptions, tokens: usize) -> Self {
        let ends = HashMap::with_capacity(if options.max_tokens == 0 { 0 } else { tokens });
        Drafter { ends, indexed: 0, length: options.max_tokens.min(4), max: options.max_tokens, misses: 0, pause: 0 }
    }

    /// Tokens that may follow `tokens`, at most `most` of them, into `draft`.
    pub fn guess(&mut self, tokens: &[u32], most: usize, draft: &mut Vec<u32>) {
        draft.clear();
        let most = most.min(self.length);
        if self.max == 0 || tokens.len() < KEY {
            return;
        }
        // All runs but the last: it must be found where it stood before.
        while self.indexed + 1 < tokens.len() {
            self.indexed += 1;
            if let Some(key) = tokens[..self.indexed].last_chunk::<KEY>() {
                self.ends.insert(*key, self.indexed as u32);
            }
        }
        if self.pause > 0 {
            self.pause -= 1;
            return;
        }
        let Some(&end) = tokens.last_chunk::<KEY>().and_then(|key| self.ends.get(key)) else { return };
        let following = &tokens[end as usize..];
        draft.extend(following.iter().take(most));
        // A run that repeats itself goes on beyond its end.
        let period = tokens.len() - end as usize;
        while draft.len() < most && !draft.is_empty() {
            draft.push(draft[draft.len() - period]);
        }
    }

    /// Learns how much of a guess was right. After guesses that were wrong altogether it rests, twice as long after each: where memory is not the limit, checking
    /// them costs as much as a few tokens.
    pub fn learn(&mut self, guessed: usize, right: usize) {
        if guessed == 0 {
            return;
        }
        self.misses = if right == 0 { (self.misses + 1).min(LONGEST_PAUSE + 1) } else { 0 };
        self.pause = (1 << self.misses.saturating_sub(1)) - 1;
        self.length = if right == guessed { (self.length * 2).min(self.max) } else { (right + 1).clamp(2.min(self.max), self.max) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guess(drafter: &mut Drafter, tokens: &[u32], most: usize) -> Vec<u32> {
        let mut draft = Vec::new();
        drafter.guess(tokens, most, &mut draft);
        draft
    }

    #[test]
    fn what_followed_before_is_guessed_again() {
        let mut drafter = Drafter::new(DraftOptions { max_tokens: 8 }, 0);
        assert!(guess(&mut drafter, &[1, 2], 4).is_empty());
        assert!(guess(&mut drafter, &[1, 2, 3, 4, 5, 6, 7], 4).is_empty());
        assert_eq!(guess(&mut drafter, &[1, 2, 3, 4, 5, 6, 7, 1, 2, 3], 4), [4, 5, 6, 7]);
        assert_eq!(guess(&mut drafter, &[1, 2, 3, 4, 5, 6, 7, 1, 2, 3], 2), [4, 5]);
        // The latest place counts.
        assert_eq!(guess(&mut drafter, &[1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 9, 1, 2, 3], 2), [9, 1]);
    }

    #[test]
    fn a_loop_is_guessed_beyond_its_end() {
        let mut drafter = Drafter::new(DraftOptions { max_tokens: 8 }, 0);
        drafter.learn(4, 4);
        assert_eq!(guess(&mut drafter, &[5, 5, 5, 5, 5], 7), [5; 7]);
        let mut drafter = Drafter::new(DraftOptions { max_tokens: 8 }, 0);
        drafter.learn(4, 4);
        assert_eq!(guess(&mut drafter, &[1, 2, 1, 2, 1, 2], 7), [1, 2, 1, 2, 1, 2, 1]);
    }

    #[test]
    fn right_guesses_grow_and_wrong_ones_shrink() {
        let mut drafter = Drafter::new(DraftOptions { max_tokens: 12 }, 0);
        let tokens: Vec<u32> = (0..40).chain(0..20).collect();
        assert_eq!(guess(&mut drafter, &tokens, 99).len(), 4);
        drafter.learn(4, 4);
        assert_eq!(guess(&mut drafter, &tokens, 99).len(), 8);
        drafter.learn(8, 8);
        assert_eq!(guess(&mut drafter, &tokens, 99).len(), 12);
        drafter.learn(12, 3);
        assert_eq!(guess(&mut drafter, &tokens, 99).len(), 4);
        drafter.learn(4, 0);
        assert_eq!(guess(&mut drafter, &tokens, 99).len(), 2);
        assert!(guess(&mut Drafter::new(DraftOptions { max_tokens: 0 }, 0), &tokens, 99).is_empty());
    }

    #[test]
    fn wrong_guesses_make_it_rest_and_a_right_one_wakes_it() {
        let mut drafter = Drafter::new(DraftOptions { max_tokens: 12 }, 0);
        let tokens: Vec<u32> = (0..40).chain(0..20).collect();
        for misses in 1..12 {
            let rests = (0..).take_while(|_| guess(&mut drafter, &tokens, 9).is_empty()).count();
            assert_eq!(rests, if misses == 1 { 0 } else { (1 << (misses - 2).min(6)) - 1 }, "after {} misses", misses - 1);
            drafter.learn(2, 0);
        }
        drafter.learn(2, 1);
        assert_eq!(guess(&mut drafter, &tokens, 9).len(), 2);
    }
}
