//! Sums and least of changing numbers, and drawing by sums.

/// A binary tree of sums: a number is changed, and a place drawn in proportion to its number, in log n steps. Every inner sum is made of the two below
/// it alone, so the tree depends on its numbers and not on the order in which they came.
#[derive(Debug, Clone)]
pub struct SumTree {
    /// Leaves in the second half, the sum of all at 1.
    nodes: Vec<f64>,
    leaves: usize,
}

impl SumTree {
    /// A tree over these numbers, none of which is negative.
    pub fn new(values: impl ExactSizeIterator<Item = f64>) -> Self {
        let leaves = values.len().next_power_of_two();
        let mut nodes = vec![0.0; leaves];
        nodes.extend(values);
        nodes.resize(2 * leaves, 0.0);
        for index in (1..leaves).rev() {
            nodes[index] = nodes[2 * index] + nodes[2 * index + 1];
        }
        SumTree { nodes, leaves }
    }

    /// The sum of all.
    pub fn total(&self) -> f64 {
        self.nodes[1]
    }

    /// One number.
    pub fn get(&self, place: usize) -> f64 {
        self.nodes[self.leaves + place]
    }

    /// Changes a number.
    pub fn set(&mut self, place: usize, value: f64) {
        debug_assert!(value.is_finite() && value >= 0.0, "{value} at {place}");
        let mut index = self.leaves + place;
        self.nodes[index] = value;
        while index > 1 {
            index /= 2;
            self.nodes[index] = self.nodes[2 * index] + self.nodes[2 * index + 1];
        }
    }

    /// The place at which the sum of the numbers up to it passes `mass`; for a mass from 0 to less than the total, a place whose number is not 0.
    pub fn find(&self, mut mass: f64) -> usize {
        let mut index = 1;
        while index < self.leaves {
            let left = self.nodes[2 * index];
            // Rounding may carry a mass beyond the right side's sum: then the left side is the one that has something.
            let go_left = mass < left || self.nodes[2 * index + 1] == 0.0;
            if !go_left {
                mass -= left;
            }
            index = 2 * index + usize::from(!go_left);
        }
        index - self.leaves
    }
}

/// A binary tree of least numbers: one is changed in log n steps, the least of all is at hand.
#[derive(Debug, Clone)]
pub struct MinTree {
    /// Leaves in the second half, the least of all at 1.
    nodes: Vec<f64>,
    leaves: usize,
}

impl MinTree {
    /// A tree over these numbers; infinity stands for none.
    pub fn new(values: impl ExactSizeIterator<Item = f64>) -> Self {
        let leaves = values.len().next_power_of_two();
        let mut nodes = vec![f64::INFINITY; leaves];
        nodes.extend(values);
        nodes.resize(2 * leaves, f64::INFINITY);
        for index in (1..leaves).rev() {
            nodes[index] = nodes[2 * index].min(nodes[2 * index + 1]);
        }
        MinTree { nodes, leaves }
    }

    /// The least of all; infinity if there is none.
    pub fn least(&self) -> f64 {
        self.nodes[1]
    }

    /// Changes a number.
    pub fn set(&mut self, place: usize, value: f64) {
        let mut index = self.leaves + place;
        self.nodes[index] = value;
        while index > 1 {
            index /= 2;
            self.nodes[index] = self.nodes[2 * index].min(self.nodes[2 * index + 1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_in_proportion_and_never_what_is_zero() {
        let values = [0.0, 1.0, 0.0, 3.0, 4.0, 0.0, 2.0];
        let mut tree = SumTree::new(values.into_iter());
        assert_eq!(tree.total(), 10.0);
        let mut counts = [0; 7];
        for step in 0..1000 {
            counts[tree.find(f64::from(step) / 100.0)] += 1;
        }
        assert_eq!(counts, [0, 100, 0, 300, 400, 0, 200]);
        // A mass that rounding made too large.
        assert_eq!((tree.find(10.0), tree.find(11.0)), (6, 6));
        tree.set(6, 0.0);
        assert_eq!((tree.total(), tree.get(4), tree.find(8.0)), (8.0, 4.0, 4));
    }

    #[test]
    fn the_order_of_changes_does_not_matter() {
        let mut tree = SumTree::new(vec![0.1; 37].into_iter());
        (0..37).rev().chain(5..20).for_each(|place| tree.set(place, (place as f64).sqrt() / 3.0));
        let fresh = SumTree::new((0..37).map(|place| f64::from(place).sqrt() / 3.0));
        assert_eq!(tree.nodes, fresh.nodes);
        assert_eq!(SumTree::new(std::iter::once(2.0)).find(1.0), 0);
    }

    #[test]
    fn the_least_is_that_of_a_scan() {
        let mut values: Vec<f64> = (0..37).map(|place| f64::from(place % 7) + 1.0).collect();
        let mut tree = MinTree::new(values.iter().copied());
        assert_eq!(tree.least(), 1.0);
        for step in 0..200usize {
            let place = step * 11 % 37;
            values[place] = if step.is_multiple_of(3) { f64::INFINITY } else { ((step * 29) % 101) as f64 + 0.5 };
            tree.set(place, values[place]);
            assert_eq!(tree.least(), values.iter().copied().fold(f64::INFINITY, f64::min), "step {step}");
        }
        (0..37).for_each(|place| tree.set(place, f64::INFINITY));
        assert_eq!((tree.least(), MinTree::new(std::iter::once(2.0)).least()), (f64::INFINITY, 2.0));
    }
}
