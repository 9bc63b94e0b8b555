//! Whole numbers in bodies. JSON Schema, and with it the description, knows no difference between `15` and `15.0`; the types of this language do.
use std::any::type_name;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

/// Beyond it a number with a fraction may mean another one.
const EXACT: f64 = (1_u64 << 53) as f64;

struct Whole<T>(T);

impl<'de, T: TryFrom<i128>> Deserialize<'de> for Whole<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader(PhantomData))
    }
}

struct Reader<T>(PhantomData<T>);

impl<T: TryFrom<i128>> Visitor<'_> for Reader<T> {
    type Value = Whole<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(type_name::<T>())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Whole<T>, E> {
        T::try_from(number.into()).map(Whole).map_err(|_| E::invalid_value(Unexpected::Unsigned(number), &self))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Whole<T>, E> {
        T::try_from(number.into()).map(Whole).map_err(|_| E::invalid_value(Unexpected::Signed(number), &self))
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Whole<T>, E> {
        if number.fract() != 0.0 || number.abs() > EXACT {
            return Err(E::invalid_type(Unexpected::Float(number), &self));
        }
        T::try_from(number as i128).map(Whole).map_err(|_| E::invalid_value(Unexpected::Float(number), &self))
    }
}

/// A whole number or null.
pub fn whole<'de, T: TryFrom<i128>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    Ok(Option::<Whole<T>>::deserialize(deserializer)?.map(|number| number.0))
}

/// A whole number or null, of a field that is there.
pub fn given_whole<'de, T: TryFrom<i128>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<T>>, D::Error> {
    whole(deserializer).map(Some)
}

/// A list of whole numbers.
pub fn wholes<'de, T: TryFrom<i128>, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    Ok(Vec::<Whole<T>>::deserialize(deserializer)?.into_iter().map(|number| number.0).collect())
}

/// A list of whole numbers or null.
pub fn some_wholes<'de, T: TryFrom<i128>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<T>>, D::Error> {
    Ok(Option::<Vec<Whole<T>>>::deserialize(deserializer)?.map(|numbers| numbers.into_iter().map(|number| number.0).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fraction_of_nothing_is_none() {
        let read = |text: &str| whole::<u32, _>(&mut serde_json::Deserializer::from_str(text)).map_err(|error| error.to_string());
        for (text, number) in
            [("15", Some(15)), ("15.0", Some(15)), ("1.5e1", Some(15)), ("0.0", Some(0)), ("4294967295.0", Some(u32::MAX)), ("null", None)]
        {
            assert_eq!(read(text), Ok(number), "{text}");
        }
        for text in ["1.5", "-1", "-1.0", "4294967296", "4294967296.0", "1e300", "\"15\"", "true", "[15]"] {
            assert!(read(text).unwrap_err().contains("expected u32"), "{text}");
        }
        let read = |text: &str| whole::<i64, _>(&mut serde_json::Deserializer::from_str(text)).ok();
        assert_eq!((read("-9223372036854775808"), read("1e16"), read("9223372036854775808")), (Some(Some(i64::MIN)), None, None));
        assert_eq!(wholes::<u32, _>(&mut serde_json::Deserializer::from_str("[1, 2.0]")).unwrap(), [1, 2]);
    }
}
