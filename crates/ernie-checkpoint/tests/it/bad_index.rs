//! Shard indexes that lie or lead outside the directory.

use std::fs;
use std::path::{Path, PathBuf};

use ernie_checkpoint::{Checkpoint, Error};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixture::{assert_error, file, moe, open_error, sharded_model, with_weights};

const INDEX: &str = "model.safetensors.index.json";
const NORM: &str = "model.norm.weight";

fn index_of(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join(INDEX)).unwrap()).unwrap()
}

/// A sharded model whose index says that `model.norm.weight` is in `shard`.
fn norm_in(shard: &str) -> TempDir {
    let dir = sharded_model(&moe());
    let mut index = index_of(dir.path());
    index["weight_map"][NORM] = json!(shard);
    fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
    dir
}

/// The shard that holds the final norm.
fn norm_shard(dir: &Path) -> String {
    index_of(dir)["weight_map"][NORM].as_str().unwrap().to_owned()
}

#[test]
fn names_that_lead_outside() {
    for shard in ["../model.safetensors", "..", ".", "", "/etc/hostname", "sub/model.safetensors", "..\\x.safetensors", "C:x", "a\u{0}b"] {
        let dir = norm_in(shard);
        assert_error!(open_error(dir.path(), &[INDEX, NORM]), Error::ShardOutside { .. });
    }
}

#[cfg(unix)]
#[test]
fn links_that_lead_outside() {
    let dir = sharded_model(&moe());
    let elsewhere = tempfile::tempdir().unwrap();
    let shard = norm_shard(dir.path());
    let target = elsewhere.path().join("stolen");
    fs::rename(dir.path().join(&shard), &target).unwrap();
    std::os::unix::fs::symlink(&target, dir.path().join(&shard)).unwrap();
    assert_error!(open_error(dir.path(), &[INDEX, &shard]), Error::ShardOutside { .. });
}

#[cfg(unix)]
#[test]
fn links_of_the_hugging_face_cache_are_followed() {
    let cache = tempfile::tempdir().unwrap();
    let snapshot = cache.path().join("snapshots/revision");
    let blobs = cache.path().join("blobs");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    let dir = sharded_model(&moe());
    for (i, entry) in fs::read_dir(dir.path()).unwrap().enumerate() {
        let entry = entry.unwrap();
        fs::rename(entry.path(), blobs.join(i.to_string())).unwrap();
        let link = PathBuf::from("../../blobs").join(i.to_string());
        std::os::unix::fs::symlink(link, snapshot.join(entry.file_name())).unwrap();
    }
    Checkpoint::open(&snapshot).unwrap().validate().unwrap();
}

#[test]
fn missing_shard() {
    let dir = sharded_model(&moe());
    let shard = norm_shard(dir.path());
    fs::remove_file(dir.path().join(&shard)).unwrap();
    assert_error!(open_error(dir.path(), &[INDEX, &shard]), Error::ShardMissing { .. });
}

#[test]
fn a_tensor_in_the_index_but_not_in_its_shard() {
    let dir = sharded_model(&moe());
    let shard = norm_shard(dir.path());
    let mut index = index_of(dir.path());
    index["weight_map"]["model.ghost.weight"] = json!(shard);
    fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
    assert_error!(open_error(dir.path(), &[INDEX, &shard, "model.ghost.weight"]), Error::NotInShard { .. });
}

#[test]
fn a_tensor_in_a_shard_but_not_in_the_index() {
    let dir = sharded_model(&moe());
    let shard = norm_shard(dir.path());
    let mut index = index_of(dir.path());
    index["weight_map"].as_object_mut().unwrap().remove(NORM);
    fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
    assert_error!(open_error(dir.path(), &[INDEX, &shard, NORM]), Error::NotInIndex { .. });
}

#[test]
fn a_tensor_in_two_shards() {
    let dir = with_weights(&[]);
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let shard = |names: [&str; 2]| {
        let entry = |name: &str, at: usize| format!(r#""{name}":{{"dtype":"F32","shape":[1],"data_offsets":[{at},{}]}}"#, at + 4);
        file(&format!("{{{},{}}}", entry(names[0], 0), entry(names[1], 4)), &[0; 8])
    };
    fs::write(dir.path().join("a.safetensors"), shard(["model.x", "model.y"])).unwrap();
    fs::write(dir.path().join("b.safetensors"), shard(["model.x", "model.z"])).unwrap();
    let index = json!({"weight_map": {"model.x": "a.safetensors", "model.y": "a.safetensors", "model.z": "b.safetensors"}});
    fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
    assert_error!(open_error(dir.path(), &["a.safetensors", "b.safetensors", "model.x"]), Error::DuplicateTensor { .. });
    // The same name twice in the index itself.
    let twice = r#"{"weight_map": {"model.x": "a.safetensors", "model.x": "b.safetensors"}}"#;
    fs::write(dir.path().join(INDEX), twice).unwrap();
    assert_error!(open_error(dir.path(), &[INDEX, "model.x"]), Error::DuplicateTensor { .. });
}

#[test]
fn an_index_that_is_not_one() {
    let dir = sharded_model(&moe());
    for text in ["", "[]", "{}", r#"{"weight_map": []}"#, r#"{"weight_map": {"model.x": 3}}"#] {
        fs::write(dir.path().join(INDEX), text).unwrap();
        assert_error!(open_error(dir.path(), &[INDEX]), Error::Json { .. });
    }
}

#[test]
fn a_truncated_shard_is_named() {
    let dir = sharded_model(&moe());
    let shard = norm_shard(dir.path());
    let bytes = fs::read(dir.path().join(&shard)).unwrap();
    fs::write(dir.path().join(&shard), &bytes[..bytes.len() - 1]).unwrap();
    assert_error!(open_error(dir.path(), &[&shard]), Error::OffsetsOutside { .. });
}
