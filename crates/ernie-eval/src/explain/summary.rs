//! What both pictures say in words: how to read them, and the figures of each layer.
use unicode_width::UnicodeWidthStr;

use super::{Explanation, Layer};

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The bar of a value between 0 and `most`. 0 has one too, so that there is a row to follow.
pub(super) fn bar(value: f32, most: f32) -> char {
    let share = if most > 0.0 { value / most } else { 0.0 };
    BARS[((share * 8.0) as usize).min(7)]
}

/// How to read the bars of the terminal.
pub(super) fn legend(explanation: &Explanation) -> Vec<String> {
    let mut lines =
        vec![format!("loss      ▁ 0 to █ {:.2} nats: how much a token surprises after those before it", explanation.most_loss())];
    if let Some(most) = explanation.most_density() {
        lines.push(format!("density   ▁ 0 to █ {most:.2}: how much new a token brings, per layer"));
        lines.push("heads     ▀ upper, ▄ lower, █ both of two heads are active, · neither".to_owned());
    }
    if explanation.has_experts() {
        lines.push("experts   number and weight, ▁ 0 to █ 1; the first choice on top".to_owned());
    }
    lines
}

/// The figures of the text and of each layer, in lines of at most `width` columns where words allow it.
pub(super) fn figures(explanation: &Explanation, width: usize) -> Vec<String> {
    let (tokens, loss) = (explanation.ids.len(), explanation.mean_loss());
    let mut lines = vec![match tokens {
        1 => "1 token, which is given".to_owned(),
        _ => format!("{tokens} tokens, mean loss {loss:.4} nats, perplexity {:.2}", loss.exp()),
    }];
    for Layer { layer, heads, experts } in &explanation.layers {
        if let Some(heads) = heads {
            let correlation = heads.correlation.map_or("no correlation with density (one never changes)".to_owned(), |correlation| {
                format!("correlation with density {correlation:+.3}")
            });
            lines.push(format!("layer {layer:<3} heads active {:.1}%, {correlation}", 100.0 * heads.active_share));
        }
        if let Some(experts) = experts {
            let most = experts.tokens.iter().copied().max().unwrap_or(0) as f32;
            let entries = experts.tokens.iter().enumerate().map(|(expert, &count)| format!("{expert}:{}{count}", bar(count as f32, most)));
            lines.extend(wrapped(format!("layer {layer:<3} tokens per expert"), entries, width));
        }
    }
    lines
}

/// `head` and the entries after it, in lines of at most `width` columns; further lines are indented.
fn wrapped(head: String, entries: impl Iterator<Item = String>, width: usize) -> Vec<String> {
    let mut lines = vec![head];
    for entry in entries {
        let line = lines.last_mut().expect("there is one from the start");
        if line.width() + 1 + entry.width() > width {
            lines.push(format!("          {entry}"));
        } else {
            line.push(' ');
            line.push_str(&entry);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_rise_from_the_first_to_the_last() {
        assert_eq!([0.0, 0.124, 0.126, 0.5, 0.99, 1.0, 7.0].map(|value| bar(value, 1.0)), ['▁', '▁', '▂', '▅', '█', '█', '█']);
        assert_eq!([bar(0.0, 0.0), bar(-1e-7, 2.0)], ['▁', '▁']);
    }

    #[test]
    fn lines_are_cut_between_entries() {
        let entries = || ["0:▁1", "1:█9", "2:▁1"].into_iter().map(str::to_owned);
        assert_eq!(wrapped("layer".to_owned(), entries(), 16), ["layer 0:▁1 1:█9", "          2:▁1"]);
        assert_eq!(wrapped("layer".to_owned(), entries(), 80).len(), 1);
    }
}
