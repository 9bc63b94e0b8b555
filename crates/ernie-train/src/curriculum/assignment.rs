//! Which experts a domain is given, by the losses of its tokens in each of them.
//!
//! From sums over the tokens of domain d that chose expert e, which fade by a factor each step: n_de tokens of mean loss m_de. The advantage of e in d is
//!
//! `a_de = n_de / (n_de + n₀) · (m̄_d − m_de) / s_d`,
//!
//! m̄_d the mean over the experts that have seen the domain and s_d the standard deviation among them: how many deviations e is better than the mean
//! expert, the less the less it has seen. It is held between −2 and 2, and experts that the domain has already get 1 more, so that experts change hands for a
//! reason and not by accident. A token's loss is credited to all its experts alike; what made it hard is not known.
//!
//! The assignment is balanced. First every expert gets one home: domains have homes in proportion to their shares of the tokens (largest remainders, each
//! at least one where there are as many experts), filled by the best advantages that are left. So no expert is without text. Then a domain with
//! fewer homes than a token has experts is the guest of further experts, the best of those whose load stays below twice the mean; experts that have guests already come first, for
//! several domains that are guests of one expert overlap less than guests everywhere. The load of an expert is the sum over its domains of their
//! share over their number of experts.
use serde::{Deserialize, Serialize};

/// What is left of a sum after a step: a memory of some fifty steps.
const FADE: f64 = 0.98;
/// Tokens at which an advantage counts half.
const HALF_TRUSTED: f64 = 200.0;
/// Largest size of an advantage.
const LARGEST: f64 = 2.0;
/// What holding an expert is worth.
const HOLDING: f64 = 1.0;
/// Load up to which an expert takes guests, in mean loads.
const FULL: f64 = 2.0;

/// Faded sums over the tokens of each domain in each expert of one layer; as the bits of f64, so that they come back exactly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    experts: usize,
    /// Tokens, `[domains, experts]` row by row.
    tokens: Vec<u64>,
    /// Their losses in nats; same shape.
    losses: Vec<u64>,
}

impl Evidence {
    /// Nothing seen.
    pub fn new(domains: usize, experts: usize) -> Self {
        Self { experts, tokens: vec![0; domains * experts], losses: vec![0; domains * experts] }
    }

    /// One step passes.
    pub fn fade(&mut self) {
        for bits in self.tokens.iter_mut().chain(&mut self.losses) {
            *bits = (f64::from_bits(*bits) * FADE).to_bits();
        }
    }

    /// A token of a domain chose an expert and had this loss in nats.
    pub fn add(&mut self, domain: usize, expert: usize, loss: f64) {
        let place = domain * self.experts + expert;
        self.tokens[place] = (f64::from_bits(self.tokens[place]) + 1.0).to_bits();
        self.losses[place] = (f64::from_bits(self.losses[place]) + loss).to_bits();
    }

    /// Mean losses m_de by domain (outer) and expert (inner), of those that met.
    pub fn means(&self) -> Vec<Vec<Option<f64>>> {
        let mean = |(tokens, losses): (&u64, &u64)| {
            let tokens = f64::from_bits(*tokens);
            (tokens > 0.0).then(|| f64::from_bits(*losses) / tokens)
        };
        let rows = self.tokens.chunks(self.experts).zip(self.losses.chunks(self.experts));
        rows.map(|(tokens, losses)| tokens.iter().zip(losses).map(mean).collect()).collect()
    }

    /// The advantages a_de, `[domains, experts]` row by row.
    pub fn advantage(&self) -> Vec<f64> {
        let advantage = |(tokens, means): (&[u64], Vec<Option<f64>>)| {
            let seen = |tokens: &u64| f64::from_bits(*tokens);
            let count = means.iter().flatten().count().max(1) as f64;
            let middle = means.iter().flatten().sum::<f64>() / count;
            let deviation = (means.iter().flatten().map(|mean| (mean - middle).powi(2)).sum::<f64>() / count).sqrt();
            let of = move |(mean, tokens): (&Option<f64>, &u64)| match mean {
                Some(mean) if deviation > 0.0 => {
                    let trust = seen(tokens) / (seen(tokens) + HALF_TRUSTED);
                    (trust * (middle - mean) / deviation).clamp(-LARGEST, LARGEST)
                }
                _ => 0.0,
            };
            means.iter().zip(tokens).map(of).collect::<Vec<_>>()
        };
        self.tokens.chunks(self.experts).zip(self.means()).flat_map(advantage).collect()
    }
}

/// What an assignment is made for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Share of each domain, summing to 1.
    pub shares: &'a [f64],
    /// Experts of the layer.
    pub experts: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// The assignment until now.
    pub holders: Option<&'a [bool]>,
}

/// The experts of each domain, `[domains, experts]` row by row, from the advantages in the same shape. A domain without a share has none.
pub fn assign(advantage: &[f64], wanted: &Wanted) -> Vec<bool> {
    let Wanted { shares, experts, top_k, holders } = *wanted;
    let place = |domain: usize, expert: usize| domain * experts + expert;
    let holds = |place: usize| holders.is_some_and(|holders| holders[place]);
    let score = |place: usize| advantage[place] + if holds(place) { HOLDING } else { 0.0 };
    let mut table = vec![false; shares.len() * experts];

    let mut homes = seats(shares, experts);
    let wants = homes.clone();
    let mut pairs: Vec<(usize, usize)> = (0..shares.len()).flat_map(|domain| (0..experts).map(move |expert| (domain, expert))).collect();
    // A stable sort: equal scores go to the earlier domain and expert.
    pairs.sort_by(|a, b| score(place(b.0, b.1)).total_cmp(&score(place(a.0, a.1))));
    let mut housed = vec![false; experts];
    for &(domain, expert) in &pairs {
        if homes[domain] > 0 && !housed[expert] {
            homes[domain] -= 1;
            housed[expert] = true;
            table[place(domain, expert)] = true;
        }
    }

    let each = |domain: usize| shares[domain] / wants[domain].max(top_k).max(1) as f64;
    let mut load = vec![0.0; experts];
    for &(domain, expert) in pairs.iter().filter(|(domain, expert)| table[place(*domain, *expert)]) {
        load[expert] += each(domain);
    }
    let mut hosts = vec![false; experts];
    for domain in (0..shares.len()).filter(|&domain| shares[domain] > 0.0) {
        for _ in wants[domain]..top_k.min(experts) {
            let full = |expert: usize| load[expert] + each(domain) > FULL / experts as f64 + 1e-9;
            let free = (0..experts).filter(|&expert| !table[place(domain, expert)]);
            let best = free.min_by(|&a, &b| {
                let by_room = full(a).cmp(&full(b));
                // Where all are full, to whom has least.
                let by_load = if full(a) && full(b) { load[a].total_cmp(&load[b]) } else { std::cmp::Ordering::Equal };
                by_room.then(by_load).then(hosts[b].cmp(&hosts[a])).then(score(place(domain, b)).total_cmp(&score(place(domain, a))))
            });
            let Some(expert) = best else { break };
            table[place(domain, expert)] = true;
            hosts[expert] = true;
            load[expert] += each(domain);
        }
    }
    table
}

/// Share of the tokens that each expert of such an assignment is to have, `[experts]`: a domain's share, evenly over its experts.
pub fn loads(table: &[bool], shares: &[f64], experts: usize) -> Vec<f64> {
    let mut loads = vec![0.0; experts];
    for (row, share) in table.chunks(experts).zip(shares) {
        let each = share / row.iter().filter(|has| **has).count().max(1) as f64;
        loads.iter_mut().zip(row).filter(|(_, has)| **has).for_each(|(load, _)| *load += each);
    }
    loads
}

/// Homes of each domain: `experts` in all, by share, with at least one for each domain that has a share, where there are as many.
fn seats(shares: &[f64], experts: usize) -> Vec<usize> {
    let drawn = shares.iter().filter(|&&share| share > 0.0).count();
    let least = usize::from(drawn <= experts);
    let mut seats: Vec<usize> = shares.iter().map(|&share| if share > 0.0 { least } else { 0 }).collect();
    for _ in seats.iter().sum::<usize>()..experts {
        // The domain that is furthest behind its due.
        let behind = |domain: usize| shares[domain] * experts as f64 - seats[domain] as f64;
        let Some(next) = (0..shares.len()).filter(|&domain| shares[domain] > 0.0).reduce(|a, b| if behind(b) > behind(a) { b } else { a })
        else {
            break;
        };
        seats[next] += 1;
    }
    seats
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::overlap;

    #[test]
    fn the_better_expert_has_the_advantage_and_the_less_it_has_seen_the_less() {
        let mut evidence = Evidence::new(2, 3);
        for _ in 0..200 {
            evidence.add(0, 0, 2.0);
            evidence.add(0, 1, 4.0);
        }
        let a = evidence.advantage();
        // Means 2 and 4: one deviation each way, half trusted; nothing is known of expert 2 and of domain 1.
        assert_eq!(a, [0.5, -0.5, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(evidence.means(), [[Some(2.0), Some(4.0), None], [None; 3]]);
        (0..40).for_each(|_| evidence.fade());
        let faded = evidence.advantage();
        assert!(faded[0] > 0.2 && faded[0] < 0.4, "{faded:?}");
        let saved = serde_json::to_string(&evidence).unwrap();
        assert_eq!(serde_json::from_str::<Evidence>(&saved).unwrap(), evidence);
    }

    #[test]
    fn homes_follow_the_shares() {
        assert_eq!(seats(&[0.5, 0.25, 0.25], 8), [4, 2, 2]);
        assert_eq!(seats(&[0.9, 0.05, 0.05], 8), [6, 1, 1]);
        assert_eq!(seats(&[1.0 / 6.0; 6], 8), [2, 2, 1, 1, 1, 1]);
        assert_eq!(seats(&[0.1; 10], 4).iter().sum::<usize>(), 4);
        assert_eq!(seats(&[0.0, 1.0], 4), [0, 4]);
    }

    /// Experts of each domain.
    fn lists(table: &[bool], experts: usize) -> Vec<Vec<usize>> {
        table.chunks(experts).map(|row| (0..experts).filter(|&expert| row[expert]).collect()).collect()
    }

    #[test]
    fn homes_go_to_the_best_and_stay_with_who_has_them() {
        let shares = [0.5, 0.5];
        let wanted = Wanted { shares: &shares, experts: 4, top_k: 2, holders: None };
        let advantage = [0.0, 1.0, 0.0, 1.5, 0.5, 0.0, 0.5, 0.0];
        let table = assign(&advantage, &wanted);
        assert_eq!(lists(&table, 4), [vec![1, 3], vec![0, 2]]);
        assert_eq!(loads(&table, &[0.75, 0.25], 4), [0.125, 0.375, 0.125, 0.375]);
        // Expert 0 is now a little better in domain 0 than its own expert 1: not enough. Then much better.
        let held = Wanted { holders: Some(&table), ..wanted };
        assert_eq!(assign(&[0.4, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], &held), table);
        assert_eq!(lists(&assign(&[1.9, 0.0, 0.0, 1.0, -1.0, 0.8, 0.0, 0.0], &held), 4), [vec![0, 3], vec![1, 2]]);
    }

    #[test]
    fn every_assignment_is_balanced_and_overlaps_little() {
        for (domains, experts) in [(5, 8), (6, 8), (7, 8), (8, 8), (6, 16), (12, 8)] {
            for seed in 0..20u64 {
                let random = |place: usize| (crate::data::random::mix(seed << 32 | place as u64) >> 11) as f64 / (1u64 << 53) as f64;
                let advantage: Vec<f64> = (0..domains * experts).map(|place| 4.0 * random(place) - 2.0).collect();
                let shares = vec![1.0 / domains as f64; domains];
                let table = assign(&advantage, &Wanted { shares: &shares, experts, top_k: 2, holders: None });
                // What validation would count if every token went to its domain's experts, those taken in turn.
                let counts: Vec<Vec<u64>> = table
                    .chunks(experts)
                    .map(|row| {
                        let has = row.iter().filter(|has| **has).count() as u64;
                        assert!(has >= 2, "{domains} domains, {experts} experts: {row:?}");
                        row.iter().map(|&has_it| if has_it { 10_080 / has } else { 0 }).collect()
                    })
                    .collect();
                let load = |expert: usize| counts.iter().map(|row| row[expert]).sum::<u64>() as f64;
                let total: f64 = (0..experts).map(load).sum();
                let loads: Vec<f64> = (0..experts).map(|expert| load(expert) * experts as f64 / total).collect();
                assert!(loads.iter().all(|&load| (0.25..=2.1).contains(&load)), "{domains}, {experts}: {loads:?}");
                if domains <= experts {
                    assert!(overlap(&counts) < 0.15, "{domains}, {experts}: {}", overlap(&counts));
                }
            }
        }
    }

    #[test]
    fn a_domain_that_is_not_drawn_takes_nothing_away() {
        let shares = [0.0, 0.5, 0.5];
        let table = assign(&[0.0; 12], &Wanted { shares: &shares, experts: 4, top_k: 2, holders: None });
        assert_eq!(lists(&table, 4), [vec![], vec![0, 1], vec![2, 3]]);
    }
}
