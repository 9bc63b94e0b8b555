//! Checks of what decides which text is drawn: priorities and the curriculum.
use std::collections::BTreeSet;

use ernie_checkpoint::Config;

use super::{Error, Recipe, Source, invalid};
use crate::curriculum::{RoutingKind, Stage};
use crate::data::priority::PriorityConfig;

/// Refuses priorities that make no sense.
pub(super) fn check_priority(priority: &PriorityConfig, sources: &[Source]) -> Result<(), Error> {
    for (key, value, low, high) in [
        ("alpha", priority.alpha, 0.0, 8.0),
        ("beta", priority.beta[0], 0.0, 1.0),
        ("beta", priority.beta[1], 0.0, 1.0),
        ("epsilon", priority.epsilon, 1e-6, 100.0),
        ("floor", priority.floor, 1e-3, 1.0),
        ("least_gain", priority.least_gain, 1.0, f64::MAX),
    ] {
        if !(low..=high).contains(&value) {
            return Err(invalid(
                format!("data.priority.{key}"),
                format!("{value} is out of range"),
                format!("give a number from {low} to {high}"),
            ));
        }
    }
    if priority.staleness == 0 {
        return Err(invalid("data.priority.staleness", "it is 0", "give a number of steps above 0"));
    }
    match sources.iter().position(|source| source.epochs_max.is_some()) {
        Some(index) => Err(invalid(
            format!("data.source[{index}].epochs_max"),
            "rows that are drawn by priority have no passes",
            "remove it, or data.priority",
        )),
        None => Ok(()),
    }
}

/// Refuses a curriculum that cannot be followed.
pub(super) fn check_curriculum(recipe: &Recipe, config: &Config) -> Result<(), Error> {
    let Some(curriculum) = &recipe.curriculum else { return Ok(()) };
    if recipe.data.priority.is_some() {
        return Err(invalid("curriculum", "data.priority draws the rows already", "remove one of the two"));
    }
    if let Some(index) = recipe.data.source.iter().position(|source| source.epochs_max.is_some()) {
        let key = format!("data.source[{index}].epochs_max");
        return Err(invalid(key, "rows that a curriculum draws have no passes", "remove it, or the curriculum"));
    }
    let domains: BTreeSet<&str> = recipe.data.source.iter().map(Source::domain).collect();
    let mut before = 0.0;
    for (index, stage) in curriculum.stage.iter().enumerate() {
        let key = |field: &str| format!("curriculum.stage[{index}].{field}");
        if !(stage.until > before && stage.until <= 1.0) {
            let problem = format!("{} is not above {before} and at most 1", stage.until);
            return Err(invalid(key("until"), problem, "give the shares of the run at which stages end, rising to 1"));
        }
        before = stage.until;
        check_stage(stage, &key, &domains)?;
        if stage.routing != RoutingKind::Balanced && config.moe.is_none() {
            return Err(invalid(key("routing"), "the model has no experts", "remove it, or give the model experts"));
        }
    }
    if before != 1.0 {
        let problem = format!("the last stage ends at {before}");
        return Err(invalid("curriculum.stage", problem, "let the last stage have `until = 1.0`"));
    }
    if curriculum.uses_difficulty() && curriculum.reference.is_none() {
        let problem = "stages go by difficulty and nothing tells it";
        return Err(invalid("curriculum.reference", problem, "give the `model` that scores rows, or remove `difficulty` from the stages"));
    }
    Ok(())
}

fn check_stage(stage: &Stage, key: &dyn Fn(&str) -> String, domains: &BTreeSet<&str>) -> Result<(), Error> {
    for (field, range) in [("difficulty", stage.difficulty), ("difficulty_to", stage.difficulty_to)] {
        if let Some([low, high]) = range
            && !(0.0 <= low && low < high && high <= 1.0)
        {
            return Err(invalid(key(field), format!("{low} to {high} is no range of quantiles"), "give two rising numbers from 0 to 1"));
        }
    }
    if stage.difficulty_to.is_some() && stage.difficulty.is_none() {
        return Err(invalid(key("difficulty_to"), "there is no `difficulty` to begin with", "give both, or none"));
    }
    for (name, weight) in &stage.mixture {
        if !domains.contains(name.as_str()) {
            let known = domains.iter().copied().collect::<Vec<_>>().join(", ");
            return Err(invalid(key("mixture"), format!("no source is of the domain `{name}`"), format!("give domains of these: {known}")));
        }
        if !(weight.is_finite() && *weight >= 0.0) {
            return Err(invalid(key("mixture"), format!("{weight} is no share of `{name}`"), "give a number from 0 on"));
        }
    }
    if !stage.mixture.is_empty() && stage.mixture.values().all(|&weight| weight == 0.0) {
        return Err(invalid(key("mixture"), "every share is 0", "give one above 0"));
    }
    for (field, value) in [("steer", stage.steer), ("pull", stage.pull)] {
        if !(0.0..=100.0).contains(&value) {
            return Err(invalid(key(field), format!("{value} is out of range"), "give a number from 0 to 100"));
        }
    }
    if stage.reassign_every == 0 {
        return Err(invalid(key("reassign_every"), "it is 0", "give a number of steps above 0"));
    }
    Ok(())
}
