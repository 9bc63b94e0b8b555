//! Jobs over a whole text: the log-probabilities of its own tokens, its embedding. They need every position, so they use neither the batch nor the
//! prefix cache but a session of their own, of which a piece is computed between any two steps of the engine.
use ernie_engine::{LogProbs, Model, Result, Session};

use crate::accounts::charge::Charge;
use crate::worker::{Event, Events};
use std::time::Instant;

/// Tokens of a piece: it holds up those who are being answered, and its logits are kept, `[64, vocab]`.
const PIECE: usize = 64;

/// How likely a token of a text was.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Score {
    /// ln of its probability; `None` for the first token, which nothing comes before.
    pub logprob: Option<f32>,
    /// The likeliest tokens in its place.
    pub top: Vec<(u32, f32)>,
}

/// What becomes of each piece.
#[derive(Debug)]
enum Goal {
    Score {
        top: usize,
        scores: Vec<Score>,
    },
    /// The sum of the states so far.
    Embed {
        sum_h: Vec<f64>,
    },
}

/// A job on its way.
#[derive(Debug)]
pub(crate) struct Whole<'m> {
    prompt: Vec<u32>,
    index: usize,
    events: Events,
    goal: Goal,
    /// Made when the job's turn comes, so that those that wait take no memory.
    session: Option<Session<'m>>,
    charge: Option<Charge>,
}

impl<'m> Whole<'m> {
    pub fn score(prompt: Vec<u32>, top: usize, index: usize, events: Events, charge: Option<Charge>) -> Self {
        Whole { prompt, index, events, goal: Goal::Score { top, scores: vec![Score::default()] }, session: None, charge }
    }

    pub fn embed(prompt: Vec<u32>, index: usize, events: Events, charge: Option<Charge>) -> Self {
        Whole { prompt, index, events, goal: Goal::Embed { sum_h: Vec::new() }, session: None, charge }
    }

    /// Whether nobody waits for it.
    pub fn is_gone(&self) -> bool {
        self.events.is_closed()
    }

    /// Tokens of the text.
    pub fn tokens(&self) -> usize {
        self.prompt.len()
    }

    /// Hands over the outcome.
    pub fn answer(&self, outcome: Event) {
        // A reader that is gone needs no answer.
        drop(self.events.try_send((self.index, outcome)));
    }

    /// Computes the next piece; the outcome if it was the last.
    pub fn step(&mut self, model: &'m Model) -> Option<Event> {
        if self.session.is_none() {
            self.charge.iter().for_each(|charge| charge.prompt(self.prompt.len()));
        }
        let began = Instant::now();
        let outcome = self.piece(model);
        self.charge.iter().for_each(|charge| charge.spent(began.elapsed()));
        match outcome {
            Ok(false) => None,
            Ok(true) => Some(match &mut self.goal {
                Goal::Score { scores, .. } => Event::Scores(std::mem::take(scores)),
                Goal::Embed { sum_h } => Event::Embedding(normalised(sum_h)),
            }),
            Err(error) => Some(Event::Failed(error)),
        }
    }

    /// Whether it was the last.
    fn piece(&mut self, model: &'m Model) -> Result<bool> {
        let session = match &mut self.session {
            Some(session) => session,
            none => none.insert(Session::new(model, self.prompt.len())?),
        };
        let start = session.len();
        let piece = &self.prompt[start..self.prompt.len().min(start + PIECE)];
        match &mut self.goal {
            Goal::Score { top, scores } => {
                let logits = session.logits_for(piece, piece.len())?;
                // Each row scores the token after its own.
                for (row, &next) in logits.chunks_exact(model.config().vocab_size).zip(&self.prompt[start + 1..]) {
                    let row = LogProbs::of(row);
                    scores.push(Score { logprob: Some(row.of_token(next)), top: row.top(*top) });
                }
            }
            Goal::Embed { sum_h } => {
                let hidden = model.config().hidden_size;
                sum_h.resize(hidden, 0.0);
                for state_h in session.states_for(piece)?.chunks_exact(hidden) {
                    sum_h.iter_mut().zip(state_h).for_each(|(sum, x)| *sum += f64::from(*x));
                }
            }
        }
        Ok(session.len() == self.prompt.len())
    }
}

/// The same direction with length 1: of a sum it is that of the mean.
fn normalised(sum_h: &[f64]) -> Vec<f32> {
    let length = sum_h.iter().map(|x| x * x).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    sum_h.iter().map(|x| (x / length) as f32).collect()
}
