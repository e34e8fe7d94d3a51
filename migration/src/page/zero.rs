//! Is a page all zeroes?

/// Bytes looked at between two decisions: a cache line pair, as eight lanes of 16 bytes.
const STRIDE: usize = 128;

/// Whether `data` holds nothing but zeroes.
///
/// Most pages that are not zero show it in their first line, so the test gives up after each [`STRIDE`]; within it the
/// words are or-ed without a branch, which the compiler turns into vector instructions of whatever width the target has.
pub fn is_zero(data: &[u8]) -> bool {
    let strides = data.chunks_exact(STRIDE);
    let rest = strides.remainder();
    for stride in strides {
        let mut any = 0u64;
        for word in stride.chunks_exact(8) {
            any |= u64::from_ne_bytes([word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]]);
        }
        if any != 0 {
            return false;
        }
    }
    rest.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_single_set_bit_anywhere() {
        for length in [1, 127, 128, 129, 4096, 4100] {
            let mut data = vec![0u8; length];
            assert!(is_zero(&data));
            for at in 0..length {
                data[at] = 0x10;
                assert!(!is_zero(&data), "{at} of {length}");
                data[at] = 0;
            }
        }
    }
}
