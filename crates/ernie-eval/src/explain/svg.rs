//! The picture as an SVG file. White paper and dark ink whatever the viewer's theme; figures stand in tooltips.
use std::fmt::Write as _;

use super::layout::{Column, stripes};
use super::summary::figures;
use super::{Choice, Experts, Explanation, Heads, Layer};

/// Width of a column of text, in pixels as all that follows.
const CHAR: usize = 8;
const GUTTER: usize = 96;
const MARGIN: usize = 16;
/// Columns of a stripe.
const COLUMNS: usize = 140;
const LINE: usize = 18;
const LOSS: usize = 32;
const DENSITY: usize = 24;
const HEAD: usize = 5;
const EXPERT: usize = 14;
/// Below a layer, and below a stripe three times as much.
const GAP: usize = 8;
const LOSS_COLOUR: &str = "#005aa0";
const DENSITY_COLOUR: &str = "#d55e00";
const ACTIVE_COLOUR: &str = "#009e73";
/// Colours of experts, used in turn; the first five are Okabe and Ito's.
const EXPERTS: [&str; 8] = ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#a0a0a0", "#8c7ae6", "#d0865c"];

/// Draws what a model did with a text whose tokens are spelled as `pieces`, `[t]`.
///
/// # Panics
/// If there are not as many pieces as tokens.
pub fn draw(explanation: &Explanation, pieces: &[String], title: &str) -> String {
    assert_eq!(pieces.len(), explanation.ids.len(), "one piece for each token");
    let mut drawing = Drawing { out: String::new(), y: MARGIN + LINE };
    drawing.text(MARGIN, title, "font-size=\"16\" font-weight=\"bold\"");
    drawing.y += LINE;
    for line in legend(explanation) {
        drawing.text(MARGIN, &line, "fill=\"#666\"");
        drawing.y += LINE;
    }
    let least = if explanation.has_experts() { 3 } else { 1 };
    for stripe in stripes(pieces, least, COLUMNS) {
        drawing.y += 2 * GAP;
        drawing.stripe(explanation, &stripe);
        drawing.y += GAP;
    }
    drawing.y += LINE;
    for line in figures(explanation, COLUMNS) {
        drawing.text(MARGIN, &line, "");
        drawing.y += LINE;
    }
    let (width, height) = (2 * MARGIN + GUTTER + COLUMNS * CHAR, drawing.y + MARGIN);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
        font-family=\"monospace\" font-size=\"13\" fill=\"#262626\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n{}</svg>\n",
        drawing.out
    )
}

fn legend(explanation: &Explanation) -> Vec<String> {
    let mut lines = vec![format!("loss: up to {:.2} nats, how much a token surprises after those before it", explanation.most_loss())];
    if let Some(most) = explanation.most_density() {
        lines.push(format!("density: up to {most:.2}, how much new a token brings; heads: a row for each, filled where it is active"));
    }
    if explanation.has_experts() {
        lines.push("experts: the first choice on top, as full of colour as its weight".to_owned());
    }
    lines
}

struct Drawing {
    out: String,
    /// Where the next row begins; of text, its baseline.
    y: usize,
}

impl Drawing {
    fn stripe(&mut self, explanation: &Explanation, stripe: &[Column]) {
        self.y += LINE;
        for column in stripe {
            self.text(left(column), &column.text, "");
        }
        self.y += GAP / 2;
        self.loss(explanation, stripe);
        for layer in &explanation.layers {
            if let Some(heads) = &layer.heads {
                self.heads(layer, heads, explanation.most_density().unwrap_or(0.0), stripe);
            }
            if let Some(experts) = &layer.experts {
                self.experts(layer, experts, stripe);
            }
        }
    }

    fn loss(&mut self, explanation: &Explanation, stripe: &[Column]) {
        self.label("loss", LOSS);
        for column in stripe {
            let Some(loss) = explanation.losses[column.token] else { continue };
            let height = scaled(loss, explanation.most_loss(), LOSS);
            let tooltip = format!("{}: {loss:.3} nats", column.text);
            let y = self.y as f32 + LOSS as f32 - height;
            self.cell(left(column), y, column.width * CHAR, height, &format!("fill=\"{LOSS_COLOUR}\""), &tooltip);
        }
        self.y += LOSS + GAP;
    }

    fn heads(&mut self, layer: &Layer, heads: &Heads, most: f32, stripe: &[Column]) {
        self.label(&format!("{} density", layer.layer), DENSITY);
        let points = stripe.iter().map(|column| {
            let x = left(column) + column.width * CHAR / 2;
            format!("{x},{:.1}", (self.y + DENSITY) as f32 - scaled(heads.density[column.token], most, DENSITY))
        });
        let points = points.collect::<Vec<_>>().join(" ");
        let _ = writeln!(self.out, "<polyline points=\"{points}\" fill=\"none\" stroke=\"{DENSITY_COLOUR}\" stroke-width=\"2\"/>");
        self.y += DENSITY + GAP / 2;
        let count = heads.active[0].len();
        self.label(&format!("{} heads", layer.layer), (count * HEAD).max(EXPERT));
        // One path for all heads of the layer: a rectangle for each would make large files.
        let mut path = String::new();
        for column in stripe {
            for head in (0..count).filter(|&head| heads.active[column.token][head]) {
                let (x, y, width) = (left(column), self.y + head * HEAD, column.width * CHAR);
                let _ = write!(path, "M{x} {y}h{width}v{height}h-{width}z", height = HEAD - 1);
            }
        }
        if !path.is_empty() {
            let _ = writeln!(self.out, "<path d=\"{path}\" fill=\"{ACTIVE_COLOUR}\"/>");
        }
        self.y += (count * HEAD).max(EXPERT) + GAP;
    }

    fn experts(&mut self, layer: &Layer, experts: &Experts, stripe: &[Column]) {
        self.label(&format!("{} experts", layer.layer), EXPERT);
        for column in stripe {
            for (rank, &Choice { expert, weight }) in experts.choices[column.token].iter().enumerate() {
                let y = self.y + rank * EXPERT;
                let colour = EXPERTS[expert as usize % EXPERTS.len()];
                let attributes = format!("fill=\"{colour}\" fill-opacity=\"{:.3}\"", weight.clamp(0.0, 1.0));
                let tooltip = format!("{}: layer {}, expert {expert}, weight {weight:.3}", column.text, layer.layer);
                self.cell(left(column), y as f32, column.width * CHAR, (EXPERT - 1) as f32, &attributes, &tooltip);
                let _ = writeln!(self.out, "<text x=\"{}\" y=\"{}\" font-size=\"11\">{expert}</text>", left(column) + 2, y + EXPERT - 4);
            }
        }
        self.y += experts.choices[0].len() * EXPERT + GAP;
    }

    /// Of a row that is `height` high, at its middle.
    fn label(&mut self, text: &str, height: usize) {
        let _ = writeln!(self.out, "<text x=\"{MARGIN}\" y=\"{}\" fill=\"#666\">{}</text>", self.y + height / 2 + 4, escaped(text));
    }

    fn text(&mut self, x: usize, text: &str, attributes: &str) {
        let _ = writeln!(self.out, "<text x=\"{x}\" y=\"{}\" {attributes} xml:space=\"preserve\">{}</text>", self.y, escaped(text));
    }

    fn cell(&mut self, x: usize, y: f32, width: usize, height: f32, attributes: &str, tooltip: &str) {
        let _ = writeln!(
            self.out,
            "<rect x=\"{x}\" y=\"{y:.1}\" width=\"{width}\" height=\"{height:.1}\" {attributes}><title>{}</title></rect>",
            escaped(tooltip)
        );
    }
}

fn left(column: &Column) -> usize {
    MARGIN + GUTTER + column.start * CHAR
}

/// Height of a value's bar or point, of `height` pixels at `most`.
fn scaled(value: f32, most: f32, height: usize) -> f32 {
    if most > 0.0 { (value / most).clamp(0.0, 1.0) * height as f32 } else { 0.0 }
}

/// As XML text. Characters that XML does not allow at all are replaced: a folder's name may have them.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            _ => out.push(char),
        }
    }
    out
}
