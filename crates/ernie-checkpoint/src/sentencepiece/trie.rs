//! A byte trie over a fixed set of keys: longest and all-prefix matches.

/// Children of a node are consecutive in `labels` and `targets`, sorted by label.
#[derive(Clone, Debug, Default)]
pub struct Trie {
    nodes: Vec<Node>,
    labels: Vec<u8>,
    targets: Vec<u32>,
}

#[derive(Clone, Debug)]
struct Node {
    first: u32,
    count: u16,
    value: Option<u32>,
}

impl Trie {
    /// Builds from `(key, value)`; of equal keys the first in the list wins. Empty keys are ignored.
    pub fn new<'a>(entries: impl IntoIterator<Item = (&'a [u8], u32)>) -> Self {
        let mut keys: Vec<(&[u8], u32)> = entries.into_iter().filter(|(key, _)| !key.is_empty()).collect();
        keys.sort_by_key(|(key, _)| *key);
        keys.dedup_by_key(|(key, _)| *key);
        let mut trie = Self { nodes: vec![Node { first: 0, count: 0, value: None }], ..Self::default() };
        // Breadth first: node `i` owns the keys of `ranges[i]`, which agree in their first `depth` bytes.
        let mut ranges = vec![(0, keys.len(), 0)];
        let mut node = 0;
        while node < ranges.len() {
            let (mut low, high, depth) = ranges[node];
            if low < high && keys[low].0.len() == depth {
                trie.nodes[node].value = Some(keys[low].1);
                low += 1;
            }
            trie.nodes[node].first = trie.labels.len() as u32;
            while low < high {
                let label = keys[low].0[depth];
                let end = low + keys[low..high].partition_point(|(key, _)| key[depth] == label);
                trie.labels.push(label);
                trie.targets.push(trie.nodes.len() as u32);
                trie.nodes[node].count += 1;
                trie.nodes.push(Node { first: 0, count: 0, value: None });
                ranges.push((low, end, depth + 1));
                low = end;
            }
            node += 1;
        }
        trie
    }

    /// Calls `found(length, value)` for every key that `text` starts with, shortest first.
    pub fn prefixes(&self, text: &[u8], mut found: impl FnMut(usize, u32)) {
        let Some(mut node) = self.nodes.first() else { return };
        for (i, byte) in text.iter().enumerate() {
            let children = node.first as usize..node.first as usize + node.count as usize;
            let Ok(child) = self.labels[children.clone()].binary_search(byte) else { return };
            node = &self.nodes[self.targets[children.start + child] as usize];
            if let Some(value) = node.value {
                found(i + 1, value);
            }
        }
    }

    /// The longest key that `text` starts with: its length and value.
    pub fn longest(&self, text: &[u8]) -> Option<(usize, u32)> {
        let mut best = None;
        self.prefixes(text, |length, value| best = Some((length, value)));
        best
    }

    /// True when there is no key.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::Trie;

    #[test]
    fn finds_every_prefix_and_the_longest() {
        let keys = ["a", "ab", "abc", "b", "bcd", "", "abd"];
        let trie = Trie::new(keys.iter().zip(0..).map(|(key, id)| (key.as_bytes(), id)));
        let mut all = Vec::new();
        trie.prefixes(b"abdx", |length, id| all.push((length, id)));
        assert_eq!(all, [(1, 0), (2, 1), (3, 6)]);
        assert_eq!(trie.longest(b"bcx"), Some((1, 3)));
        assert_eq!(trie.longest(b"c"), None);
        assert_eq!(Trie::default().longest(b"a"), None);
    }
}
