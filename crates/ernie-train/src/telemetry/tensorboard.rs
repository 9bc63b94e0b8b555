//! TensorBoard event files: TFRecord framing around hand-encoded protobuf scalars.
//!
//! A record is `length: u64`, `masked crc of length: u32`, `data`, `masked crc of data: u32`, all little-endian
//! (tensorflow/core/lib/io/record_writer). The crc is CRC-32C, rotated and offset so that a crc of data which holds crcs stays
//! useful. `data` is an `Event` (tensorflow/core/util/event.proto); only the fields below are used:
//! `Event{1 wall_time: double, 2 step: int64, 3 file_version: string, 5 summary: Summary}`,
//! `Summary{1 value: repeated Value}`, `Value{1 tag: string, 2 simple_value: float}`.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::TelemetryError;

/// Ending of our event files; TensorBoard only asks that the name contain `tfevents`.
const FILE_ENDING: &str = ".ernie";
const FILE_START: &str = "events.out.tfevents.";

/// An event file being written.
pub(super) struct EventWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventWriter {
    /// Starts a new event file in `dir`, named after `time` (seconds since 1970), and returns it with the older files of ours.
    ///
    /// A resumed run writes its whole history into a new file and then removes the old ones ([`EventWriter::remove`]): an old file may
    /// end in a torn record or hold steps that are done again.
    pub(super) fn create(dir: &Path, time: f64) -> Result<(Self, Vec<PathBuf>), TelemetryError> {
        let io = |action| move |source| TelemetryError::io(action, dir, source);
        std::fs::create_dir_all(dir).map_err(io("create"))?;
        let mut older = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(io("list"))? {
            let entry = entry.map_err(io("list"))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(FILE_START) && name.ends_with(FILE_ENDING) {
                older.push(entry.path());
            }
        }
        // Names sort by time, and TensorBoard reads files in that order: a second file of one second takes the next one.
        let mut second = time.max(0.0) as u64;
        let (path, file) = loop {
            let path = dir.join(format!("{FILE_START}{second:010}{FILE_ENDING}"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break (path, file),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => second += 1,
                Err(e) => return Err(TelemetryError::io("create", &path, e)),
            }
        };
        let mut writer = Self { path, file: BufWriter::new(file) };
        let mut event = Vec::new();
        put_double(&mut event, 1, time);
        put_bytes(&mut event, 3, b"brain.Event:2");
        writer.record(&event)?;
        Ok((writer, older))
    }

    /// Removes event files of an earlier part of this run, once this file holds their history.
    pub(super) fn remove(&mut self, older: &[PathBuf]) -> Result<(), TelemetryError> {
        self.flush()?;
        for path in older {
            std::fs::remove_file(path).map_err(|e| TelemetryError::io("remove", path, e))?;
        }
        Ok(())
    }

    /// Writes the scalars of one step as one event.
    pub(super) fn scalars<S: AsRef<str>>(
        &mut self,
        time: f64,
        step: u64,
        values: impl IntoIterator<Item = (S, f64)>,
    ) -> Result<(), TelemetryError> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut message = Vec::new();
            put_bytes(&mut message, 1, tag.as_ref().as_bytes());
            put_float(&mut message, 2, value as f32);
            put_bytes(&mut summary, 1, &message);
        }
        let mut event = Vec::new();
        put_double(&mut event, 1, time);
        put_varint_field(&mut event, 2, step);
        put_bytes(&mut event, 5, &summary);
        self.record(&event)
    }

    /// Hands what is buffered to the operating system, so that a running TensorBoard sees it.
    pub(super) fn flush(&mut self) -> Result<(), TelemetryError> {
        self.file.flush().map_err(|e| TelemetryError::io("write", &self.path, e))
    }

    fn record(&mut self, data: &[u8]) -> Result<(), TelemetryError> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend_from_slice(&length);
        record.extend_from_slice(&masked_crc(&length).to_le_bytes());
        record.extend_from_slice(data);
        record.extend_from_slice(&masked_crc(data).to_le_bytes());
        self.file.write_all(&record).map_err(|e| TelemetryError::io("write", &self.path, e))
    }
}

/// TFRecord's masked CRC-32C.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Protobuf wire types: 0 varint, 1 eight bytes, 2 length-delimited, 5 four bytes. A field's key is `number << 3 | type`.
fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_varint_field(out: &mut Vec<u8>, field: u64, value: u64) {
    put_varint(out, field << 3);
    put_varint(out, value);
}

fn put_double(out: &mut Vec<u8>, field: u64, value: f64) {
    put_varint(out, field << 3 | 1);
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    put_varint(out, field << 3 | 2);
    put_varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

fn put_float(out: &mut Vec<u8>, field: u64, value: f32) {
    put_varint(out, field << 3 | 5);
    out.extend_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A protobuf field as the wire has it.
    #[derive(Debug, PartialEq)]
    enum Field<'a> {
        Varint(u64),
        Fixed64([u8; 8]),
        Bytes(&'a [u8]),
        Fixed32([u8; 4]),
    }

    fn varint(data: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let (byte, rest) = data.split_first().unwrap();
            *data = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return value;
            }
        }
        unreachable!()
    }

    fn fields(mut data: &[u8]) -> Vec<(u64, Field<'_>)> {
        let mut fields = Vec::new();
        while !data.is_empty() {
            let key = varint(&mut data);
            let mut take = |n: usize| {
                let (head, rest) = data.split_at(n);
                data = rest;
                head
            };
            let field = match key & 7 {
                1 => Field::Fixed64(take(8).try_into().unwrap()),
                5 => Field::Fixed32(take(4).try_into().unwrap()),
                2 => {
                    let length = varint(&mut data) as usize;
                    let (head, rest) = data.split_at(length);
                    data = rest;
                    Field::Bytes(head)
                }
                _ => Field::Varint(varint(&mut data)),
            };
            fields.push((key >> 3, field));
        }
        fields
    }

    /// The records of a file, each crc checked against an independent bit-by-bit CRC-32C.
    fn records(path: &Path) -> Vec<Vec<u8>> {
        let slow_masked_crc = |data: &[u8]| {
            let mut crc = u32::MAX;
            for &byte in data {
                crc ^= u32::from(byte);
                for _ in 0..8 {
                    crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
                }
            }
            let crc = !crc;
            crc.rotate_right(15).wrapping_add(0xa282_ead8)
        };
        let raw = std::fs::read(path).unwrap();
        let (mut rest, mut records) = (raw.as_slice(), Vec::new());
        while !rest.is_empty() {
            let (length, after) = rest.split_at(8);
            let n = u64::from_le_bytes(length.try_into().unwrap()) as usize;
            let (crc, after) = after.split_at(4);
            assert_eq!(u32::from_le_bytes(crc.try_into().unwrap()), slow_masked_crc(length));
            let (data, after) = after.split_at(n);
            let (crc, after) = after.split_at(4);
            assert_eq!(u32::from_le_bytes(crc.try_into().unwrap()), slow_masked_crc(data));
            records.push(data.to_vec());
            rest = after;
        }
        records
    }

    #[test]
    fn events_read_back_with_their_crcs_steps_tags_and_values() {
        let dir = tempfile::tempdir().unwrap();
        let (mut writer, older) = EventWriter::create(dir.path(), 1.5e9).unwrap();
        assert!(older.is_empty());
        writer.scalars(1.5e9 + 0.5, 300, [("train/loss", 2.25), ("train/学习率", 3e-4)]).unwrap();
        writer.flush().unwrap();

        let records = records(&writer.path);
        assert_eq!(records.len(), 2);
        assert_eq!(fields(&records[0])[1], (3, Field::Bytes(b"brain.Event:2")));
        let event = fields(&records[1]);
        assert_eq!(event[0], (1, Field::Fixed64((1.5e9f64 + 0.5).to_le_bytes())));
        assert_eq!(event[1], (2, Field::Varint(300)));
        let (5, Field::Bytes(summary)) = &event[2] else { panic!("{event:?}") };
        let values: Vec<_> = fields(summary)
            .into_iter()
            .map(|(number, value)| {
                let Field::Bytes(value) = value else { panic!("{value:?}") };
                assert_eq!(number, 1);
                fields(value)
            })
            .collect();
        let expected = |tag: &'static str, value: f32| vec![(1, Field::Bytes(tag.as_bytes())), (2, Field::Fixed32(value.to_le_bytes()))];
        assert_eq!(values, [expected("train/loss", 2.25), expected("train/学习率", 3e-4)]);
    }

    #[test]
    fn a_second_file_of_the_same_second_gets_its_own_name_and_old_ones_can_go() {
        let dir = tempfile::tempdir().unwrap();
        let foreign = dir.path().join("events.out.tfevents.1.elsewhere");
        std::fs::write(&foreign, b"").unwrap();
        let (first, _) = EventWriter::create(dir.path(), 7.0).unwrap();
        let (mut second, older) = EventWriter::create(dir.path(), 7.0).unwrap();
        assert_eq!(older, std::slice::from_ref(&first.path));
        assert!(second.path > first.path);
        second.remove(&older).unwrap();
        assert!(!first.path.exists() && second.path.exists() && foreign.exists());
    }
}
