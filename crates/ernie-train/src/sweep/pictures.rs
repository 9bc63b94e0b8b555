//! Pictures of what arms chose: experts by domain, rows by priority, heads by layer. Plain SVG in the colours of the page, so that they follow its light or dark scheme.
use std::fmt::Write as _;

use super::page::{escaped, with_error};
use super::report::{ArmHeads, ArmReport, RunReport, SweepReport};
use crate::data::priority::RatioHistogram;
use crate::experts::LayerUse;

/// Side of a cell of a heat map, pixels.
const CELL: usize = 30;
/// Width of the column of domains' names, pixels.
const NAMES: usize = 96;
/// Height of a line of text, pixels.
const LINE: usize = 18;

/// All pictures that the runs have something for.
pub(super) fn pictures(report: &SweepReport) -> String {
    let mut out = String::new();
    for (heading, figures) in [
        ("Experts by domain", figures(report, experts)),
        ("Rows by their probability over that of uniform sampling", figures(report, sampling)),
        ("Active heads by layer", figures(report, heads)),
    ] {
        if !figures.is_empty() {
            let _ = writeln!(out, "<h2>{heading}</h2>\n{figures}");
        }
    }
    out
}

/// One figure for each arm that has one.
fn figures(report: &SweepReport, figure: fn(&ArmReport, &[&RunReport]) -> Option<String>) -> String {
    let mut out = String::new();
    for (index, arm) in report.arms.iter().enumerate() {
        let runs: Vec<&RunReport> = report.runs.iter().filter(|run| run.arm == index).collect();
        if let Some(figure) = figure(arm, &runs) {
            let _ = writeln!(out, "<figure>{figure}</figure>");
        }
    }
    out
}

/// Heat maps of the first seed's layers: experts differ in number from seed to seed, so that a mean of maps would show nothing.
fn experts(arm: &ArmReport, runs: &[&RunReport]) -> Option<String> {
    let run = runs.iter().find(|run| run.report.experts.is_some())?;
    let found = run.report.experts.as_ref()?;
    let overlap = arm.overlap.map_or("–".to_owned(), |spread| with_error(spread, 3));
    let least = arm.least_used.map_or("–".to_owned(), |spread| with_error(spread, 2));
    let mut out = format!(
        "<figcaption>{}: overlap {overlap}, least used expert {least} of an even share (over all seeds). Of the maps, seed {}: each row is a domain, each \
        column an expert; a cell is as dark as the share of the expert's tokens that are of the domain.</figcaption>",
        escaped(&arm.name),
        run.seed
    );
    for layer in &found.layers {
        out.push_str(&heat_map(layer, &found.domains));
    }
    Some(out)
}

fn heat_map(layer: &LayerUse, domains: &[String]) -> String {
    let experts = layer.counts.first().map_or(0, Vec::len);
    let (width, height) = (NAMES + experts * CELL + 8, domains.len() * CELL + 2 * LINE + 4);
    let mut out = svg_open(width, height, &format!("layer {}: experts by domain", layer.layer));
    let _ = write!(out, "<text x=\"0\" y=\"13\">layer {}, overlap {:.3}</text>", layer.layer, layer.overlap);
    let total = |expert: usize| layer.counts.iter().map(|row| row[expert]).sum::<u64>();
    for (row, (domain, counts)) in domains.iter().zip(&layer.counts).enumerate() {
        let y = LINE + row * CELL;
        let _ = write!(out, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>", NAMES - 8, y + CELL / 2 + 4, escaped(domain));
        for (expert, &count) in counts.iter().enumerate() {
            let share = count as f64 / total(expert).max(1) as f64;
            let x = NAMES + expert * CELL;
            let _ = write!(
                out,
                "<rect class=\"cell\" x=\"{x}\" y=\"{y}\" width=\"{0}\" height=\"{0}\" fill-opacity=\"{share:.3}\"><title>{1}, expert {expert}: {2:.1}% of its \
                tokens</title></rect>",
                CELL - 2,
                escaped(domain),
                100.0 * share
            );
        }
    }
    for expert in 0..experts {
        let (x, y) = (NAMES + expert * CELL + CELL / 2 - 1, LINE + domains.len() * CELL + 13);
        let _ = write!(out, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\">{expert}</text>");
    }
    out.push_str("</svg>\n");
    out
}

/// The rows of all seeds together.
fn sampling(arm: &ArmReport, runs: &[&RunReport]) -> Option<String> {
    let mut histograms = runs.iter().filter_map(|run| run.report.sampling.as_ref());
    let mut rows = histograms.next()?.rows.clone();
    for other in histograms {
        rows.iter_mut().zip(&other.rows).for_each(|(sum, rows)| *sum += rows);
    }
    let total = rows.iter().sum::<u64>().max(1) as f64;
    let bars: Vec<Bar> = rows
        .iter()
        .enumerate()
        .map(|(bin, &rows)| Bar {
            value: rows as f64 / total,
            label: if bin % 4 == 0 { format!("{}×", RatioHistogram::begins(bin)) } else { String::new() },
            title: format!("{:.2} to {:.2}: {rows} rows", RatioHistogram::begins(bin), RatioHistogram::begins(bin + 1)),
        })
        .collect();
    let caption = format!("{}: share of the rows at the end of the run, all seeds", escaped(&arm.name));
    Some(format!("<figcaption>{caption}</figcaption>{}", bar_chart(&bars, 20, &caption)))
}

fn heads(arm: &ArmReport, _: &[&RunReport]) -> Option<String> {
    let bar = |heads: &ArmHeads| {
        let title = with_error(heads.share, 3);
        Bar { value: heads.share.mean, label: format!("layer {}", heads.layer), title }
    };
    let bars: Vec<Bar> = arm.active_heads.iter().map(bar).collect();
    let caption = format!("{}: share of heads that are active on validation text, mean of the seeds", escaped(&arm.name));
    let mut out = format!("<figcaption>{caption}</figcaption>{}", bar_chart(&bars, 72, &caption));
    if arm.active_heads.iter().any(|heads| heads.correlation.is_some()) {
        out.push_str("<table><tr><th>layer<th>active heads<th>correlation with semantic density</tr>\n");
        for heads in &arm.active_heads {
            let correlation = heads.correlation.map_or("–".to_owned(), |spread| with_error(spread, 3));
            let _ = writeln!(out, "<tr><td>{}<td>{}<td>{correlation}</tr>", heads.layer, with_error(heads.share, 3));
        }
        out.push_str("</table>\n");
    }
    (!bars.is_empty()).then_some(out)
}

struct Bar {
    /// From 0 to 1.
    value: f64,
    label: String,
    title: String,
}

/// Bars of shares, the highest at full height.
fn bar_chart(bars: &[Bar], width: usize, name: &str) -> String {
    const HEIGHT: usize = 160;
    let most = bars.iter().map(|bar| bar.value).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let mut out = svg_open(bars.len() * width + 60, HEIGHT + 2 * LINE, name);
    let _ = write!(out, "<text x=\"40\" y=\"13\" text-anchor=\"end\">{:.0}%</text>", 100.0 * most);
    for (index, bar) in bars.iter().enumerate() {
        let (x, height) = (48 + index * width, bar.value / most * (HEIGHT - LINE) as f64);
        let _ = write!(
            out,
            "<rect class=\"bar\" x=\"{x}\" y=\"{:.1}\" width=\"{}\" height=\"{height:.1}\"><title>{}</title></rect><text x=\"{x}\" y=\"{}\">{}</text>",
            HEIGHT as f64 - height,
            width - 2,
            escaped(&bar.title),
            HEIGHT + 14,
            bar.label
        );
    }
    let _ = write!(out, "<line x1=\"44\" x2=\"{}\" y1=\"{HEIGHT}\" y2=\"{HEIGHT}\"/>", 52 + bars.len() * width);
    out.push_str("</svg>\n");
    out
}

fn svg_open(width: usize, height: usize, name: &str) -> String {
    format!(
        "<svg class=\"picture\" role=\"img\" aria-label=\"{name}\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\">"
    )
}
