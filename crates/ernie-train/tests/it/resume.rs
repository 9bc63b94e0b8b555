//! A run killed with SIGKILL at random instants, many times, ends with the bits of a run that was left alone.
use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use super::run::{Bench, bits};
use ernie_train::train;

/// The child's side: set to the bench's folder when this test binary runs itself again.
const CHILD: &str = "ERNIE_TEST_RESUME_CHILD";
const KILLS: usize = 20;
const STEPS: u64 = 300;

#[test]
fn twenty_kills_change_no_bit() {
    if let Some(root) = std::env::var_os(CHILD) {
        let bench = Bench { root: root.into() };
        train(&bench.recipe("killed", STEPS), &bench.options()).unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path());
    let whole = train(&bench.recipe("whole", STEPS), &bench.options()).unwrap();

    // Delays spread over several checkpoint intervals; drawn from the process id, so that each run of the test tries other instants.
    let mut random = std::process::id() as u64 | 1;
    let (mut killed, mut reached) = (0, Vec::new());
    while killed < KILLS {
        let mut child = spawn(dir.path());
        let before = newest(dir.path());
        // A kill counts once the child has got somewhere new; otherwise slow machines would only ever kill it while it loads.
        while newest(dir.path()) == before && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(300));
        }
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        std::thread::sleep(Duration::from_micros((random >> 33) % 60_000));
        let finished = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        child.wait().unwrap();
        if finished {
            break;
        }
        killed += 1;
        reached.push(newest(dir.path()));
    }
    println!("{killed} kills, newest checkpoint after each: {reached:?}");
    assert!(killed >= KILLS, "the run finished after {killed} kills: lengthen it");
    assert!(reached.windows(2).all(|pair| pair[0] <= pair[1]), "a checkpoint was lost: {reached:?}");
    assert!(spawn(dir.path()).wait().unwrap().success());
    assert_eq!(bits(&dir.path().join("killed/model")), bits(&whole.model_dir));

    // The record is that of the uninterrupted run: each step once, same losses.
    let losses = |run: &str| {
        let text = fs::read_to_string(dir.path().join(run).join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines
            .filter(|line| line["kind"] == "train")
            .map(|line| (line["step"].as_u64().unwrap(), line["loss"].to_string()))
            .collect::<Vec<_>>()
    };
    assert_eq!(losses("killed"), losses("whole"));
}

fn spawn(root: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "resume::twenty_kills_change_no_bit"])
        .env(CHILD, root)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// The newest whole checkpoint's name.
fn newest(root: &Path) -> Option<String> {
    let names = fs::read_dir(root.join("killed/checkpoints")).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.starts_with("step-")).max()
}
