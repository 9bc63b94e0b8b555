//! The picture in a terminal: blocks of Unicode, with colours of the 256 that terminals share if asked for.
use std::fmt::Write as _;

use super::layout::{Column, padded, stripes};
use super::summary::{bar, figures, legend};
use super::{Choice, Experts, Explanation, Heads, Layer};

/// Of losses and densities, from what was expected to what was not.
const HEAT: [u8; 6] = [27, 37, 71, 178, 208, 196];
/// Of experts, in turn.
const EXPERTS: [u8; 12] = [39, 208, 78, 175, 220, 117, 203, 141, 149, 180, 44, 250];
const ACTIVE: u8 = 78;
const DIM: u8 = 244;
/// Tokens have at least this many columns, however narrow the terminal.
const NARROWEST: usize = 20;

/// How the picture is drawn.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// Columns of the terminal.
    pub width: usize,
    /// Whether to use colours.
    pub colour: bool,
}

/// Draws what a model did with a text whose tokens are spelled as `pieces`, `[t]`.
///
/// # Panics
/// If there are not as many pieces as tokens.
pub fn draw(explanation: &Explanation, pieces: &[String], style: Style) -> String {
    assert_eq!(pieces.len(), explanation.ids.len(), "one piece for each token");
    let experts = || explanation.layers.iter().filter_map(|layer| layer.experts.as_ref());
    // A number and its bar.
    let least = experts().map(|experts| experts.tokens.len().saturating_sub(1).to_string().len() + 1).max().unwrap_or(1);
    let labels = explanation.layers.iter().flat_map(|layer| {
        let heads = layer.heads.iter().flat_map(|heads| (0..heads.gates[0].len()).step_by(2).map(|head| heads_label(layer, heads, head)));
        heads.chain([format!("{} density", layer.layer), format!("{} experts", layer.layer)])
    });
    let gutter = labels.map(|label| label.len()).max().unwrap_or(0).max("token".len()) + 1;
    let mut drawing = Drawing { out: String::new(), gutter, colour: style.colour };
    for line in legend(explanation) {
        drawing.line(&line, Some(DIM));
    }
    for stripe in stripes(pieces, least, style.width.saturating_sub(gutter).max(NARROWEST)) {
        drawing.out.push('\n');
        drawing.stripe(explanation, &stripe);
    }
    drawing.out.push('\n');
    for line in figures(explanation, style.width) {
        drawing.line(&line, None);
    }
    drawing.out
}

fn heads_label(layer: &Layer, heads: &Heads, first: usize) -> String {
    let two = if first + 1 < heads.gates[0].len() { format!(",{}", first + 1) } else { String::new() };
    format!("{} head {first}{two}", layer.layer)
}

struct Drawing {
    out: String,
    /// Columns for the labels of rows, with the space after them.
    gutter: usize,
    colour: bool,
}

impl Drawing {
    fn stripe(&mut self, explanation: &Explanation, stripe: &[Column]) {
        let most_loss = explanation.most_loss();
        let loss = |column: &Column| explanation.losses[column.token];
        self.row("token", stripe, |column| (column.text.clone(), loss(column).map(|loss| heat(loss, most_loss))));
        self.row("loss", stripe, |column| match loss(column) {
            Some(loss) => (filled(bar(loss, most_loss), column), Some(heat(loss, most_loss))),
            None => (String::new(), None),
        });
        for layer in &explanation.layers {
            if let Some(heads) = &layer.heads {
                self.heads(layer, heads, explanation.most_density().unwrap_or(0.0), stripe);
            }
            if let Some(experts) = &layer.experts {
                self.experts(layer, experts, stripe);
            }
        }
    }

    fn heads(&mut self, layer: &Layer, heads: &Heads, most: f32, stripe: &[Column]) {
        let density = |column: &Column| heads.density[column.token];
        self.row(&format!("{} density", layer.layer), stripe, |column| {
            (filled(bar(density(column), most), column), Some(heat(density(column), most)))
        });
        for first in (0..heads.active[0].len()).step_by(2) {
            self.row(&heads_label(layer, heads, first), stripe, |column| {
                let active = &heads.active[column.token];
                match (active[first], active.get(first + 1).is_some_and(|active| *active)) {
                    (true, true) => (filled('█', column), Some(ACTIVE)),
                    (true, false) => (filled('▀', column), Some(ACTIVE)),
                    (false, true) => (filled('▄', column), Some(ACTIVE)),
                    (false, false) => (filled('·', column), Some(DIM)),
                }
            });
        }
    }

    fn experts(&mut self, layer: &Layer, experts: &Experts, stripe: &[Column]) {
        for rank in 0..experts.choices[0].len() {
            let label = if rank == 0 { format!("{} experts", layer.layer) } else { String::new() };
            self.row(&label, stripe, |column| {
                let Choice { expert, weight } = experts.choices[column.token][rank];
                (format!("{expert}{}", bar(weight, 1.0)), Some(EXPERTS[expert as usize % EXPERTS.len()]))
            });
        }
    }

    /// A label and one cell for each token.
    fn row(&mut self, label: &str, stripe: &[Column], cell: impl Fn(&Column) -> (String, Option<u8>)) {
        let begin = self.out.len();
        self.paint(&padded(label, self.gutter), Some(DIM));
        let mut end = 0;
        for column in stripe {
            let (text, colour) = cell(column);
            self.out.push_str(&" ".repeat(column.start - end));
            self.paint(&padded(&text, column.width), colour);
            end = column.start + column.width;
        }
        let trimmed = self.out[begin..].trim_end().len();
        self.out.truncate(begin + trimmed);
        self.out.push('\n');
    }

    fn line(&mut self, text: &str, colour: Option<u8>) {
        self.paint(text, colour);
        self.out.push('\n');
    }

    fn paint(&mut self, text: &str, colour: Option<u8>) {
        match colour.filter(|_| self.colour) {
            // Writing to a String cannot fail.
            Some(colour) => _ = write!(self.out, "\x1b[38;5;{colour}m{text}\x1b[0m"),
            None => self.out.push_str(text),
        }
    }
}

/// A bar as wide as its token.
fn filled(char: char, column: &Column) -> String {
    String::from(char).repeat(column.width)
}

fn heat(value: f32, most: f32) -> u8 {
    let share = if most > 0.0 { value / most } else { 0.0 };
    HEAT[((share * HEAT.len() as f32) as usize).min(HEAT.len() - 1)]
}
