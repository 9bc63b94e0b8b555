//! Where the paragraphs of a text that grows end.
use ernie_checkpoint::Paragraphs as Rule;
use ernie_kernels::paged::Paragraphs;

/// The paragraphs of one text.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    /// The positions after their last tokens, of those that are over.
    ends: Vec<u32>,
    /// Tokens looked at.
    known: usize,
}

impl Ends {
    /// With room for a text of so many tokens.
    pub fn with_capacity(tokens: usize) -> Self {
        Ends { ends: Vec::with_capacity(tokens / Rule::LEAST), known: 0 }
    }

    /// Follows the text, which must begin with what was there before.
    pub fn follow(&mut self, rule: &Rule, text: &[u32]) {
        while self.known < text.len() {
            let token = text[self.known];
            self.known += 1;
            if rule.ends(token, self.known - self.start()) {
                self.ends.push(self.known as u32);
            }
        }
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.known = self.known.min(len);
        let over = self.ends.partition_point(|&end| end as usize <= self.known);
        self.ends.truncate(over);
    }

    /// Adds the text's paragraphs, and those of the guesses after it, to those of a step that computes the positions from `first` on; `blocks` are the text's.
    pub fn push_to(&self, paragraphs: &mut Paragraphs, rule: &Rule, guesses: &[u32], first: usize, last: usize, blocks: &[u32]) {
        let (mut start, mut position) = (self.start(), self.known);
        let guessed = guesses.iter().filter_map(|&token| {
            position += 1;
            let ends = rule.ends(token, position - start);
            if ends {
                start = position;
            }
            ends.then_some(position as u32)
        });
        paragraphs.push(self.ends.iter().copied().chain(guessed), first..last, blocks);
    }

    /// Where the paragraph that is not over begins.
    fn start(&self) -> usize {
        self.ends.last().map_or(0, |&end| end as usize)
    }
}
