//! Learning-rate schedules: warmup-stable-decay, cosine and constant, each after a linear warmup.
//!
//! A schedule is a pure function of the update's number, so a resumed run needs no state for it. Updates count from 1, as
//! AdamW's bias correction does: the last warmup update runs at the peak, the last update of the run at the floor.
//!
//! Sources: warmup-stable-decay with the 1−√ decay is what the released ERNIE-4.5 pre-training configuration uses
//! (warmup 200, 2.2e-4 → 2.2e-5); the shape is studied in arXiv 2405.18392. Cosine: arXiv 1608.03983, one cycle.

use serde::{Deserialize, Serialize};

/// The `[schedule]` section of a recipe. A key that the chosen kind does not use is refused as unknown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum ScheduleConfig {
    /// Warmup, a stable phase at the peak, then a 1−√ decay over the last `decay_fraction` of the run.
    Wsd {
        /// Updates of linear warmup; 0 starts at the peak.
        #[serde(default = "default_warmup_steps")]
        warmup_steps: u64,
        /// Share of all updates spent in the decay, in [0, 1].
        #[serde(default = "default_decay_fraction")]
        decay_fraction: f64,
        /// Final learning rate as a share of the peak, in [0, 1].
        #[serde(default = "default_min_lr_ratio")]
        min_lr_ratio: f64,
    },
    /// Warmup, then half a cosine from the peak to the floor.
    Cosine {
        /// Updates of linear warmup; 0 starts at the peak.
        #[serde(default = "default_warmup_steps")]
        warmup_steps: u64,
        /// Final learning rate as a share of the peak, in [0, 1].
        #[serde(default = "default_min_lr_ratio")]
        min_lr_ratio: f64,
    },
    /// Warmup, then the peak to the end.
    Constant {
        /// Updates of linear warmup; 0 starts at the peak.
        #[serde(default = "default_warmup_steps")]
        warmup_steps: u64,
    },
}

fn default_warmup_steps() -> u64 {
    100
}
fn default_decay_fraction() -> f64 {
    0.2
}
fn default_min_lr_ratio() -> f64 {
    0.05
}

impl Default for ScheduleConfig {
    /// Warmup, stable phase, decay.
    fn default() -> Self {
        Self::Wsd { warmup_steps: default_warmup_steps(), decay_fraction: default_decay_fraction(), min_lr_ratio: default_min_lr_ratio() }
    }
}

impl ScheduleConfig {
    /// Updates of linear warmup.
    pub fn warmup_steps(&self) -> u64 {
        match *self {
            Self::Wsd { warmup_steps, .. } | Self::Cosine { warmup_steps, .. } | Self::Constant { warmup_steps } => warmup_steps,
        }
    }
}

impl ScheduleConfig {
    /// Multiplies the warmup by `factor` if that shortens it, rounding down.
    pub fn scale_warmup(&mut self, factor: f64) {
        let (Self::Wsd { warmup_steps, .. } | Self::Cosine { warmup_steps, .. } | Self::Constant { warmup_steps }) = self;
        *warmup_steps = (*warmup_steps as f64 * factor.min(1.0)) as u64;
    }
}

/// Why a schedule cannot run. Each message names the recipe's key and both numbers.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ScheduleError {
    /// A share lies outside [0, 1] or is not a number.
    #[error("schedule.{field} must lie between 0 and 1, got {got}")]
    NotAShare {
        /// Key in the `[schedule]` section.
        field: &'static str,
        /// The value read.
        got: f64,
    },
    /// The peak learning rate is not a positive number.
    #[error("the peak learning rate must be positive and finite, got {got}")]
    BadPeak {
        /// The value given.
        got: f64,
    },
    /// Warmup and decay together are longer than the run.
    #[error(
        "schedule.warmup_steps ({warmup}) and the decay ({decay} steps) do not fit in a run of {total} steps: \
         shorten one of them or train longer"
    )]
    TooLong {
        /// Warmup updates.
        warmup: u64,
        /// Decay updates.
        decay: u64,
        /// Updates in the whole run.
        total: u64,
    },
}

/// A checked schedule for one run.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    config: ScheduleConfig,
    peak: f64,
    total: u64,
}

impl Schedule {
    /// A schedule that peaks at `peak` and runs for `total` updates.
    ///
    /// # Errors
    /// [`ScheduleError`] when a share lies outside [0, 1], the peak is not positive, or warmup and decay do not fit in `total`.
    pub fn new(config: &ScheduleConfig, peak: f64, total: u64) -> Result<Self, ScheduleError> {
        if !(peak.is_finite() && peak > 0.0) {
            return Err(ScheduleError::BadPeak { got: peak });
        }
        let schedule = Self { config: config.clone(), peak, total };
        let shares = match *config {
            ScheduleConfig::Wsd { decay_fraction, min_lr_ratio, .. } => {
                vec![("decay_fraction", decay_fraction), ("min_lr_ratio", min_lr_ratio)]
            }
            ScheduleConfig::Cosine { min_lr_ratio, .. } => vec![("min_lr_ratio", min_lr_ratio)],
            ScheduleConfig::Constant { .. } => Vec::new(),
        };
        for (field, got) in shares {
            if !(0.0..=1.0).contains(&got) {
                return Err(ScheduleError::NotAShare { field, got });
            }
        }
        let (warmup, decay) = (config.warmup_steps(), schedule.decay_steps());
        if warmup.saturating_add(decay) > total {
            return Err(ScheduleError::TooLong { warmup, decay, total });
        }
        Ok(schedule)
    }

    /// Learning rate of update `step`, counted from 1. Past the end it stays at its last value; at 0 it is where warmup starts.
    pub fn lr(&self, step: u64) -> f64 {
        let warmup = self.config.warmup_steps();
        if step < warmup {
            return self.peak * step as f64 / warmup as f64;
        }
        match self.config {
            ScheduleConfig::Wsd { min_lr_ratio, .. } => {
                let decay = self.decay_steps();
                let start = self.total - decay;
                if step <= start {
                    return self.peak;
                }
                let progress = ((step - start) as f64 / decay.max(1) as f64).min(1.0);
                self.between(min_lr_ratio, 1.0 - progress.sqrt())
            }
            ScheduleConfig::Cosine { min_lr_ratio, .. } => {
                let span = (self.total - warmup).max(1) as f64;
                let progress = ((step - warmup) as f64 / span).min(1.0);
                self.between(min_lr_ratio, 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()))
            }
            ScheduleConfig::Constant { .. } => self.peak,
        }
    }

    /// Updates in the decay phase: all after warmup for cosine, none for constant.
    fn decay_steps(&self) -> u64 {
        match self.config {
            ScheduleConfig::Wsd { decay_fraction, .. } => (self.total as f64 * decay_fraction).round() as u64,
            ScheduleConfig::Cosine { warmup_steps, .. } => self.total.saturating_sub(warmup_steps),
            ScheduleConfig::Constant { .. } => 0,
        }
    }

    /// The floor at `height` 0, the peak at `height` 1.
    fn between(&self, min_lr_ratio: f64, height: f64) -> f64 {
        self.peak * (min_lr_ratio + (1.0 - min_lr_ratio) * height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wsd(warmup_steps: u64, decay_fraction: f64, min_lr_ratio: f64) -> ScheduleConfig {
        ScheduleConfig::Wsd { warmup_steps, decay_fraction, min_lr_ratio }
    }

    #[track_caller]
    fn close(got: f64, want: f64) {
        assert!((got - want).abs() <= 1e-15, "got {got}, want {want}");
    }

    #[test]
    fn wsd_corners_are_those_of_the_released_run() {
        let s = Schedule::new(&wsd(200, 0.2, 0.1), 2.2e-4, 1000).unwrap();
        close(s.lr(0), 0.0);
        close(s.lr(1), 2.2e-4 / 200.0);
        close(s.lr(100), 1.1e-4);
        close(s.lr(200), 2.2e-4);
        close(s.lr(201), 2.2e-4);
        close(s.lr(800), 2.2e-4);
        // A quarter of the way through the decay, 1−√ has lost one half of the height.
        close(s.lr(850), 2.2e-4 * (0.1 + 0.9 * 0.5));
        assert!(s.lr(801) < s.lr(800));
        close(s.lr(1000), 2.2e-5);
        close(s.lr(5000), 2.2e-5);
    }

    #[test]
    fn cosine_corners() {
        let config = ScheduleConfig::Cosine { warmup_steps: 10, min_lr_ratio: 0.2 };
        let s = Schedule::new(&config, 1.0, 110).unwrap();
        close(s.lr(5), 0.5);
        close(s.lr(10), 1.0);
        close(s.lr(60), 0.6);
        close(s.lr(110), 0.2);
        close(s.lr(111), 0.2);
    }

    #[test]
    fn constant_keeps_its_peak_and_no_warmup_starts_there() {
        let s = Schedule::new(&ScheduleConfig::Constant { warmup_steps: 0 }, 3e-4, 10).unwrap();
        for step in [0, 1, 10, 99] {
            close(s.lr(step), 3e-4);
        }
    }

    #[test]
    fn a_run_that_is_all_decay_and_one_without_any() {
        let s = Schedule::new(&wsd(0, 1.0, 0.0), 1.0, 4).unwrap();
        close(s.lr(1), 0.5);
        close(s.lr(4), 0.0);
        let s = Schedule::new(&wsd(0, 0.0, 0.0), 1.0, 4).unwrap();
        close(s.lr(4), 1.0);
    }

    #[test]
    fn the_rate_never_jumps_up_after_warmup() {
        for config in [wsd(7, 0.33, 0.05), ScheduleConfig::Cosine { warmup_steps: 7, min_lr_ratio: 0.05 }] {
            let s = Schedule::new(&config, 1.0, 101).unwrap();
            for step in 1..=7 {
                assert!(s.lr(step) > s.lr(step - 1));
            }
            for step in 8..=120 {
                assert!(s.lr(step) <= s.lr(step - 1), "{config:?} at {step}");
            }
            close(s.lr(101), 0.05);
        }
    }

    #[test]
    fn bad_numbers_are_refused_by_name() {
        let error = |config: &ScheduleConfig, peak, total| Schedule::new(config, peak, total).unwrap_err().to_string();
        assert!(error(&wsd(0, 1.5, 0.1), 1.0, 10).contains("decay_fraction"));
        assert!(error(&wsd(0, 0.5, -0.1), 1.0, 10).contains("min_lr_ratio"));
        assert!(error(&wsd(0, f64::NAN, 0.1), 1.0, 10).contains("decay_fraction"));
        assert!(error(&wsd(0, 0.5, 0.1), 0.0, 10).contains("peak"));
        let long = error(&wsd(600, 0.5, 0.1), 1.0, 1000);
        assert!(long.contains("600") && long.contains("500") && long.contains("1000"), "{long}");
        assert!(error(&ScheduleConfig::Constant { warmup_steps: 11 }, 1.0, 10).contains("11"));
    }

    #[test]
    fn the_recipe_section_is_read_and_unknown_or_foreign_keys_are_refused() {
        let read = |text: &str| toml::from_str::<ScheduleConfig>(text).map_err(|e| e.to_string());
        let text = "kind = \"wsd\"\nwarmup_steps = 3\ndecay_fraction = 0.2\nmin_lr_ratio = 0.1\n";
        assert_eq!(read(text).unwrap(), wsd(3, 0.2, 0.1));
        assert!(read(&format!("{text}warmup = 3\n")).unwrap_err().contains("warmup"));
        let foreign = read("kind = \"constant\"\nwarmup_steps = 3\nmin_lr_ratio = 0.1\n").unwrap_err();
        assert!(foreign.contains("min_lr_ratio"), "{foreign}");
        assert!(read("kind = \"linear\"\nwarmup_steps = 3\n").unwrap_err().contains("linear"));
    }
}
