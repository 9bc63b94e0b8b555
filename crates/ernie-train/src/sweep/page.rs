//! The report as one HTML page: tables and curves, nothing from elsewhere.
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;

use plotters::prelude::*;

use super::Figure;
use super::pictures;
use super::report::{ArmReport, RunReport, Spread, SweepReport};
use crate::telemetry::Validation;

const SIZE: (u32, u32) = (760, 420);
const INK: RGBColor = RGBColor(38, 38, 38);
const GRID: RGBColor = RGBColor(222, 222, 222);
/// Colours of the arms (Okabe and Ito), used in turn.
const ARMS: [RGBColor; 6] = [
    RGBColor(0, 90, 160),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(90, 90, 90),
];

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}\
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .75rem;border-bottom:1px solid #ddd;text-align:right}\
th:first-child,td:first-child,.text{text-align:left}pre{margin:0;white-space:pre-wrap}figure{margin:1.5rem 0}svg,img{max-width:100%;height:auto}\
.picture{font:13px system-ui,sans-serif;margin:.5rem 1rem .5rem 0}.picture text{fill:currentColor}.picture line{stroke:currentColor}\
.cell,.bar{fill:#005aa0}.cell{stroke:#ccc}\
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}th,td{border-color:#444}.cell,.bar{fill:#6cb6ff}.cell{stroke:#444}}";

pub(super) fn html(report: &SweepReport, figures: &[Figure]) -> String {
    let title = escaped(&report.name);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style>\n<h1>{title}</h1>\n"
    );
    let _ = writeln!(
        page,
        "<p>{} of {} runs are finished. Losses are nats per token on validation documents; ± is one standard error over the seeds, \
        differences are taken seed by seed. Curves are means of the seeds, with a bar of one standard error to both sides at each validation.</p>",
        report.runs.len(),
        report.planned
    );
    page.push_str(&arms_table(report));
    for (caption, x) in [("By step", Axis::Steps), ("By time of training", Axis::Seconds)] {
        if let Some(svg) = curves(report, x) {
            let _ = writeln!(page, "<figure><figcaption>{caption}</figcaption>{svg}</figure>");
        }
    }
    page.push_str(&sources_table(report));
    page.push_str(&pictures::pictures(report));
    for figure in figures {
        // As an image, so that its styles are its own.
        let caption = escaped(&figure.caption);
        let _ =
            writeln!(page, "<figure><figcaption>{caption}</figcaption><img alt=\"{caption}\" src=\"{}\"></figure>", data_url(&figure.svg));
    }
    page.push_str(&made_with(report));
    page.push_str("</html>\n");
    page
}

/// What each arm sets, the recipe below them, and the programs and machines of the runs.
fn made_with(report: &SweepReport) -> String {
    let mut out = String::from("<h2>Made with</h2>\n<table><tr><th>arm<th class=\"text\">sets</tr>\n");
    for arm in &report.arms {
        let set = if arm.set.is_empty() { "nothing: the recipe as it is".to_owned() } else { toml_text(&arm.set) };
        let _ = writeln!(out, "<tr><td>{}<td class=\"text\"><pre>{}</pre></tr>", escaped(&arm.name), escaped(set.trim_end()));
    }
    out.push_str("</table>\n<ul>\n");
    // Runs by program, threads and processor; usually all are alike.
    let mut origins: BTreeMap<String, (usize, &str, &str)> = BTreeMap::new();
    for origin in report.runs.iter().filter_map(|run| run.report.origin.as_ref()) {
        let processor = origin.processor.as_deref().unwrap_or("a processor without a name");
        let place = format!("{}, {} threads, {processor}", origin.program, origin.threads);
        let (runs, first, last) = origins.entry(place).or_insert((0, origin.date.as_str(), origin.date.as_str()));
        (*runs, *first, *last) = (*runs + 1, (*first).min(origin.date.as_str()), (*last).max(origin.date.as_str()));
    }
    for (place, (runs, first, last)) in &origins {
        let days = if first == last { (*first).to_owned() } else { format!("{first} to {last}") };
        let _ = writeln!(out, "<li>{runs} runs: {}, {days}</li>", escaped(place));
    }
    let silent = report.runs.iter().filter(|run| run.report.origin.is_none()).count();
    if silent > 0 {
        let _ = writeln!(out, "<li>{silent} runs: by an earlier program, which did not say</li>");
    }
    let _ = writeln!(out, "</ul>\n<details><summary>The recipe</summary><pre>{}</pre></details>", escaped(&toml_text(&report.recipe)));
    out
}

fn toml_text(table: &toml::Table) -> String {
    toml::to_string(table).expect("a table that was read can be written")
}

/// An SVG document as the address of an image.
fn data_url(svg: &str) -> String {
    let mut url = String::from("data:image/svg+xml;charset=utf-8,");
    for c in svg.chars() {
        match c {
            '%' | '#' | '"' | '<' | '>' | '&' | '\'' | '\n' => {
                let _ = write!(url, "%{:02X}", u32::from(c));
            }
            _ => url.push(c),
        }
    }
    url
}

fn arms_table(report: &SweepReport) -> String {
    let mut out = String::from(
        "<table><tr><th>arm<th>loss<th>difference<th>in standard errors<th>steps to the same loss<th>time to the same loss<th>tok/s<th>minutes</tr>\n",
    );
    for arm in &report.arms {
        let against = arm.against_first.as_ref();
        let difference = against.map(|against| against.loss_difference);
        let ratio = |spread: Option<Spread>| spread.map_or("–".to_owned(), |s| with_error(s, 2));
        let _ = writeln!(
            out,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}</tr>",
            escaped(&arm.name),
            arm.loss.map_or("–".to_owned(), |s| with_error(s, 4)),
            difference.map_or("–".to_owned(), |s| with_error(s, 4)),
            difference.and_then(|s| s.significance()).map_or("–".to_owned(), |s| format!("{s:+.1}")),
            ratio(against.and_then(|against| against.steps_to_same_loss)),
            ratio(against.and_then(|against| against.seconds_to_same_loss)),
            arm.tokens_per_second.map_or("–".to_owned(), |s| with_error(s, 0)),
            arm.seconds.map_or("–".to_owned(), |s| format!("{:.1}", s.mean / 60.0)),
        );
    }
    out.push_str("</table>\n");
    out
}

fn sources_table(report: &SweepReport) -> String {
    let mut out = String::from("<h2>By source</h2>\n<table><tr><th>source");
    for arm in &report.arms {
        let _ = write!(out, "<th>{}", escaped(&arm.name));
    }
    out.push_str("</tr>\n");
    let Some(first) = report.arms.first() else { return String::new() };
    let cell = |arm: &ArmReport, source: &str| {
        arm.sources.iter().find(|(name, _)| name == source).map_or("–".to_owned(), |(_, spread)| with_error(*spread, 4))
    };
    for (source, _) in &first.sources {
        let _ = write!(out, "<tr><td>{}", escaped(source));
        for arm in &report.arms {
            let _ = write!(out, "<td>{}", cell(arm, source));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table>\n");
    out
}

#[derive(Clone, Copy)]
enum Axis {
    Steps,
    Seconds,
}

/// A validation of an arm: the mean of its seeds.
struct Point {
    x: f64,
    loss: Spread,
}

/// The validations of an arm that all its finished runs have.
fn mean_curve(report: &SweepReport, arm: usize, axis: Axis) -> Vec<Point> {
    let runs: Vec<&RunReport> = report.runs.iter().filter(|run| run.arm == arm).collect();
    let Some(first) = runs.first() else { return Vec::new() };
    let mean = |values: &[f64]| Spread::of(values).filter(|spread| spread.mean.is_finite() && spread.runs == runs.len());
    let point = |step: u64| {
        let of_seeds: Vec<&Validation> = runs.iter().filter_map(|run| run.curve.iter().find(|point| point.step == step)).collect();
        let minutes: Vec<f64> = of_seeds.iter().map(|point| point.seconds / 60.0).collect();
        let x = match axis {
            Axis::Steps => step as f64,
            Axis::Seconds => mean(&minutes)?.mean,
        };
        Some(Point { x, loss: mean(&of_seeds.iter().map(|point| point.mean()).collect::<Vec<_>>())? })
    };
    first.curve.iter().filter_map(|validation| point(validation.step)).collect()
}

/// Mean validation loss of every arm in its colour, with bars of one standard error to both sides.
fn curves(report: &SweepReport, axis: Axis) -> Option<String> {
    let series: Vec<Vec<Point>> = (0..report.arms.len()).map(|arm| mean_curve(report, arm, axis)).collect();
    let points = || series.iter().flatten();
    let most = points().map(|point| point.x).fold(0.0, f64::max);
    let (low, high) =
        points().map(|point| bounds(point.loss)).fold((f64::INFINITY, 0.0f64), |(low, high), (l, h)| (low.min(l), high.max(h)));
    if !(most > 0.0 && low < high) {
        return None;
    }
    let mut svg = String::new();
    let margin = 0.05 * (high - low);
    // A curve that cannot be drawn leaves the tables.
    draw(&mut svg, report, &series, axis, 0.0..most * 1.02, low - margin..high + margin).ok()?;
    Some(svg)
}

/// One standard error below the mean and one above.
fn bounds(loss: Spread) -> (f64, f64) {
    let error = loss.standard_error.unwrap_or(0.0);
    (loss.mean - error, loss.mean + error)
}

fn draw(
    svg: &mut String,
    report: &SweepReport,
    series: &[Vec<Point>],
    axis: Axis,
    x: Range<f64>,
    y: Range<f64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let text = |size: i32| ("sans-serif", size).into_font().color(&INK);
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root).margin(12).x_label_area_size(44).y_label_area_size(60).build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(INK)
        .label_style(text(13))
        .axis_desc_style(text(14))
        .x_desc(match axis {
            Axis::Steps => "step",
            Axis::Seconds => "minutes of training",
        })
        .y_desc("validation loss, mean of the sources")
        .draw()?;
    for (index, (arm, points)) in report.arms.iter().zip(series).enumerate().filter(|(_, (_, points))| !points.is_empty()) {
        let colour = ARMS[index % ARMS.len()];
        let line = chart.draw_series(LineSeries::new(points.iter().map(|point| (point.x, point.loss.mean)), colour.stroke_width(2)))?;
        line.label(&arm.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        let bar = |point: &Point| {
            let (low, high) = bounds(point.loss);
            PathElement::new([(point.x, low), (point.x, high)], colour.mix(0.5).stroke_width(5))
        };
        chart.draw_series(points.iter().filter(|point| point.loss.standard_error.is_some()).map(bar))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(GRID)
        .label_font(text(13))
        .draw()?;
    root.present()?;
    Ok(())
}

pub(super) fn with_error(spread: Spread, decimals: usize) -> String {
    match spread.standard_error {
        Some(error) => format!("{:.decimals$} ± {error:.decimals$}", spread.mean),
        None => format!("{:.decimals$}", spread.mean),
    }
}

pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::tests::{report, run};

    #[test]
    fn curves_are_means_of_the_seeds_with_their_errors() {
        let mut runs = vec![run(0, 1, &[4.0, 3.0]), run(0, 2, &[5.0, 3.5]), run(1, 1, &[4.0, 2.5])];
        runs[1].curve.iter_mut().for_each(|point| point.seconds *= 2.0);
        let report = report(&runs);
        let of = |arm: usize, axis| mean_curve(&report, arm, axis).iter().map(|point| (point.x, point.loss)).collect::<Vec<_>>();
        let spread = |mean: f64, standard_error| Spread { mean, standard_error, runs: if standard_error.is_some() { 2 } else { 1 } };
        assert_eq!(of(0, Axis::Steps), [(10.0, spread(4.5, Some(0.5))), (20.0, spread(3.25, Some(0.25)))]);
        // 20 and 40 seconds, then 40 and 80.
        assert_eq!(of(0, Axis::Seconds).iter().map(|(x, _)| *x).collect::<Vec<_>>(), [0.5, 1.0]);
        assert_eq!(of(1, Axis::Steps), [(10.0, spread(4.0, None)), (20.0, spread(2.5, None))]);
        let svg = curves(&report, Axis::Steps).unwrap();
        // Two bars of the arm with two seeds, none of the other, which has just its line.
        assert_eq!(svg.matches("stroke-width=\"5\"").count(), 2, "{svg}");
        assert_eq!(bounds(spread(4.5, Some(0.5))), (4.0, 5.0));
    }

    #[test]
    fn a_validation_that_a_seed_lacks_is_no_point() {
        let runs = [run(0, 1, &[4.0, 3.0]), run(0, 2, &[5.0])];
        assert_eq!(mean_curve(&report(&runs), 0, Axis::Steps).len(), 1);
        let one = [run(0, 1, &[4.0, f64::NAN, 3.0])];
        assert_eq!(mean_curve(&report(&one), 0, Axis::Steps).len(), 2);
    }
}
