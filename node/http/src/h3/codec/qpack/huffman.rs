//! Huffman codes of strings (RFC 7541 Appendix B). Only decoding: what is sent is short, and plain text costs no time.

use std::sync::LazyLock;

use bytes::BytesMut;

/// Length of each symbol's code in bits; the last symbol is EOS. The code is canonical: codes of one length follow each
/// other in the order of their symbols, so that the lengths say all.
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28,
    28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12,
    10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6,
    5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22,
    22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20,
    22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28,
    27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28,
    27, 27, 27, 27, 27, 26, 30,
];
const EOS: u16 = 256;
const LONGEST: usize = 30;
/// Codes up to this length are looked up at once.
const SHORT: usize = 9;

struct Decoder {
    /// By the next [`SHORT`] bits: symbol and length; length 0 for longer codes.
    short: [(u16, u8); 1 << SHORT],
    /// By length: the first code, and where its symbol stands in `symbols`.
    first: [u32; LONGEST + 1],
    offset: [u16; LONGEST + 1],
    count: [u16; LONGEST + 1],
    /// In the order of their codes.
    symbols: [u16; 257],
}

static DECODER: LazyLock<Box<Decoder>> = LazyLock::new(|| {
    let mut decoder = Box::new(Decoder {
        short: [(0, 0); 1 << SHORT],
        first: [0; LONGEST + 1],
        offset: [0; LONGEST + 1],
        count: [0; LONGEST + 1],
        symbols: [0; 257],
    });
    let (mut code, mut at) = (0u32, 0usize);
    for length in 1..=LONGEST {
        code <<= 1;
        decoder.first[length] = code;
        decoder.offset[length] = at as u16;
        for (symbol, own) in LENGTHS.iter().enumerate() {
            if *own as usize != length {
                continue;
            }
            decoder.symbols[at] = symbol as u16;
            if length <= SHORT {
                let from = (code as usize) << (SHORT - length);
                decoder.short[from..from + (1 << (SHORT - length))].fill((symbol as u16, length as u8));
            }
            decoder.count[length] += 1;
            (code, at) = (code + 1, at + 1);
        }
    }
    decoder
});

/// Not a Huffman code: EOS in it, or padding that is longer than 7 bits or not all ones (RFC 7541 §5.2).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Invalid;

/// Appends what `coded` means: at most 8/5 of its length.
pub(super) fn decode(coded: &[u8], out: &mut BytesMut) -> Result<(), Invalid> {
    let decoder = &**DECODER;
    out.reserve(coded.len() * 8 / 5);
    let (mut bits, mut held) = (0u64, 0usize);
    let mut rest = coded.iter();
    loop {
        while held <= 56 {
            let Some(byte) = rest.next() else { break };
            bits = bits << 8 | u64::from(*byte);
            held += 8;
        }
        if held == 0 {
            return Ok(());
        }
        // The next bits, with ones behind the end, as padding has.
        let window = |length: usize| {
            let filled = if held >= length {
                bits >> (held - length)
            } else {
                let missing = length - held;
                bits << missing | ((1 << missing) - 1)
            };
            (filled & ((1 << length) - 1)) as u32
        };
        let (symbol, length) = match decoder.short[window(SHORT) as usize] {
            (symbol, length) if length > 0 => (symbol, length as usize),
            _ => {
                let long = (SHORT + 1..=LONGEST).find_map(|length| {
                    let nth = window(length).wrapping_sub(decoder.first[length]);
                    (nth < u32::from(decoder.count[length]))
                        .then(|| (decoder.symbols[decoder.offset[length] as usize + nth as usize], length))
                });
                long.ok_or(Invalid)?
            }
        };
        if length > held {
            // What is left is no whole code: padding, which is the start of EOS.
            let padding = bits & ((1 << held) - 1);
            return if held < 8 && padding == (1 << held) - 1 { Ok(()) } else { Err(Invalid) };
        }
        if symbol == EOS {
            return Err(Invalid);
        }
        out.extend_from_slice(&[symbol as u8]);
        held -= length;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decoded(coded: &[u8]) -> Result<Vec<u8>, Invalid> {
        let mut out = BytesMut::new();
        decode(coded, &mut out).map(|()| out.to_vec())
    }

    /// A plain encoder, to have something to decode.
    fn encode(text: &[u8]) -> Vec<u8> {
        let mut codes = [(0u64, 0u32); 257];
        let mut order: Vec<usize> = (0..257).collect();
        order.sort_by_key(|symbol| (LENGTHS[*symbol], *symbol));
        let (mut code, mut length) = (0u64, LENGTHS[order[0]]);
        for symbol in order {
            code <<= LENGTHS[symbol] - length;
            length = LENGTHS[symbol];
            codes[symbol] = (code, length.into());
            code += 1;
        }
        let (mut out, mut bits, mut held) = (Vec::new(), 0u128, 0);
        for byte in text {
            let (code, length) = codes[*byte as usize];
            (bits, held) = (bits << length | u128::from(code), held + length);
            while held >= 8 {
                out.push((bits >> (held - 8)) as u8);
                held -= 8;
            }
        }
        if held > 0 {
            out.push((bits << (8 - held)) as u8 | (0xff >> held));
        }
        out
    }

    #[test]
    fn the_examples_of_the_rfc() {
        // RFC 7541 §C.4.1, C.6.1
        assert_eq!(
            decoded(&[0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff]).unwrap(),
            b"www.example.com"
        );
        assert_eq!(decoded(&[0x64, 0x02]).unwrap(), b"302");
        assert_eq!(decoded(&[]).unwrap(), b"");
    }

    #[test]
    fn padding_and_eos_are_checked() {
        // "0" is 00000, then padding: ones are right, zeros are not, and 8 bits are too many.
        assert_eq!(decoded(&[0b0000_0111]).unwrap(), b"0");
        for bad in [&[0b0000_0000][..], &[0b0000_0110], &[0b0000_0111, 0xff], &[0xff], &[0xff, 0xff, 0xff, 0xff]] {
            assert_eq!(decoded(bad), Err(Invalid), "{bad:02x?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(decoded(&encode(&text)), Ok(text));
        }

        #[test]
        fn any_bytes_decode_or_are_refused(coded in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(text) = decoded(&coded) {
                prop_assert!(text.len() <= coded.len() * 8 / 5);
                prop_assert_eq!(encode(&text), coded);
            }
        }
    }
}
