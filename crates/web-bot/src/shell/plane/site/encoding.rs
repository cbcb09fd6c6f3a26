//! Which compressed form of a file a client may have (RFC 9110, 12.5.3), and how the forms are made.

use std::io::Write;

use bytes::Bytes;
use hyper::{HeaderMap, header};

/// A form in which a file may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// As it is.
    Identity,
    Gzip,
    Zstd,
    Brotli,
}

/// The compressed forms, the best first when a client likes them alike: smallest first.
pub(super) const COMPRESSED: [Encoding; 3] = [Encoding::Brotli, Encoding::Zstd, Encoding::Gzip];

/// A smaller file than this gains nothing: it fits one packet either way.
const COMPRESS_BYTES_MIN: usize = 256;

/// Brotli at its best takes a second for every megabyte: worth it for pages, not for what is large.
const BROTLI_BEST_BYTES_MAX: usize = 256 * 1024;

/// A list longer than this is no client's: the rest of it is not read.
const ASKED_MAX: usize = 32;

impl Encoding {
    pub(super) const fn index(self) -> usize {
        match self {
            Self::Identity => 0,
            Self::Gzip => 1,
            Self::Zstd => 2,
            Self::Brotli => 3,
        }
    }

    /// As in `Content-Encoding`; nothing for a file as it is.
    pub(super) const fn name(self) -> Option<&'static str> {
        match self {
            Self::Identity => None,
            Self::Gzip => Some("gzip"),
            Self::Zstd => Some("zstd"),
            Self::Brotli => Some("br"),
        }
    }

    /// What is appended to the blob's id: another form is another representation, and a strong entity tag tells them
    /// apart.
    pub(super) const fn etag_suffix(self) -> &'static str {
        match self {
            Self::Identity => "",
            Self::Gzip => "-gz",
            Self::Zstd => "-zst",
            Self::Brotli => "-br",
        }
    }

    fn compress(self, data: &[u8]) -> std::io::Result<Vec<u8>> {
        match self {
            Self::Identity => Ok(data.to_vec()),
            Self::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(7));
                encoder.write_all(data)?;
                encoder.finish()
            }
            Self::Zstd => zstd::bulk::compress(data, 12),
            Self::Brotli => {
                let quality = if data.len() <= BROTLI_BEST_BYTES_MAX { 9 } else { 5 };
                let params = brotli::enc::BrotliEncoderParams { quality, lgwin: 22, ..Default::default() };
                let mut compressed = Vec::new();
                brotli::BrotliCompress(&mut &*data, &mut compressed, &params)?;
                Ok(compressed)
            }
        }
    }
}

/// Makes one form of a file; nothing if it would not be smaller by a tenth at least.
pub(super) fn compressed(encoding: Encoding, data: &[u8]) -> Option<Bytes> {
    if data.len() < COMPRESS_BYTES_MIN {
        return None;
    }
    let made = encoding.compress(data).ok()?;
    (made.len() < data.len() - data.len() / 10).then(|| Bytes::from(made))
}

/// How much a client likes the forms, in thousandths; 0 is a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wishes([u16; 4]);

/// The form to send, of those that `there` knows.
pub(super) fn choose(headers: &HeaderMap, there: impl Fn(Encoding) -> bool) -> Encoding {
    if !headers.contains_key(header::ACCEPT_ENCODING) {
        return Encoding::Identity;
    }
    let lists = headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    best(read(lists), there)
}

/// The same for one list, as it is in a head.
pub(super) fn choose_from(list: &str, there: impl Fn(Encoding) -> bool) -> Encoding {
    best(read(std::iter::once(list)), there)
}

fn best(Wishes(wishes): Wishes, there: impl Fn(Encoding) -> bool) -> Encoding {
    let mut best = (Encoding::Identity, 0);
    for encoding in COMPRESSED {
        let wish = wishes[encoding.index()];
        if wish > best.1 && there(encoding) {
            best = (encoding, wish);
        }
    }
    // As it is only if the client likes that better than what we have compressed.
    if wishes[Encoding::Identity.index()] > best.1 { Encoding::Identity } else { best.0 }
}

fn read<'v>(lists: impl Iterator<Item = &'v str>) -> Wishes {
    let (mut named, mut any) = ([None; 4], None);
    for item in lists.flat_map(|list| list.split(',')).take(ASKED_MAX) {
        let mut parts = item.split(';').map(str::trim);
        let Some(name) = parts.next() else { continue };
        let weight =
            parts.find_map(|p| p.strip_prefix("q=").or_else(|| p.strip_prefix("Q="))).map_or(1_000, thousandths);
        let known = [
            (Encoding::Identity, "identity"),
            (Encoding::Gzip, "gzip"),
            (Encoding::Gzip, "x-gzip"),
            (Encoding::Zstd, "zstd"),
            (Encoding::Brotli, "br"),
        ];
        if name == "*" {
            any = Some(weight);
        } else if let Some((encoding, _)) = known.iter().find(|(_, known)| known.eq_ignore_ascii_case(name)) {
            named[encoding.index()] = Some(weight);
        }
    }
    let mut wishes = named.map(|wish| wish.or(any).unwrap_or(0));
    // A file as it is is welcome unless it is refused; unnamed, it is the last choice.
    wishes[0] = named[0].unwrap_or(if any == Some(0) { 0 } else { 1 });
    Wishes(wishes)
}

/// `0.345` in thousandths; what is no number is a refusal.
fn thousandths(text: &str) -> u16 {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let part: String = part.chars().chain("000".chars()).take(3).collect();
    match (whole.parse::<u16>(), part.parse::<u16>()) {
        (Ok(0), Ok(part)) => part,
        (Ok(1), Ok(_)) => 1_000,
        (Ok(_) | Err(_), Ok(_) | Err(_)) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(accept: &[&str]) -> Encoding {
        let mut headers = HeaderMap::new();
        for value in accept {
            headers.append(header::ACCEPT_ENCODING, value.parse().expect("value"));
        }
        choose(&headers, |_| true)
    }

    #[test]
    fn the_client_is_asked() {
        assert_eq!(chosen(&[]), Encoding::Identity);
        assert_eq!(chosen(&["gzip, deflate, br, zstd"]), Encoding::Brotli);
        assert_eq!(chosen(&["gzip, deflate"]), Encoding::Gzip);
        assert_eq!(chosen(&["gzip", "zstd"]), Encoding::Zstd);
        assert_eq!(chosen(&["br;q=0.5, gzip;q=0.8, *;q=0"]), Encoding::Gzip);
        assert_eq!(chosen(&["*"]), Encoding::Brotli);
        assert_eq!(chosen(&["br;q=0, *"]), Encoding::Zstd);
        assert_eq!(chosen(&["identity, gzip;q=0.5"]), Encoding::Identity);
        assert_eq!(chosen(&["X-GZIP ; q=1.0"]), Encoding::Gzip);
        assert_eq!(chosen(&["gzip;q=nonsense"]), Encoding::Identity);
        assert_eq!(chosen(&["", ",,,;q=1"]), Encoding::Identity);
    }

    #[test]
    fn what_is_not_there_is_not_chosen() {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT_ENCODING, "br, gzip;q=0.1".parse().expect("value"));
        assert_eq!(choose(&headers, |e| e == Encoding::Gzip), Encoding::Gzip);
        assert_eq!(choose(&headers, |_| false), Encoding::Identity);
    }

    #[test]
    fn every_form_can_be_read_again() {
        use std::io::Read;
        let data = "one word after the other, ".repeat(400);
        let [gzip, zstd, brotli] = [Encoding::Gzip, Encoding::Zstd, Encoding::Brotli]
            .map(|e| compressed(e, data.as_bytes()).expect("smaller"));
        let mut text = String::new();
        flate2::read::GzDecoder::new(&*gzip).read_to_string(&mut text).expect("gzip");
        assert_eq!(text, data);
        assert_eq!(zstd::bulk::decompress(&zstd, 1 << 20).expect("zstd"), data.as_bytes());
        let mut text = Vec::new();
        brotli::BrotliDecompress(&mut &*brotli, &mut text).expect("brotli");
        assert_eq!(text, data.as_bytes());
        assert!(compressed(Encoding::Gzip, b"short").is_none());
    }
}
