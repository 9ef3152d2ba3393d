//! Just enough of MessagePack to read what serf's RPC answers.

use std::io::Read;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

/// Bounds on what is read, against a mistake rather than an attack: depth, and the length of anything with a length.
const MAX_DEPTH: u32 = 8;
const MAX_LENGTH: usize = 1 << 20;

/// Reads one value. Bytes become text, with anything that is not UTF-8 replaced; keys of maps must be text.
pub(crate) fn read(from: &mut impl Read) -> Result<Value> {
    value(from, MAX_DEPTH)
}

fn value(from: &mut impl Read, depth: u32) -> Result<Value> {
    ensure!(depth > 0, "MessagePack deeper than {MAX_DEPTH}");
    let tag = number(from, 1)?;
    Ok(match tag {
        0x00..=0x7f => tag.into(),
        0x80..=0x8f => map(from, tag & 0x0f, depth)?,
        0x90..=0x9f => array(from, tag & 0x0f, depth)?,
        0xa0..=0xbf => text(from, tag & 0x1f)?,
        0xc0 => Value::Null,
        0xc2 => false.into(),
        0xc3 => true.into(),
        0xc4..=0xc6 => number(from, 1 << (tag - 0xc4)).and_then(|length| text(from, length))?,
        0xca => f32::from_bits(number(from, 4)? as u32).into(),
        0xcb => f64::from_bits(number(from, 8)?).into(),
        0xcc..=0xcf => number(from, 1 << (tag - 0xcc))?.into(),
        0xd0..=0xd3 => {
            let bytes = 1 << (tag - 0xd0);
            let unused = 64 - 8 * bytes;
            (((number(from, bytes)? << unused) as i64) >> unused).into()
        }
        0xd9..=0xdb => number(from, 1 << (tag - 0xd9)).and_then(|length| text(from, length))?,
        0xdc | 0xdd => number(from, 2 << (tag - 0xdc)).and_then(|length| array(from, length, depth))?,
        0xde | 0xdf => number(from, 2 << (tag - 0xde)).and_then(|length| map(from, length, depth))?,
        0xe0..=0xff => (tag as u8 as i8).into(),
        _ => bail!("MessagePack of the unknown kind {tag:#x}"),
    })
}

/// A big-endian number of so many bytes, at most eight.
fn number(from: &mut impl Read, bytes: u32) -> Result<u64> {
    let mut buffer = [0; 8];
    from.read_exact(&mut buffer[8 - bytes as usize..]).context("read MessagePack")?;
    Ok(u64::from_be_bytes(buffer))
}

fn bounded(length: u64) -> Result<usize> {
    let length = usize::try_from(length).ok().filter(|length| *length <= MAX_LENGTH);
    length.with_context(|| format!("MessagePack longer than {MAX_LENGTH}"))
}

fn text(from: &mut impl Read, length: u64) -> Result<Value> {
    let mut bytes = vec![0; bounded(length)?];
    from.read_exact(&mut bytes).context("read MessagePack text")?;
    Ok(String::from_utf8_lossy(&bytes).into())
}

fn array(from: &mut impl Read, length: u64, depth: u32) -> Result<Value> {
    (0..bounded(length)?).map(|_| value(from, depth - 1)).collect()
}

fn map(from: &mut impl Read, length: u64, depth: u32) -> Result<Value> {
    let mut entries = Map::new();
    for _ in 0..bounded(length)? {
        let Value::String(key) = value(from, depth - 1)? else { bail!("a MessagePack key that is not text") };
        entries.insert(key, value(from, depth - 1)?);
    }
    Ok(entries.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_kind_is_read_to_its_end() {
        let rows: [(&[u8], Value); 18] = [
            (b"\x07", json!(7)),
            (b"\xff", json!(-1)),
            (b"\xc0", json!(null)),
            (b"\xc3", json!(true)),
            (b"\xcc\xff", json!(255)),
            (b"\xcd\x01\x00", json!(256)),
            (b"\xcf\x00\x00\x00\x01\x00\x00\x00\x00", json!(1u64 << 32)),
            (b"\xd0\x80", json!(-128)),
            (b"\xd1\xff\xfe", json!(-2)),
            (b"\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00", json!(1.5)),
            (b"\xa2ab", json!("ab")),
            (b"\xd9\x02ab", json!("ab")),
            (b"\xda\x00\x02ab", json!("ab")),
            (b"\xc4\x01\xff", json!("\u{fffd}")),
            (b"\x92\x01\x90", json!([1, []])),
            (b"\xdc\x00\x01\x05", json!([5])),
            (b"\x81\xa1k\x80", json!({"k": {}})),
            (b"\xde\x00\x01\xa1k\x05", json!({"k": 5})),
        ];
        for (bytes, expected) in rows {
            let mut rest = bytes;
            assert_eq!(read(&mut rest).unwrap(), expected, "{bytes:x?}");
            assert!(rest.is_empty(), "{bytes:x?}");
            assert!(read(&mut &bytes[..bytes.len() - 1]).is_err(), "{bytes:x?} cut short");
        }
    }

    #[test]
    fn what_cannot_be_right_is_refused() {
        let rows: [&[u8]; 4] = [b"\xc1", b"\x81\x01\x01", b"\xdb\xff\xff\xff\xff", &[0x91; 20]];
        for bytes in rows {
            assert!(read(&mut &*bytes).is_err(), "{bytes:x?}");
        }
    }
}
