//! The sampling flags that `chat` and `generate` share, and their check.
use ernie_engine::SamplingParams;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::outcome;

/// How tokens are chosen and when to stop.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArguments {
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_tokens: usize,
    /// Randomness: 0 always takes the likeliest token, 1 draws from the model's own distribution
    #[arg(long, value_name = "T", default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f32,
    /// Draw from the K likeliest tokens only; 0 = all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draw from the fewest likeliest tokens that reach this probability together
    #[arg(long, value_name = "P", default_value_t = 0.95, allow_negative_numbers = true)]
    top_p: f32,
    /// Draw from tokens at least P times as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f32,
    /// Divides the logits of tokens that are in the prompt or the output; 1 = off
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f32,
    /// Taken from the logits of tokens that are in the output
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Taken from the logits of tokens in the output, once per occurrence
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Seed of the draws; the same seed gives the same text [default: a new one each time]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// End before this text appears; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// End at this token, besides the model's own end; may be repeated, or a list: 3,5,7
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    stop_id: Vec<u32>,
    /// Go on past the model's end-of-text token
    #[arg(long)]
    ignore_eos: bool,
}

impl SamplingArguments {
    /// The checked parameters, with a seed in any case.
    ///
    /// # Errors
    /// A usage error naming the flag out of range.
    pub fn params(&self) -> anyhow::Result<SamplingParams> {
        let params = SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: Vec::new(),
            seed: self.seed.unwrap_or_else(clock_seed),
            stop: self.stop.clone(),
            stop_ids: self.stop_id.clone(),
            ignore_eos: self.ignore_eos,
            max_tokens: self.max_tokens,
        };
        match params.validate() {
            Ok(()) => Ok(params),
            Err(ernie_engine::Error::Parameter { field, expected, got }) => {
                Err(outcome::usage(format!("--{}: expected {expected}, got {got}", field.replace('_', "-"))))
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Short enough to be typed again: below 2³².
fn clock_seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (since.as_nanos() as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        sampling: SamplingArguments,
    }

    fn parse(flags: &[&str]) -> SamplingArguments {
        Line::try_parse_from([&["test"], flags].concat()).unwrap().sampling
    }

    #[test]
    fn every_flag_arrives() {
        let flags = "--max-tokens 9 --temperature 0.5 --top-k 3 --top-p 0.4 --min-p 0.1 --repetition-penalty 1.2 --presence-penalty -0.5 \
                     --frequency-penalty 0.25 --seed 11 --stop a --stop b --stop-id 3,5 --stop-id 7 --ignore-eos";
        let params = parse(&flags.split_whitespace().collect::<Vec<_>>()).params().unwrap();
        let expected = SamplingParams {
            max_tokens: 9,
            temperature: 0.5,
            top_k: 3,
            top_p: 0.4,
            min_p: 0.1,
            repetition_penalty: 1.2,
            presence_penalty: -0.5,
            frequency_penalty: 0.25,
            logit_bias: Vec::new(),
            seed: 11,
            stop: vec!["a".into(), "b".into()],
            stop_ids: vec![3, 5, 7],
            ignore_eos: true,
        };
        assert_eq!(params, expected);
    }

    #[test]
    fn a_value_out_of_range_names_its_flag() {
        for (flag, value) in
            [("--top-p", "0"), ("--min-p", "2"), ("--temperature", "-1"), ("--repetition-penalty", "0"), ("--max-tokens", "0")]
        {
            let error = parse(&[flag, value]).params().unwrap_err();
            assert!(error.to_string().starts_with(flag), "{error}");
            assert!(matches!(error.downcast_ref(), Some(outcome::Outcome::Usage(_))));
        }
    }
}
