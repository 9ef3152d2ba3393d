//! Messages that can grow.
//!
//! A message is a row of fields, each with a tag and a length: whoever does not know a tag passes over it, unless the field
//! says that nothing may be made of the message without it. What stands in a field is another message, a text, bytes, or a
//! value of fixed form in postcard's encoding, behind which more may follow. `docs/wire.md` has every byte.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

/// Most times that one field may repeat in a message: bounds what a few bytes can unfold to.
pub const MAX_REPEATED: usize = 16_384;
/// Longest variable-length integer, in bytes: seven bits each, the lowest first.
const MAX_VARINT_BYTES: usize = 10;

/// Why bytes are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The announced length is over the reader's limit; nothing was allocated for it.
    #[error("{length} bytes are over the limit of {limit}")]
    TooLong {
        /// What is announced, in bytes.
        length: usize,
        /// The reader's limit, in bytes.
        limit: usize,
    },
    /// A field repeats too often.
    #[error("a field comes more than {MAX_REPEATED} times")]
    TooMany,
    /// A field without which the message says nothing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field that cannot be passed over: the writer is newer, or no friend.
    #[error("field {0} is not known to this version, and must not be passed over")]
    NotUnderstood(u64),
    /// Anything else.
    #[error("{0}")]
    Malformed(String),
}

/// What a reader does with a tag that it does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// Passes over it, unless the field is critical.
    Ignored,
    /// Passes over all, also those that are critical: to look at the rest of something that is not acted upon.
    Skipped,
    /// Refuses: for those who read only what they wrote themselves.
    Refused,
}

/// Something that is written as a row of fields.
pub trait Message: Sized {
    /// Appends the fields.
    fn write(&self, out: &mut Vec<u8>);
    /// Reads all of `bytes`.
    fn read(bytes: &[u8], unknown: Unknown) -> Result<Self, WireError>;
}

/// The encoding of a message.
pub fn encode<T: Message>(message: &T) -> Vec<u8> {
    let mut out = Vec::new();
    message.write(&mut out);
    out
}

/// Reads a message; unknown fields are passed over.
pub fn decode<T: Message>(bytes: &[u8]) -> Result<T, WireError> {
    T::read(bytes, Unknown::Ignored)
}

/// Appends a variable-length integer: seven bits a byte, the lowest first, the top bit set on all but the last.
pub fn put_varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Takes a variable-length integer off the front; `None` if it is cut short or too long.
pub fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for (at, byte) in bytes.iter().take(MAX_VARINT_BYTES).enumerate() {
        let bits = u64::from(byte & 0x7f);
        if at == MAX_VARINT_BYTES - 1 && bits > 1 {
            return None;
        }
        number |= bits << (7 * at);
        if byte & 0x80 == 0 {
            *bytes = &bytes[at + 1..];
            return Some(number);
        }
    }
    None
}

/// The fields of a message: key (tag times two, plus one if critical), length, bytes.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Fields<'a> {
    /// Tag, whether critical, and content.
    type Item = Result<(u64, bool, &'a [u8]), WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = (|| {
            let key = take_varint(&mut self.0)?;
            let length = usize::try_from(take_varint(&mut self.0)?).ok()?;
            let (value, rest) = self.0.split_at_checked(length)?;
            self.0 = rest;
            Some((key >> 1, key & 1 == 1, value))
        })();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or_else(|| WireError::Malformed("a field is cut short".into())))
    }
}

/// Takes so many bytes off the front: a part of a prefix.
pub(crate) fn take_array<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], WireError> {
    let (head, rest) =
        bytes.split_first_chunk().ok_or_else(|| WireError::Malformed("the prefix is cut short".into()))?;
    *bytes = rest;
    Ok(*head)
}

/// Appends one field.
pub(crate) fn put_field(tag: u64, value: &[u8], out: &mut Vec<u8>) {
    put_varint(tag << 1, out);
    put_varint(value.len() as u64, out);
    out.extend_from_slice(value);
}

impl Unknown {
    /// A tag that is not known.
    pub(crate) fn meet(self, tag: u64, critical: bool) -> Result<(), WireError> {
        match self {
            Self::Refused => Err(WireError::NotUnderstood(tag)),
            Self::Ignored if critical => Err(WireError::NotUnderstood(tag)),
            _ => Ok(()),
        }
    }
}

/// What can stand in a field.
pub(crate) trait Value: Sized {
    /// Appends it as a field of that tag.
    fn put(&self, tag: u64, out: &mut Vec<u8>);
    /// Takes one more field of its tag.
    fn take(slot: &mut Option<Self>, value: &[u8], unknown: Unknown) -> Result<(), WireError>;
    /// What an absent field means: only some values need not be written.
    fn absent() -> Option<Self> {
        None
    }
    /// Whether it is what an absent field means.
    fn is_absent(&self) -> bool {
        false
    }
}

/// Sets a field that comes once.
pub(crate) fn once<T>(slot: &mut Option<T>, value: T) -> Result<(), WireError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(WireError::Malformed("a field comes twice".into())),
    }
}

/// A value of fixed form, in postcard's encoding; what follows it is ignored.
pub(crate) fn put_fixed<T: Serialize>(value: &T, tag: u64, out: &mut Vec<u8>) {
    put_field(tag, &postcard::to_stdvec(value).expect("values of fixed form are encodable"), out);
}

pub(crate) fn read_fixed<T: DeserializeOwned>(value: &[u8]) -> Result<T, WireError> {
    postcard::take_from_bytes(value).map(|(value, _)| value).map_err(|e| WireError::Malformed(e.to_string()))
}

/// Values of fixed form that must be there.
macro_rules! fixed {
    ($($type:ty),+ $(,)?) => { $(
        impl $crate::wire::Value for $type {
            fn put(&self, tag: u64, out: &mut Vec<u8>) {
                $crate::wire::put_fixed(self, tag, out);
            }
            fn take(
                slot: &mut Option<Self>,
                value: &[u8],
                _: $crate::wire::Unknown,
            ) -> Result<(), $crate::wire::WireError> {
                $crate::wire::once(slot, $crate::wire::read_fixed(value)?)
            }
        }
    )+ };
}
pub(crate) use fixed;

fixed!(std::net::SocketAddr, [u8; 16], [u8; 32]);

/// Numbers, of which none is zero.
macro_rules! numbers {
    ($($type:ty),+ $(,)?) => { $(
        impl Value for $type {
            fn put(&self, tag: u64, out: &mut Vec<u8>) {
                put_fixed(self, tag, out);
            }
            fn take(slot: &mut Option<Self>, value: &[u8], _: Unknown) -> Result<(), WireError> {
                once(slot, read_fixed(value)?)
            }
            fn absent() -> Option<Self> {
                Some(Self::default())
            }
            fn is_absent(&self) -> bool {
                *self == Self::default()
            }
        }
    )+ };
}

numbers!(bool, u16, u32, u64);

impl Value for String {
    fn put(&self, tag: u64, out: &mut Vec<u8>) {
        put_field(tag, self.as_bytes(), out);
    }
    fn take(slot: &mut Option<Self>, value: &[u8], _: Unknown) -> Result<(), WireError> {
        let text = std::str::from_utf8(value).map_err(|_| WireError::Malformed("not UTF-8".into()))?;
        once(slot, text.to_owned())
    }
    fn absent() -> Option<Self> {
        Some(Self::new())
    }
    fn is_absent(&self) -> bool {
        self.is_empty()
    }
}

impl Value for Bytes {
    fn put(&self, tag: u64, out: &mut Vec<u8>) {
        put_field(tag, self, out);
    }
    fn take(slot: &mut Option<Self>, value: &[u8], _: Unknown) -> Result<(), WireError> {
        once(slot, Self::copy_from_slice(value))
    }
    fn absent() -> Option<Self> {
        Some(Self::new())
    }
    fn is_absent(&self) -> bool {
        self.is_empty()
    }
}

impl<T: Value> Value for Option<T> {
    fn put(&self, tag: u64, out: &mut Vec<u8>) {
        if let Some(value) = self {
            value.put(tag, out);
        }
    }
    fn take(slot: &mut Option<Self>, value: &[u8], unknown: Unknown) -> Result<(), WireError> {
        let mut inner = slot.take().flatten();
        T::take(&mut inner, value, unknown)?;
        *slot = Some(inner);
        Ok(())
    }
    fn absent() -> Option<Self> {
        Some(None)
    }
}

/// One field for each.
impl<T: Value> Value for Vec<T> {
    fn put(&self, tag: u64, out: &mut Vec<u8>) {
        self.iter().for_each(|value| value.put(tag, out));
    }
    fn take(slot: &mut Option<Self>, value: &[u8], unknown: Unknown) -> Result<(), WireError> {
        let list = slot.get_or_insert_default();
        if list.len() >= MAX_REPEATED {
            return Err(WireError::TooMany);
        }
        let mut item = None;
        T::take(&mut item, value, unknown)?;
        list.extend(item);
        Ok(())
    }
    fn absent() -> Option<Self> {
        Some(Self::new())
    }
}

impl<T: Value> Value for Arc<T> {
    fn put(&self, tag: u64, out: &mut Vec<u8>) {
        T::put(self, tag, out);
    }
    fn take(slot: &mut Option<Self>, value: &[u8], unknown: Unknown) -> Result<(), WireError> {
        let mut inner = None;
        T::take(&mut inner, value, unknown)?;
        inner.map_or(Ok(()), |inner| once(slot, Arc::new(inner)))
    }
}

/// A message as a field of another.
pub(crate) fn put_message<T: Message>(message: &T, tag: u64, out: &mut Vec<u8>) {
    put_field(tag, &encode(message), out);
}

/// How a struct is written: its fields by tag. Those that are not written when they are empty may be absent. What is `given`
/// stands elsewhere, in a prefix, and the type gets functions of its own instead of [`Message`].
macro_rules! message {
    ($type:ty { $($tag:literal $field:ident),* $(,)? }) => {
        $crate::wire::message!($type, given () { $($tag $field),* });

        impl $crate::wire::Message for $type {
            fn write(&self, out: &mut Vec<u8>) {
                self.write_fields(out);
            }
            fn read(bytes: &[u8], unknown: $crate::wire::Unknown) -> Result<Self, $crate::wire::WireError> {
                Self::read_fields(bytes, unknown)
            }
        }
    };
    ($type:ty, given ($($given:ident: $given_type:ty),*) { $($tag:literal $field:ident),* $(,)? }) => {
        impl $type {
            fn write_fields(&self, out: &mut Vec<u8>) {
                let _ = &out;
                $( if !$crate::wire::Value::is_absent(&self.$field) {
                    $crate::wire::Value::put(&self.$field, $tag, out);
                } )*
            }

            fn read_fields(
                bytes: &[u8],
                unknown: $crate::wire::Unknown,
                $($given: $given_type),*
            ) -> Result<Self, $crate::wire::WireError> {
                $( let mut $field = None; )*
                for field in $crate::wire::Fields(bytes) {
                    let (tag, critical, value) = field?;
                    match tag {
                        $( $tag => {
                            let taken = $crate::wire::Value::take(&mut $field, value, unknown);
                            taken.map_err(|e| e.within(stringify!($field)))?;
                        } )*
                        _ => {
                            let _ = value;
                            unknown.meet(tag, critical)?;
                        }
                    }
                }
                Ok(Self {
                    $($given,)*
                    $( $field: $field
                        .or_else($crate::wire::Value::absent)
                        .ok_or($crate::wire::WireError::Missing(stringify!($field)))?, )*
                })
            }
        }
    };
}
pub(crate) use message;

/// Messages that stand in fields of others.
macro_rules! nested {
    ($($type:ty),+ $(,)?) => { $(
        impl $crate::wire::Value for $type {
            fn put(&self, tag: u64, out: &mut Vec<u8>) {
                $crate::wire::put_message(self, tag, out);
            }
            fn take(
                slot: &mut Option<Self>,
                value: &[u8],
                unknown: $crate::wire::Unknown,
            ) -> Result<(), $crate::wire::WireError> {
                $crate::wire::once(slot, <Self as $crate::wire::Message>::read(value, unknown)?)
            }
        }
    )+ };
}
pub(crate) use nested;

/// A choice that later versions may add to: a number, of which some have names here.
macro_rules! open_enum {
    ($(#[$doc:meta])* $type:ident { $( $(#[$variant_doc:meta])* $number:literal $variant:ident $text:literal ),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $type {
            $( $(#[$variant_doc])* $variant, )+
            /// One that this version does not know.
            Unknown(u8),
        }

        impl $type {
            /// Its number on the wire.
            pub fn number(self) -> u8 {
                match self {
                    $( Self::$variant => $number, )+
                    Self::Unknown(number) => number,
                }
            }
        }

        impl From<u8> for $type {
            fn from(number: u8) -> Self {
                match number {
                    $( $number => Self::$variant, )+
                    _ => Self::Unknown(number),
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self {
                    $( Self::$variant => f.pad($text), )+
                    Self::Unknown(number) => f.pad(&format!("unknown-{number}")),
                }
            }
        }

        /// As JSON: its name.
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = String::deserialize(d)?;
                let number = || text.strip_prefix("unknown-")?.parse::<u8>().ok();
                match text.as_str() {
                    $( $text => Ok(Self::$variant), )+
                    _ => number().map(Self::from).ok_or_else(|| {
                        serde::de::Error::unknown_variant(&text, &[$($text),+])
                    }),
                }
            }
        }

        impl $crate::wire::Value for $type {
            fn put(&self, tag: u64, out: &mut Vec<u8>) {
                $crate::wire::put_fixed(&self.number(), tag, out);
            }
            fn take(
                slot: &mut Option<Self>,
                value: &[u8],
                _: $crate::wire::Unknown,
            ) -> Result<(), $crate::wire::WireError> {
                $crate::wire::once(slot, $crate::wire::read_fixed::<u8>(value)?.into())
            }
            fn absent() -> Option<Self> {
                Some(Self::from(0))
            }
            fn is_absent(&self) -> bool {
                self.number() == 0
            }
        }
    };
}
pub(crate) use open_enum;

impl WireError {
    /// Says in which field.
    pub(crate) fn within(self, field: &'static str) -> Self {
        match self {
            Self::Malformed(why) => Self::Malformed(format!("{field}: {why}")),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Old {
        name: String,
        numbers: Vec<u32>,
        inner: Option<Inner>,
    }
    message!(Old { 1 name, 2 numbers, 3 inner });

    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Inner {
        key: [u8; 16],
    }
    message!(Inner { 1 key });
    nested!(Inner);

    /// The same, grown.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct New {
        name: String,
        numbers: Vec<u32>,
        inner: Option<Inner>,
        weight: u64,
        note: Option<String>,
    }
    message!(New { 1 name, 2 numbers, 3 inner, 4 weight, 9 note });

    fn old() -> Old {
        Old { name: "orders".into(), numbers: vec![7, 0, 300], inner: Some(Inner { key: [3; 16] }) }
    }

    #[test]
    fn both_versions_read_each_other() {
        let Old { name, numbers, inner } = old();
        let new = New { name, numbers, inner, weight: 300, note: Some(String::new()) };
        assert_eq!(decode::<Old>(&encode(&new)), Ok(old()));
        let read: New = decode(&encode(&old())).unwrap();
        assert_eq!(read, New { weight: 0, note: None, ..new.clone() });
        assert_eq!(decode::<New>(&encode(&new)), Ok(new));
    }

    #[test]
    fn a_critical_field_is_not_passed_over_but_by_who_does_nothing() {
        let mut bytes = encode(&old());
        let unknown = bytes.len();
        put_field(77, b"later", &mut bytes);
        assert_eq!(decode::<Old>(&bytes), Ok(old()));
        assert_eq!(Old::read(&bytes, Unknown::Refused), Err(WireError::NotUnderstood(77)));
        bytes[unknown] |= 1;
        assert_eq!(decode::<Old>(&bytes), Err(WireError::NotUnderstood(77)));
        assert_eq!(Old::read(&bytes, Unknown::Skipped), Ok(old()));
    }

    #[test]
    fn what_follows_a_value_is_ignored_and_what_is_missing_is_said() {
        let mut bytes = Vec::new();
        put_field(2, &[7, 9, 9], &mut bytes);
        assert_eq!(decode::<Old>(&bytes).unwrap().numbers, [7]);
        assert_eq!(decode::<Inner>(&[]), Err(WireError::Missing("key")));
        for twice in [[1 << 1, 0, 1 << 1, 0], [3 << 1, 0, 3 << 1, 0]] {
            assert!(decode::<Old>(&twice).is_err());
        }
    }

    #[test]
    fn a_few_bytes_do_not_unfold_without_bound() {
        let bytes = [2 << 1, 1, 0].repeat(MAX_REPEATED);
        assert_eq!(decode::<Old>(&bytes).unwrap().numbers.len(), MAX_REPEATED);
        assert_eq!(decode::<Old>(&[&bytes[..], &[2 << 1, 1, 0]].concat()), Err(WireError::TooMany));
    }

    proptest! {
        #[test]
        fn integers_come_back(number: u64, more in proptest::collection::vec(any::<u8>(), 0..3)) {
            let mut bytes = Vec::new();
            put_varint(number, &mut bytes);
            let encoded = bytes.len();
            bytes.extend(&more);
            let mut rest = &bytes[..];
            prop_assert_eq!(take_varint(&mut rest), Some(number));
            prop_assert_eq!(rest, &more[..]);
            prop_assert_eq!(take_varint(&mut &bytes[..encoded - 1]), None);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(read) = decode::<New>(&bytes) {
                prop_assert_eq!(decode::<New>(&encode(&read)), Ok(read));
            }
            let _ = take_varint(&mut &bytes[..]);
        }
    }
}
