//! Counter-based random numbers: a value is a function of (seed, stream, counter), so a position in the data is a few
//! integers and never a generator's hidden state.

/// SplitMix64's finaliser (Steele, Lea, Flood 2014) over a counter.
pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A stream's key from its seed and what tells it apart.
pub fn key(seed: u64, stream: &str, part: u64) -> u64 {
    let hash = blake3::hash(stream.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    mix(mix(seed ^ u64::from_le_bytes(first)) ^ part)
}

/// A permutation of 0..n (Fisher-Yates) that depends on `key` alone.
pub fn permutation(key: u64, n: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n as u32).collect();
    for i in (1..n).rev() {
        // The multiply-shift range reduction's bias is below n/2^64.
        let draw = mix(key ^ (i as u64).wrapping_mul(0xd134_2543_de82_ef95));
        let j = ((u128::from(draw) * (i as u128 + 1)) >> 64) as usize;
        order.swap(i, j);
    }
    order
}
