//! Days and months of UTC, as usage is kept by them.
use std::fmt;
use std::str::FromStr;

use time::{Date, Month, OffsetDateTime, SignedDuration};

/// A day of UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Day(Date);

impl Day {
    /// The day of a time in Unix seconds; the last of the year 9999 for any after it.
    pub fn of(unix_seconds: u64) -> Self {
        let time = i64::try_from(unix_seconds).ok().and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
        Day(time.map_or(Date::MAX, OffsetDateTime::date))
    }

    /// So many days earlier.
    pub fn before(self, days: u32) -> Self {
        Day(self.0.saturating_sub(SignedDuration::days(days.into())))
    }

    /// The first day of its month.
    pub fn month_start(self) -> Self {
        Day(self.0.replace_day(1).expect("every month has a first day"))
    }

    /// The first day of the month after its own.
    pub fn next_month(self) -> Self {
        // No month has more than 31 days, and the first plus 31 is never two months on.
        Day(self.month_start().0.saturating_add(SignedDuration::days(31))).month_start()
    }

    /// Its first second, Unix; 0 for days before 1970.
    pub fn start(self) -> u64 {
        u64::try_from(self.0.midnight().assume_utc().unix_timestamp()).unwrap_or(0)
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
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
        let number = |range: std::ops::Range<usize>| text[range].parse::<u16>().map_err(|_| refuse());
        let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
        let month = Month::try_from(month as u8).map_err(|_| refuse())?;
        let date = Date::from_calendar_date(year.into(), month, day as u8).map_err(|_| refuse())?;
        if year >= 1970 { Ok(Day(date)) } else { Err(refuse()) }
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
            let day = Day::of(days * 86_400 + 86_399);
            assert_eq!(day.start(), days * 86_400);
            assert_eq!(day.to_string().parse::<Day>().unwrap(), day);
            assert!(day.month_start() <= day && day < day.next_month() && day.next_month().to_string().ends_with("-01"));
        }
        assert_eq!(Day::of(951_868_800).before(29).to_string(), "2000-02-01");
        for text in ["", "2024-1-1", "2024-13-01", "2024-00-10", "2023-02-29", "2024-01-00", "1969-12-31", "2024-01-011", "２024-01-1"] {
            assert!(text.parse::<Day>().is_err(), "{text}");
        }
    }
}
