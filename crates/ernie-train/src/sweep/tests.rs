//! Figures of a report from made-up runs.
use super::report::{RunReport, Spread};
use super::*;
use crate::data::priority::RatioHistogram;
use crate::experts::ExpertUse;
use crate::heads::HeadUse;
use crate::origin::Origin;
use crate::report::Report;
use crate::telemetry::Validation;

pub(super) fn run(arm: usize, seed: u64, losses: &[f64]) -> RunReport {
    let point = |(index, &loss): (usize, &f64)| {
        let step = (index as u64 + 1) * 10;
        Validation {
            step,
            tokens: step * 100,
            seconds: step as f64 * 2.0,
            losses: vec![("a".into(), loss - 0.5), ("b".into(), loss + 0.5)],
            overlap: None,
        }
    };
    let curve: Vec<Validation> = losses.iter().enumerate().map(point).collect();
    let last = curve.last().unwrap().clone();
    let report = Report {
        finished: true,
        steps: last.step,
        tokens: last.tokens,
        seconds: last.seconds,
        validation: last.losses.clone(),
        experts: None,
        active_heads: Vec::new(),
        sampling: None,
        model_dir: PathBuf::new(),
        peak_rss_bytes: None,
        profile: None,
        origin: None,
    };
    RunReport { arm, seed, report, loss: last.mean(), curve }
}

pub(super) fn report(runs: &[RunReport]) -> SweepReport {
    let arm = |name: &str| Arm { name: name.into(), set: toml::Table::new() };
    let arms = vec![arm("first"), arm("second")];
    let sweep = Sweep {
        name: "s".into(),
        recipe: PathBuf::new(),
        out: PathBuf::new(),
        seeds: vec![1, 2],
        text: None,
        arms,
        base: toml::Table::new(),
    };
    SweepReport::new(&sweep, runs, 4)
}

#[test]
fn differences_are_taken_seed_by_seed_and_times_between_validations() {
    let runs = [run(0, 1, &[4.0, 3.0]), run(1, 1, &[3.5, 2.5]), run(0, 2, &[5.0, 4.0]), run(1, 2, &[4.5, 3.4])];
    let report = report(&runs);
    let first = &report.arms[0];
    assert_eq!((first.loss.unwrap().mean, first.loss.unwrap().standard_error), (3.5, Some(0.5)));
    let against = report.arms[1].against_first.as_ref().unwrap();
    assert!((against.loss_difference.mean + 0.55).abs() < 1e-12);
    // Half the distance between −0.5 and −0.6, though the losses themselves lie far apart.
    assert!((against.loss_difference.standard_error.unwrap() - 0.05).abs() < 1e-12);
    assert!((against.loss_difference.significance().unwrap() + 11.0).abs() < 1e-9);
    assert_eq!(against.sources.len(), 2);
    // 3.0 half-way from 3.5 to 2.5: step 15 of 20; 4.0 from 4.5 to 3.4: 14.54.
    let expected = (15.0 / 20.0 + (10.0 + 10.0 * 0.5 / 1.1) / 20.0) / 2.0;
    assert!((against.steps_to_same_loss.unwrap().mean - expected).abs() < 1e-12);
    assert!((against.seconds_to_same_loss.unwrap().mean - expected).abs() < 1e-12);
    assert_eq!(against.speed, Spread { mean: 1.0, standard_error: Some(0.0), runs: 2 });
    assert!(report.finished());
}

#[test]
fn an_arm_that_never_gets_there_has_no_time_for_it() {
    let runs = [run(0, 1, &[4.0, 3.0]), run(1, 1, &[4.5, 3.5])];
    let report = report(&runs);
    let against = report.arms[1].against_first.as_ref().unwrap();
    assert_eq!((against.steps_to_same_loss, against.loss_difference.standard_error), (None, None));
    assert!(!report.finished());
}

#[test]
fn pictures_show_what_arms_chose() {
    let domains = ["stories".to_owned(), "verse & song".to_owned()];
    let mut runs = [run(0, 1, &[4.0, 3.0]), run(1, 1, &[4.0, 3.0])];
    // In the first arm both experts see the same half and half; in the second one each.
    runs[0].report.experts = ExpertUse::new(&domains, [(1, vec![vec![2, 2], vec![2, 2]])]);
    runs[1].report.experts = ExpertUse::new(&domains, [(1, vec![vec![4, 0], vec![0, 4]]), (2, vec![vec![3, 0], vec![1, 4]])]);
    runs[1].report.active_heads =
        [(0, 0.5, None), (1, 0.25, Some(0.4))].map(|(layer, share, correlation)| HeadUse { layer, share, correlation }).into();
    runs[1].report.sampling = Some(RatioHistogram::of([0.5, 1.0, 1.1, 2.0]));
    let report = report(&runs);
    let [first, second] = &report.arms[..] else { panic!("{} arms", report.arms.len()) };
    assert_eq!((first.overlap.unwrap().mean, second.overlap.unwrap().mean), (1.0, 0.125));
    assert_eq!(second.against_first.as_ref().unwrap().overlap.unwrap().mean, 0.125);
    assert_eq!((second.least_used.unwrap().mean, second.active_heads.len()), (1.0, 2));

    let page = page::html(&report, &[Figure { caption: "heads & all".into(), svg: "<svg a=\"#1\">50%</svg>".into() }]);
    let image = "<img alt=\"heads &amp; all\" src=\"data:image/svg+xml;charset=utf-8,%3Csvg a=%22%231%22%3E50%25%3C/svg%3E\">";
    assert!(page.contains(image), "{page}");
    // Two curves; three layers with experts, one histogram, one chart of heads.
    assert_eq!((page.matches("<svg").count(), page.matches("class=\"picture\"").count()), (7, 5));
    assert_eq!(page.matches("fill-opacity=\"0.500\"").count(), 4);
    assert_eq!(page.matches("fill-opacity=\"0.750\"").count(), 1);
    assert!(page.contains("verse &amp; song") && !page.contains("verse & song"));
    assert!(page.contains("<tr><td>0<td>0.500<td>–</tr>\n<tr><td>1<td>0.250<td>0.400</tr>"), "{page}");
    assert!(page.contains("0.25 to 0.30: 0 rows") && page.contains("1.00 to 1.19: 2 rows"));
}

#[test]
fn the_page_says_what_it_was_made_with() {
    let mut runs = [run(0, 1, &[4.0, 3.0]), run(1, 1, &[4.0, 3.0]), run(0, 2, &[4.0, 3.5]), run(1, 2, &[4.0, 3.5])];
    let origin = |date: &str| {
        let (recipe, program, processor) = ("0".repeat(32), "ernie-rs 1".to_owned(), Some("A & B".to_owned()));
        Some(Origin { recipe, text: Vec::new(), program, threads: 2, processor, date: date.into() })
    };
    runs[0].report.origin = origin("2026-11-28");
    runs[1].report.origin = origin("2026-11-30");
    runs[2].report.origin = origin("2026-11-29");
    let mut report = report(&runs);
    report.arms[1].set = toml::from_str("\"loss.gate\" = 4.0").unwrap();
    report.recipe = toml::from_str("[run]\nname = \"a<b\"").unwrap();
    let page = page::html(&report, &[]);
    for part in [
        "<pre>nothing: the recipe as it is</pre>",
        "<pre>&quot;loss.gate&quot; = 4.0</pre>",
        "<li>3 runs: ernie-rs 1, 2 threads, A &amp; B, 2026-11-28 to 2026-11-30</li>",
        "<li>1 runs: by an earlier program, which did not say</li>",
        "name = &quot;a&lt;b&quot;",
    ] {
        assert!(page.contains(part), "{part}: {page}");
    }
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!((&json["arms"][1]["set"]["loss.gate"], &json["recipe"]["run"]["name"]), (&4.0.into(), &"a<b".into()));
    // A report of before is still read.
    let mut saved = serde_json::to_value(&runs[0].report).unwrap();
    assert_eq!(serde_json::from_value::<Report>(saved.clone()).unwrap(), runs[0].report);
    saved.as_object_mut().unwrap().remove("origin");
    assert_eq!(serde_json::from_value::<Report>(saved).unwrap().origin, None);
}

#[test]
fn correlations_of_heads_are_means_over_seeds() {
    let heads = |share, correlation| vec![HeadUse { layer: 2, share, correlation }];
    let mut runs = [run(0, 1, &[4.0]), run(0, 2, &[4.0]), run(0, 3, &[4.0])];
    for (run, (share, correlation)) in runs.iter_mut().zip([(0.5, Some(0.25)), (0.75, Some(0.75)), (1.0, None)]) {
        run.report.active_heads = heads(share, correlation);
    }
    let found = report(&runs).arms[0].active_heads.clone();
    let [ArmHeads { layer: 2, share, correlation }] = &found[..] else { panic!("{found:?}") };
    assert_eq!((share.mean, share.runs), (0.75, 3));
    assert_eq!(*correlation, Some(Spread { mean: 0.5, standard_error: Some(0.25), runs: 2 }));
}
