//! model.safetensors beside the configs of the tiny models: an error, or tensors that can be read.
#![no_main]

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use ernie_checkpoint::Checkpoint;
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(|| {
    // Memory, where there is such a place: every input is written.
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.expect("a folder");
    for (name, config, form) in ernie_fuzz::models() {
        ernie_fuzz::write_model(&directory.path().join(name), &config, form).expect("a model");
    }
    directory
});

fuzz_target!(|data: &[u8]| {
    for (name, ..) in ernie_fuzz::models() {
        let directory = DIRECTORY.path().join(name);
        fs::write(directory.join("model.safetensors"), data).expect("a file");
        let Ok(checkpoint) = Checkpoint::open(&directory) else { continue };
        for problem in checkpoint.problems() {
            assert!(!problem.to_string().is_empty());
        }
        let _ = (checkpoint.validate().is_ok(), checkpoint.layout(), checkpoint.tied());
        for name in checkpoint.names() {
            if let Ok(tensor) = checkpoint.tensor(name) {
                let elements: usize = tensor.shape.iter().product();
                assert_eq!(tensor.to_f32().map(|values| values.len()).ok(), Some(elements));
                assert_eq!(tensor.to_bf16().map(|values| values.len()).ok(), Some(elements));
            }
        }
    }
});
