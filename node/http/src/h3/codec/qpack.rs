//! QPACK (RFC 9204) without a dynamic table: every field section stands for itself.

mod huffman;
mod static_table;

use bytes::{BufMut, Bytes, BytesMut};

use self::static_table::{ENTRIES, Found};
use crate::h3::{Code, Fault};

/// What a field costs beside its bytes, by the count of RFC 9114 §4.2.2.
const FIELD_OVERHEAD_BYTES: u64 = 32;

/// A name or a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Text {
    /// From the static table: which entry.
    Entry(u8, &'static str),
    /// As it was sent.
    Sent(Bytes),
}

impl Text {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Entry(_, text) => text.as_bytes(),
            Self::Sent(bytes) => bytes,
        }
    }
}

/// One field of a section, in the order in which it was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Its name, unchecked.
    pub name: Text,
    /// Its value, unchecked.
    pub value: Text,
    /// Whether the sender wants it never to be put into a table (RFC 9204 §7.1.3).
    pub sensitive: bool,
}

/// Reads the fields of a section one by one, up to its end or an error. What was not in the static table shares one allocation.
#[derive(Debug)]
pub struct Fields<'a> {
    rest: &'a [u8],
    texts: BytesMut,
    /// What the rest may still count, in bytes.
    left: u64,
}

const fn failed(reason: &'static str) -> Fault {
    Fault::Connection(Code::QPACK_DECOMPRESSION_FAILED, reason)
}

impl<'a> Fields<'a> {
    /// Begins with a section that may count `max_bytes`.
    pub fn new(section: &'a [u8], max_bytes: u64) -> Result<Self, Fault> {
        let mut rest = section;
        let required_inserts = read_integer(&mut rest, 8)?;
        let sign = rest.first().is_some_and(|byte| byte & 0x80 != 0);
        read_integer(&mut rest, 7)?;
        if required_inserts != 0 || sign {
            return Err(failed("a field section that needs a dynamic table"));
        }
        Ok(Self { rest, texts: BytesMut::with_capacity(rest.len() * 5 / 4), left: max_bytes })
    }

    /// The field that starts with that byte, which is still in `rest`.
    fn field(&mut self, first: u8) -> Result<Field, Fault> {
        let dynamic = failed("a reference to a dynamic table of size 0");
        let field = if first & 0x80 != 0 {
            if first & 0x40 == 0 {
                return Err(dynamic);
            }
            let (index, (name, value)) = self.entry(6)?;
            Field { name: Text::Entry(index, name), value: Text::Entry(index, value), sensitive: false }
        } else if first & 0x40 != 0 {
            if first & 0x10 == 0 {
                return Err(dynamic);
            }
            let (index, (name, _)) = self.entry(4)?;
            Field { name: Text::Entry(index, name), value: self.text(7)?, sensitive: first & 0x20 != 0 }
        } else if first & 0x20 != 0 {
            let name = self.text(3)?;
            Field { name, value: self.text(7)?, sensitive: first & 0x10 != 0 }
        } else {
            return Err(dynamic);
        };
        let counts = (field.name.as_bytes().len() + field.value.as_bytes().len()) as u64 + FIELD_OVERHEAD_BYTES;
        self.left = self.left.checked_sub(counts).ok_or(Fault::TooLarge)?;
        Ok(field)
    }

    fn entry(&mut self, prefix: u8) -> Result<(u8, (&'static str, &'static str)), Fault> {
        let index = read_integer(&mut self.rest, prefix)?;
        let entry = usize::try_from(index).ok().and_then(|index| ENTRIES.get(index));
        entry.map(|entry| (index as u8, *entry)).ok_or(failed("a reference beyond the static table"))
    }

    /// A string literal (RFC 9204 §4.1.2), whose length starts in the last `prefix` bits of a byte, behind the Huffman bit.
    fn text(&mut self, prefix: u8) -> Result<Text, Fault> {
        let is_huffman = self.rest.first().is_some_and(|byte| byte & (1 << prefix) != 0);
        let length = read_integer(&mut self.rest, prefix)?;
        let bytes = usize::try_from(length).ok().and_then(|length| self.rest.split_at_checked(length));
        let (bytes, rest) = bytes.ok_or(failed("a string that ends behind its section"))?;
        self.rest = rest;
        if is_huffman {
            huffman::decode(bytes, &mut self.texts).map_err(|_| failed("a string that is no Huffman code"))?;
        } else {
            self.texts.extend_from_slice(bytes);
        }
        Ok(Text::Sent(self.texts.split().freeze()))
    }
}

impl Iterator for Fields<'_> {
    type Item = Result<Field, Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        let first = *self.rest.first()?;
        let field = self.field(first);
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

/// An integer whose first bits are the last `prefix` of a byte (RFC 9204 §4.1.1), of at most 62 bits.
fn read_integer(rest: &mut &[u8], prefix: u8) -> Result<u64, Fault> {
    let cut = failed("a field section ends inside an integer");
    let (first, mut tail) = rest.split_first().ok_or(cut)?;
    let mask = (1u64 << prefix) - 1;
    let mut value = u64::from(*first) & mask;
    if value == mask {
        for shift in (0..).step_by(7) {
            let (byte, more) = tail.split_first().ok_or(cut)?;
            tail = more;
            if shift > 56 {
                return Err(failed("an integer of more than 62 bits"));
            }
            value += u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
    }
    *rest = tail;
    Ok(value)
}

fn put_integer(out: &mut BytesMut, prefix: u8, flags: u8, value: u64) {
    let mask = (1u64 << prefix) - 1;
    if value < mask {
        return out.put_u8(flags | value as u8);
    }
    out.put_u8(flags | mask as u8);
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.put_u8(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.put_u8(rest as u8);
}

/// Lays a field section out, behind what is in the buffer already.
#[derive(Debug)]
pub struct Encoder<'a> {
    out: &'a mut BytesMut,
    /// What the section counts so far, in bytes.
    counts: u64,
}

impl<'a> Encoder<'a> {
    /// Begins a section.
    pub fn new(out: &'a mut BytesMut) -> Self {
        // Required Insert Count and Base: no dynamic table.
        out.put_slice(&[0, 0]);
        Self { out, counts: 0 }
    }

    /// Appends a field, its name in lower case.
    pub fn field(&mut self, name: &[u8], value: &[u8], sensitive: bool) {
        self.counts += (name.len() + value.len()) as u64 + FIELD_OVERHEAD_BYTES;
        match static_table::find(name, value) {
            Some(Found::Both(index)) if !sensitive => return put_integer(self.out, 6, 0xc0, index.into()),
            Some(Found::Both(index) | Found::Name(index)) => {
                put_integer(self.out, 4, 0x50 | u8::from(sensitive) << 5, index.into());
            }
            None => {
                put_integer(self.out, 3, 0x20 | u8::from(sensitive) << 4, name.len() as u64);
                self.out.put_slice(name);
            }
        }
        put_integer(self.out, 7, 0, value.len() as u64);
        self.out.put_slice(value);
    }

    /// What the section counts, in bytes (RFC 9114 §4.2.2).
    pub fn counts(&self) -> u64 {
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Plain = (Vec<u8>, Vec<u8>, bool);

    fn decode(section: &[u8], max_bytes: u64) -> Result<Vec<Plain>, Code> {
        let plain = |field: Result<Field, Fault>| {
            let field = field.map_err(Fault::code)?;
            Ok((field.name.as_bytes().to_vec(), field.value.as_bytes().to_vec(), field.sensitive))
        };
        Fields::new(section, max_bytes).map_err(Fault::code)?.map(plain).collect()
    }

    fn plain(name: &str, value: &str) -> Plain {
        (name.into(), value.into(), false)
    }

    #[test]
    fn the_example_of_the_rfc() {
        // RFC 9204 §B.1
        let section = [&[0x00, 0x00, 0x51, 0x0b][..], b"/index.html"].concat();
        assert_eq!(decode(&section, 1000), Ok(vec![plain(":path", "/index.html")]));
    }

    #[test]
    fn what_needs_a_dynamic_table_fails() {
        for section in [
            &[0x01, 0x00][..],               // a required insert
            &[0x00, 0x80],                   // a base below 0
            &[0x00, 0x00, 0x80],             // indexed, dynamic
            &[0x00, 0x00, 0x40, 0x00],       // a dynamic name's reference
            &[0x00, 0x00, 0x10],             // post-base
            &[0x00, 0x00, 0x00, 0x00],       // a post-base name's reference
            &[0x00, 0x00, 0xff, 0x24],       // static 99
            &[0x00, 0x00, 0x51, 0x05, 0x61], // a value that is cut
            &[0x00, 0x00, 0x51, 0x81, 0x00], // bad Huffman
            &[0x00, 0x00, 0x27, 0xff],       // a name that is cut inside its length
            &[],
            &[0x00],
            &[0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
        ] {
            assert_eq!(decode(section, 1000), Err(Code::QPACK_DECOMPRESSION_FAILED), "{section:x?}");
        }
        // A base above 0 refers to nothing.
        assert_eq!(decode(&[0x00, 0x05, 0xd1], 1000), Ok(vec![plain(":method", "GET")]));
    }

    #[test]
    fn a_section_has_a_limit() {
        // 25 kB on the wire would be 25,000 fields.
        let bomb = [&[0, 0][..], &[0xd1; 25_000]].concat();
        assert_eq!(decode(&bomb, 65_536), Err(Code::H3_EXCESSIVE_LOAD));
        let one = 7 + 3 + 32;
        assert_eq!(decode(&[0, 0, 0xd1], one).map(|f| f.len()), Ok(1));
        assert_eq!(decode(&[0, 0, 0xd1], one - 1), Err(Code::H3_EXCESSIVE_LOAD));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(fields in proptest::collection::vec((
            prop_oneof!["[a-z-]{1,300}", proptest::sample::select(vec![":path", "accept", ":status", "cookie", "x-frame-options"]).prop_map(String::from)],
            prop_oneof!["[ -~]{0,300}", Just("/".to_string()), Just("200".to_string()), Just("deny".to_string())],
            any::<bool>(),
        ), 0..20)) {
            let mut section = BytesMut::new();
            let mut encoder = Encoder::new(&mut section);
            for (name, value, sensitive) in &fields {
                encoder.field(name.as_bytes(), value.as_bytes(), *sensitive);
            }
            let counts = encoder.counts();
            let fields: Vec<Plain> = fields.into_iter().map(|(n, v, s)| (n.into_bytes(), v.into_bytes(), s)).collect();
            prop_assert_eq!(decode(&section, counts), Ok(fields.clone()));
            if !fields.is_empty() {
                prop_assert_eq!(decode(&section, counts - 1), Err(Code::H3_EXCESSIVE_LOAD));
            }
        }

        #[test]
        fn any_section_is_decoded_or_refused(section in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&section, 10_000);
        }
    }
}
