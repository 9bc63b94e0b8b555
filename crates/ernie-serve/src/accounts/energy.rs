//! The power that is put down to requests: the processor's own counters where they can be read, else a number from the configuration.
//!
//! A request is put down for power × its share of the engine's time. Measured power is that of the whole processor package while it serves, other
//! programs included; the modelled one is a guess at the same.
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Where Linux shows RAPL, the running average power limit counters of processors.
const POWERCAP: &str = "/sys/class/powercap";
/// How often counters are read.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// Where joules come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The processor's counters.
    Measured,
    /// The configuration.
    Modelled,
}

impl Source {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Source::Measured => "measured",
            Source::Modelled => "modelled",
        }
    }
}

/// The power of now.
#[derive(Debug)]
pub struct Power {
    /// Where it comes from.
    pub source: Source,
    milliwatts: AtomicU64,
}

impl Power {
    /// With the counters of this machine, if they can be read; else so many watts. The counters are to be read by [`Counters::watch`].
    pub fn new(modelled_watts: f64) -> (Self, Option<Counters>) {
        let counters = Counters::find(Path::new(POWERCAP));
        let source = if counters.is_some() { Source::Measured } else { Source::Modelled };
        // Until the first reading the model has to do.
        (Power { source, milliwatts: AtomicU64::new((modelled_watts * 1e3) as u64) }, counters)
    }

    /// Nanojoules in a time.
    pub fn nanojoules(&self, time: Duration) -> u64 {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // mW × ns = pJ.
        nanoseconds.saturating_mul(self.milliwatts.load(Ordering::Relaxed)) / 1000
    }
}

/// The counters of each processor package.
#[derive(Debug)]
pub struct Counters {
    packages: Vec<Package>,
    read: Instant,
}

#[derive(Debug)]
struct Package {
    file: PathBuf,
    /// Where it starts over.
    range: u64,
    last: u64,
}

fn number(file: &Path) -> Option<u64> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

impl Counters {
    /// Those below a folder; `None` if there is none that can be read.
    fn find(folder: &Path) -> Option<Self> {
        let package = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry.ok()?;
            // `intel-rapl:0` is a package (AMD's too), `intel-rapl:0:1` a part of it.
            let number_of = entry.file_name().to_str()?.strip_prefix("intel-rapl:")?.to_owned();
            number_of.parse::<u32>().ok()?;
            let file = entry.path().join("energy_uj");
            let (last, range) = (number(&file)?, number(&entry.path().join("max_energy_range_uj"))?);
            Some(Package { file, range, last })
        };
        let packages: Vec<Package> = std::fs::read_dir(folder).ok()?.filter_map(package).collect();
        (!packages.is_empty()).then(|| Counters { packages, read: Instant::now() })
    }

    /// Microjoules since the last time.
    fn advance(&mut self) -> Option<u64> {
        let mut sum: u64 = 0;
        for package in &mut self.packages {
            let now = number(&package.file)?;
            // It starts over about once an hour.
            let used = now.checked_sub(package.last).unwrap_or_else(|| now.saturating_add(package.range.saturating_sub(package.last)));
            sum = sum.saturating_add(used);
            package.last = now;
        }
        Some(sum)
    }

    /// Brings the power up to date.
    pub fn watch(&mut self, power: &Power) {
        let seconds = self.read.elapsed().as_secs_f64();
        self.read = Instant::now();
        // Counters that can no longer be read leave the last power.
        if let Some(microjoules) = self.advance() {
            power.milliwatts.store((microjoules as f64 / 1e3 / seconds.max(1e-3)) as u64, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_added_up_and_start_over() {
        let folder = tempfile::tempdir().unwrap();
        let write = |package: &str, file: &str, text: &str| {
            std::fs::create_dir_all(folder.path().join(package)).unwrap();
            std::fs::write(folder.path().join(package).join(file), text).unwrap();
        };
        assert!(Counters::find(folder.path()).is_none() && Counters::find(Path::new("nowhere")).is_none());
        for package in ["intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "dtpm"] {
            write(package, "energy_uj", "900\n");
            write(package, "max_energy_range_uj", "1000\n");
        }
        let mut counters = Counters::find(folder.path()).unwrap();
        write("intel-rapl:0", "energy_uj", "950\n");
        write("intel-rapl:1", "energy_uj", "20\n");
        write("intel-rapl:0:0", "energy_uj", "999\n");
        assert_eq!(counters.advance(), Some(50 + 120));
        write("intel-rapl:0", "energy_uj", "no number");
        assert_eq!(counters.advance(), None);
    }

    #[test]
    fn watts_times_seconds() {
        let power = Power { source: Source::Modelled, milliwatts: AtomicU64::new(65_000) };
        assert_eq!(power.nanojoules(Duration::from_millis(2)), 130_000_000);
    }
}
