//! Stages, assignments in time, and what is saved.
use super::*;

fn config(stages: &str) -> CurriculumConfig {
    toml::from_str(stages).unwrap()
}

const THREE: &str = r#"
stage = [
    { until = 0.2, routing = "uniform", difficulty = [0.0, 0.5] },
    { until = 0.5, difficulty = [0.0, 0.5], difficulty_to = [0.2, 1.0] },
    { until = 1.0, routing = "steered", reassign_every = 3 },
]
"#;

fn corpus() -> Corpus {
    Corpus { sources: Vec::new(), domains: vec!["a".into(), "b".into()], fingerprint: String::new() }
}

fn model() -> Config {
    let json = serde_json::json!({
        "model_type": "ernie4_5_moe", "vocab_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 16, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 4,
        "moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1
    });
    Config::from_json(&json.to_string(), std::path::Path::new("test")).unwrap()
}

fn curriculum(state: Option<RoutingState>) -> Curriculum {
    let mut config = config(THREE);
    // Sources decide about shares, and there are none here.
    config.stage.iter_mut().for_each(|stage| stage.mixture = BTreeMap::from([("a".into(), 1.0), ("b".into(), 1.0)]));
    Curriculum::new(config, &model(), &corpus(), 1, 20, state)
}

#[test]
fn stages_follow_each_other() {
    let config = config(THREE);
    let stages: Vec<usize> = (1..=20).map(|step| config.stage(step, 20).0).collect();
    assert_eq!(stages, [vec![0; 4], vec![1; 6], vec![2; 10]].concat());
    assert_eq!((0..3).map(|index| config.first_step(index, 20)).collect::<Vec<_>>(), [1, 5, 11]);
    // Also where shares are no round numbers of steps.
    for steps in [7, 23, 101, 999] {
        for index in 0..3 {
            let first = config.first_step(index, steps);
            assert!(
                config.stage(first, steps).0 == index && (index == 0 || config.stage(first - 1, steps).0 == index - 1),
                "{steps}, {index}"
            );
        }
    }
    let (index, part) = config.stage(8, 20);
    let [low, high] = config.stage[index].range(part);
    assert!((part - 0.5).abs() < 1e-9 && (low - 0.1).abs() < 1e-9 && (high - 0.75).abs() < 1e-9);
    assert_eq!(config.stage[0].range(0.9), [0.0, 0.5]);
    assert!(config.uses_difficulty());
}

/// A batch of two tokens, one of each domain; domain a is easy for experts 0 and 1, domain b for 2 and 3.
fn observe(curriculum: &mut Curriculum, experts: [u32; 4], losses: [f32; 2]) {
    let mut batch = PackedBatch::from_documents([&[1, 2][..]]);
    batch.targets = [2, 3].into();
    batch.domains = Some([0, 1].into());
    let experts = [1, 2].map(|layer| (layer, Arc::from(experts)));
    curriculum.observe([(&batch, &experts[..], &losses[..])]);
}

#[test]
fn experts_are_assigned_in_time_by_what_was_seen() {
    let mut whole = curriculum(None);
    assert_eq!([1, 5, 11].map(|step| whole.routing(step)), [RoutingKind::Uniform, RoutingKind::Balanced, RoutingKind::Steered]);
    for _ in 0..100 {
        observe(&mut whole, [0, 1, 0, 1], [1.0, 3.0]);
        observe(&mut whole, [2, 3, 2, 3], [3.0, 1.0]);
    }
    assert!(whole.begin(10).is_empty());
    assert!(whole.state().favoured.is_empty());
    let losses = whole.losses();
    assert_eq!(losses.iter().map(|found| found.layer).collect::<Vec<_>>(), [1, 2]);
    for (found, expected) in losses[1].losses.iter().flatten().zip([1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 1.0, 1.0]) {
        assert!((found.unwrap() - expected).abs() < 1e-9, "{losses:?}");
    }
    let of = |names: [&str; 4]| names.map(|name| vec![name.to_owned()]).to_vec();
    let first = |layer| Assigned { layer, changed: 4, experts: of(["a", "a", "b", "b"]) };
    assert_eq!(whole.begin(11), [first(1), first(2)]);
    let expected = vec![true, true, false, false, false, false, true, true];
    assert_eq!(whole.state().favoured, BTreeMap::from([(1, expected.clone()), (2, expected.clone())]));

    let mut batch = PackedBatch { domains: Some([0, 1].into()), ..PackedBatch::from_documents([&[1, 2][..]]) };
    whole.steer(5, 0, &mut batch);
    assert_eq!(batch.steering, None);
    whole.steer(1, 0, &mut batch);
    let uniform = batch.steering.clone();
    whole.steer(1, 1, &mut batch);
    assert!(matches!(batch.steering, Some(Steering::Uniform { .. })) && batch.steering != uniform);
    whole.steer(11, 0, &mut batch);
    let Some(Steering::Favoured { layers, strength, .. }) = &batch.steering else { panic!("{:?}", batch.steering) };
    assert_eq!((layers[&2].table.clone(), *strength), (expected.clone(), 0.5));
    assert_eq!((whole.loads(1), whole.loads(5), whole.loads(11).unwrap()[&2].clone()), (Some(BTreeMap::new()), None, vec![0.25; 4]));
    let weights = LossWeights { balance: 0.1, ..LossWeights::default() };
    assert_eq!((whole.weights(5, weights), whole.weights(11, weights).balance, whole.weights(11, weights).pull), (weights, 0.0, 0.05));

    // Saved and read back it goes on as if nothing had been; and only every third step assigns.
    let saved = serde_json::to_string(whole.state()).unwrap();
    let mut resumed = curriculum(Some(serde_json::from_str(&saved).unwrap()));
    for curriculum in [&mut whole, &mut resumed] {
        for _ in 0..400 {
            observe(curriculum, [0, 2, 0, 2], [1.0, 1.0]);
            observe(curriculum, [1, 3, 1, 3], [3.0, 3.0]);
        }
        assert!(curriculum.begin(13).is_empty());
        assert_eq!(curriculum.state().favoured[&1], expected);
        // A little better in both domains is not enough to change hands.
        let second = |layer| Assigned { layer, changed: 0, experts: of(["a", "a", "b", "b"]) };
        assert_eq!(curriculum.begin(14), [second(1), second(2)]);
    }
    assert_eq!(resumed.state(), whole.state());
    let mut batches = [batch.clone(), batch];
    whole.steer(14, 0, &mut batches[0]);
    resumed.steer(14, 0, &mut batches[1]);
    assert_eq!(batches[0].steering, batches[1].steering);
}

#[test]
fn an_expert_changes_hands_when_its_domains_are_others() {
    let curriculum = curriculum(None);
    let before = [true, true, false, false, false, false, true, true];
    // Expert 1 goes over to b, expert 2 to a; expert 3 takes in a as well; expert 0 keeps what it has.
    let after = [true, false, true, true, false, true, false, true];
    let names = [&["a"][..], &["b"], &["a"], &["a", "b"]].map(|names| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
    let assigned = curriculum.assigned(1, Some(&before), &after);
    assert_eq!(assigned, Assigned { layer: 1, changed: 3, experts: names.to_vec() });
    assert_eq!(curriculum.assigned(1, None, &after).changed, 4);
    assert_eq!(curriculum.assigned(1, Some(&after), &after).changed, 0);
}

#[test]
fn what_is_not_scored_and_padding_teach_nothing() {
    let mut curriculum = curriculum(None);
    let before = curriculum.state().clone();
    let batch = PackedBatch { domains: Some([0, NO_DOMAIN].into()), ..PackedBatch::from_documents([&[1][..], &[2]]) };
    curriculum.observe([(&batch, &[(1, Arc::from([0, 1, 2, 3]))][..], &[1.0, 1.0][..])]);
    assert_eq!(curriculum.state(), &before);
}
