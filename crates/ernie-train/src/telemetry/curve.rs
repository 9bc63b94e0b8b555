//! The loss curve as an SVG file: training loss raw and smoothed, validation loss per source.
//!
//! Steps run on a linear axis, because warmup, stable phase and decay are counted in steps; loss on a logarithmic one, because
//! the first updates would otherwise take most of the height and the late gains would not be seen. The paper is white and the
//! ink dark whatever the viewer's theme, so the picture reads the same in both.

use std::ops::Range;
use std::path::PathBuf;

use plotters::coord::combinators::{BindKeyPoints, IntoLogRange};
use plotters::prelude::*;

use super::TelemetryError;

const SIZE: (u32, u32) = (960, 540);
const INK: RGBColor = RGBColor(38, 38, 38);
const GRID: RGBColor = RGBColor(222, 222, 222);
const RAW: RGBColor = RGBColor(168, 196, 224);
const SMOOTH: RGBColor = RGBColor(0, 90, 160);
/// Colours of the validation sources, told apart with colour-blind eyes too (Okabe and Ito); used in turn.
const SOURCES: [RGBColor; 6] = [
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];
/// The raw line keeps the lowest and highest loss of this many stretches of the run, so that the file stays small.
const STRETCHES: usize = 500;

/// What is drawn, and where to.
pub(super) struct Curve {
    path: PathBuf,
    title: String,
    train: Vec<(u64, f64)>,
    validation: Vec<(String, Vec<(u64, f64)>)>,
}

impl Curve {
    pub(super) fn new(path: PathBuf, title: String) -> Self {
        Self { path, title, train: Vec::new(), validation: Vec::new() }
    }

    /// A loss that has no place on a logarithmic axis (zero, negative, not finite) is left out.
    pub(super) fn train(&mut self, step: u64, loss: f64) {
        if drawable(loss) {
            self.train.push((step, loss));
        }
    }

    pub(super) fn validation(&mut self, step: u64, source: &str, loss: f64) {
        if !drawable(loss) {
            return;
        }
        let at = self.validation.iter().position(|(name, _)| name == source);
        let at = at.unwrap_or_else(|| {
            self.validation.push((source.to_string(), Vec::new()));
            self.validation.len() - 1
        });
        self.validation[at].1.push((step, loss));
    }

    /// Writes the SVG atomically; does nothing while there is nothing to draw.
    pub(super) fn write(&self) -> Result<(), TelemetryError> {
        let Some(svg) = self.svg()? else {
            return Ok(());
        };
        Ok(ernie_checkpoint::atomic_write(&self.path, svg.as_bytes())?)
    }

    fn svg(&self) -> Result<Option<String>, TelemetryError> {
        let Some((steps, losses)) = self.ranges() else {
            return Ok(None);
        };
        let mut svg = String::new();
        self.draw(&mut svg, steps, losses).map_err(|e| TelemetryError::Curve { path: self.path.clone(), reason: e.to_string() })?;
        Ok(Some(svg))
    }

    /// The axes' ranges, a little wider than the data; `None` without data.
    fn ranges(&self) -> Option<(Range<f64>, Range<f64>)> {
        let validation = self.validation.iter().flat_map(|(_, points)| points);
        let points = || self.train.iter().chain(validation.clone());
        let last_step = points().map(|&(step, _)| step).max()?;
        let lowest = points().map(|&(_, loss)| loss).fold(f64::INFINITY, f64::min);
        let highest = points().map(|&(_, loss)| loss).fold(0.0, f64::max);
        Some((0.0..last_step.max(1) as f64 * 1.02, lowest * 0.95..highest * 1.05))
    }

    fn draw(&self, svg: &mut String, steps: Range<f64>, losses: Range<f64>) -> Result<(), Box<dyn std::error::Error>> {
        let text = |size: i32| ("sans-serif", size).into_font().color(&INK);
        let ticks = loss_ticks(&losses);
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(&self.title, text(22))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(60)
            .build_cartesian_2d(steps, losses.log_scale().with_key_points(ticks))?;
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .axis_style(INK)
            .label_style(text(14))
            .axis_desc_style(text(15))
            .x_desc("step")
            .y_desc("loss (nats per token, log scale)")
            .x_label_formatter(&|step| format!("{step:.0}"))
            .y_label_formatter(&|loss| shortest(loss))
            .draw()?;

        let floats = |points: &[(u64, f64)]| -> Vec<(f64, f64)> { points.iter().map(|&(step, loss)| (step as f64, loss)).collect() };
        let sample = |colour: RGBColor| move |(x, y): (i32, i32)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2));
        if !self.train.is_empty() {
            chart.draw_series(LineSeries::new(floats(&envelope(&self.train)), RAW))?.label("train").legend(sample(RAW));
            let smooth = envelope(&smoothed(&self.train));
            chart.draw_series(LineSeries::new(floats(&smooth), SMOOTH.stroke_width(2)))?.label("train, smoothed").legend(sample(SMOOTH));
        }
        for ((source, points), colour) in self.validation.iter().zip(SOURCES.iter().cycle()) {
            let points = floats(points);
            chart.draw_series(LineSeries::new(points.clone(), colour))?;
            chart
                .draw_series(points.iter().map(|&at| Circle::new(at, 3, colour.filled())))?
                .label(format!("validation: {source}"))
                .legend(sample(*colour));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(GRID)
            .label_font(text(14))
            .draw()?;
        root.present()?;
        Ok(())
    }
}

fn drawable(loss: f64) -> bool {
    loss.is_finite() && loss > 0.0
}

/// Moving average over about a fiftieth of the run, centred so that it does not lag behind the steep start: there the window
/// narrows on both sides, at the end only on the right.
fn smoothed(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let half = points.len() / 100;
    let mut sums = vec![0.0];
    for (_, loss) in points {
        sums.push(sums[sums.len() - 1] + loss);
    }
    let window = |(i, &(step, _)): (usize, &(u64, f64))| {
        let left = half.min(i);
        let right = half.min(i).min(points.len() - 1 - i);
        let sum = sums[i + right + 1] - sums[i - left];
        (step, sum / (left + right + 1) as f64)
    };
    points.iter().enumerate().map(window).collect()
}

/// At most `2 * STRETCHES` points of a series: of each stretch its lowest and its highest, in order of time.
fn envelope(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    if points.len() <= 2 * STRETCHES {
        return points.to_vec();
    }
    let by_loss = |a: &&(u64, f64), b: &&(u64, f64)| a.1.total_cmp(&b.1);
    let mut kept = Vec::with_capacity(2 * STRETCHES);
    for stretch in points.chunks(points.len().div_ceil(STRETCHES)) {
        let low = *stretch.iter().min_by(by_loss).expect("chunks are not empty");
        let high = *stretch.iter().max_by(by_loss).expect("chunks are not empty");
        let (first, second) = if low.0 <= high.0 { (low, high) } else { (high, low) };
        kept.push(first);
        if second != first {
            kept.push(second);
        }
    }
    kept
}

/// Round losses inside the range: the coarsest of three series that gives at least four, else the finest.
fn loss_ticks(range: &Range<f64>) -> Vec<f64> {
    let series: [&[f64]; 3] = [
        &[1.0],
        &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
        &[
            1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.2, 2.4, 2.6, 2.8, 3.0, 3.25, 3.5, 3.75, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5,
            7.0, 7.5, 8.0, 8.5, 9.0, 9.5,
        ],
    ];
    let decades = range.start.log10().floor() as i32..=range.end.log10().ceil() as i32;
    let mut ticks = Vec::new();
    for mantissas in series {
        ticks = decades
            .clone()
            .flat_map(|decade| mantissas.iter().map(move |m| m * 10f64.powi(decade)))
            .filter(|tick| range.contains(tick))
            .collect();
        if ticks.len() >= 4 {
            break;
        }
    }
    ticks
}

/// A tick's number without the digits that binary fractions add.
fn shortest(value: &f64) -> String {
    let rounded: f64 = format!("{value:.6e}").parse().unwrap_or(*value);
    rounded.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(steps: u64) -> Curve {
        let mut curve = Curve::new(PathBuf::from("loss.svg"), "nano".to_string());
        for step in 1..=steps {
            curve.train(step, 2.0 + 7.0 / step as f64);
            if step.is_multiple_of(100) {
                curve.validation(step, "stories", 2.5);
                curve.validation(step, "poems & <songs>", 4.0);
            }
        }
        curve
    }

    #[test]
    fn the_picture_names_its_series_and_escapes_them() {
        let svg = curve(300).svg().unwrap().unwrap();
        for word in ["nano", "train, smoothed", "validation: stories", "&lt;songs&gt;", "step", "nats"] {
            assert!(svg.contains(word), "{word} is not in the picture");
        }
        assert!(!svg.contains("<songs>"));
        // Three points of validation for each of the two sources.
        assert_eq!(svg.matches("<circle").count(), 6);
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn nothing_to_draw_writes_nothing_and_odd_losses_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let mut curve = curve(0);
        curve.path = dir.path().join("loss.svg");
        curve.train(1, f64::NAN);
        curve.train(2, 0.0);
        curve.write().unwrap();
        assert!(!curve.path.exists());
        curve.train(3, 1.0);
        curve.write().unwrap();
        assert!(curve.path.exists());
    }

    #[test]
    fn a_long_run_keeps_its_extremes_and_a_bounded_size() {
        let mut points: Vec<(u64, f64)> = (1..=100_000).map(|step| (step, 3.0)).collect();
        points[54_321].1 = 50.0;
        points[54_322].1 = 0.5;
        let kept = envelope(&points);
        assert!(kept.len() <= 2 * STRETCHES);
        assert!(kept.contains(&points[54_321]) && kept.contains(&points[54_322]));
        assert!(kept.is_sorted_by_key(|&(step, _)| step));
    }

    #[test]
    fn smoothing_follows_a_line_and_flattens_noise() {
        let line: Vec<(u64, f64)> = (0..500).map(|step| (step, 9.0 - 0.01 * step as f64)).collect();
        for (smooth, raw) in smoothed(&line).iter().zip(&line) {
            let lag = if raw.0 < 495 { 1e-9 } else { 0.03 };
            assert!((smooth.1 - raw.1).abs() <= lag, "{smooth:?} {raw:?}");
        }
        let noisy: Vec<(u64, f64)> = (0..500).map(|step| (step, if step % 2 == 0 { 2.0 } else { 4.0 })).collect();
        assert!(smoothed(&noisy)[5..].iter().all(|(_, loss)| (loss - 3.0).abs() < 0.25));
        assert_eq!(smoothed(&line[..1]), line[..1]);
        assert_eq!(smoothed(&[]), []);
    }

    #[test]
    fn ticks_are_round_and_at_least_four_for_usual_ranges() {
        assert_eq!(loss_ticks(&(1.9..9.4)), [2.0, 3.0, 4.0, 5.0, 6.0, 8.0]);
        assert_eq!(loss_ticks(&(0.001..20.0)).len(), 5);
        assert!(loss_ticks(&(2.0..2.9)).len() >= 4);
        assert_eq!([0.1 + 0.2, 2.0, 10.0].map(|v| shortest(&v)), ["0.3", "2", "10"]);
    }
}
