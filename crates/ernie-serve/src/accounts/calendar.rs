//! Days and months of UTC, as usage is kept by them.
use std::fmt;
use std::str::FromStr;

const SECONDS_PER_DAY: u64 = 86_400;

/// A day of UTC, as days since 1970-01-01.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Day(i64);

impl Day {
    /// The day of a time in Unix seconds.
    pub fn of(unix_seconds: u64) -> Self {
        Day((unix_seconds / SECONDS_PER_DAY) as i64)
    }

    /// So many days earlier.
    pub fn before(self, days: i64) -> Self {
        Day(self.0.saturating_sub(days))
    }

    /// The first day of its month.
    pub fn month_start(self) -> Self {
        let (_, _, day) = self.civil();
        Day(self.0 - i64::from(day) + 1)
    }

    /// The first day of the month after its own.
    pub fn next_month(self) -> Self {
        // No month has more than 31 days, and the first plus 31 is never two months on.
        Day(self.month_start().0 + 31).month_start()
    }

    /// Its first second, Unix; 0 for days before 1970.
    pub fn start(self) -> u64 {
        u64::try_from(self.0).unwrap_or(0).saturating_mul(SECONDS_PER_DAY)
    }

    /// Year, month, day of the Gregorian calendar (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms").
    fn civil(self) -> (i64, u32, u32) {
        let shifted = self.0 + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // From March on, so that the leap day is the last.
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        (year_of_era + era * 400 + i64::from(month <= 2), month as u32, day as u32)
    }

    fn from_civil(year: i64, month: u32, day: u32) -> Self {
        let year = year - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let shifted_month = i64::from(if month > 2 { month - 3 } else { month + 9 });
        let day_of_year = (153 * shifted_month + 2) / 5 + i64::from(day) - 1;
        Day(era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468)
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = self.civil();
        write!(f, "{year:04}-{month:02}-{day:02}")
    }
}

impl FromStr for Day {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("expected a day as YYYY-MM-DD, got {text:?}");
        let bytes = text.as_bytes();
        if bytes.len() != 10 || !bytes.iter().enumerate().all(|(i, b)| if i == 4 || i == 7 { *b == b'-' } else { b.is_ascii_digit() }) {
            return Err(refuse());
        }
        let number = |range: std::ops::Range<usize>| text[range].parse::<u32>().map_err(|_| refuse());
        let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
        let parsed = Day::from_civil(year.into(), month.clamp(1, 12), day);
        // What does not come back as it went in (month 13, day 31 of a short month) is no day.
        if year >= 1970 && parsed.to_string() == text { Ok(parsed) } else { Err(refuse()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_and_their_names() {
        for (seconds, name) in [(0, "1970-01-01"), (951_782_400, "2000-02-29"), (951_868_800, "2000-03-01"), (4_107_542_400, "2100-03-01")]
        {
            assert_eq!(Day::of(seconds).to_string(), name);
            assert_eq!((name.parse::<Day>().unwrap(), Day::of(seconds).start()), (Day::of(seconds), seconds));
        }
        for days in 0..60_000 {
            let day = Day(days);
            assert_eq!(day.to_string().parse::<Day>().unwrap(), day);
            assert!(day.month_start() <= day && day < day.next_month() && day.next_month().to_string().ends_with("-01"));
        }
        for text in ["", "2024-1-1", "2024-13-01", "2024-00-10", "2023-02-29", "2024-01-00", "1969-12-31", "2024-01-011", "２024-01-1"] {
            assert!(text.parse::<Day>().is_err(), "{text}");
        }
    }
}
