//! Stop strings in streamed text: text that may be the start of one is held back until that is known, so that no part of a stop string is ever shown.

/// Finds the first of some strings in text that comes in pieces. What it finds does not depend on where the pieces are cut.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text not yet released.
    held: String,
    found: bool,
}

impl StopMatcher {
    /// For these strings, none of them empty.
    pub fn new(stops: &[String]) -> Self {
        StopMatcher { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new(), found: false }
    }

    /// Whether a stop string has come. What follows it is dropped.
    pub fn found(&self) -> bool {
        self.found
    }

    /// Takes the next piece; returns the text that can be shown now. Of several stop strings the one that is complete first ends the text,
    /// and of those complete at the same character the one that starts first.
    pub fn push(&mut self, piece: &str) -> String {
        if self.found || piece.is_empty() {
            return String::new();
        }
        self.held.push_str(piece);
        let ends = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start + stop.len(), start)));
        if let Some((_, start)) = ends.min() {
            self.found = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// The text ends: what was held back is no stop string after all.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest proper prefix of `stop` with which `text` ends.
fn overlap(text: &str, stop: &str) -> usize {
    let lengths = stop.char_indices().map(|(i, _)| i).rev();
    lengths.into_iter().find(|&length| text.ends_with(&stop[..length])).unwrap_or(0)
}
