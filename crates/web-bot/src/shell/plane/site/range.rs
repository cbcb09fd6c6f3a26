//! The `Range` header (RFC 9110, 14): which bytes a client wants of a file.

/// More parts than this in one answer are no reader's wish, but an attempt to make us work.
const PARTS_MAX: usize = 16;

/// The bytes `first..=last`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) first: u64,
    pub(super) last: u64,
}

impl Part {
    pub(super) const fn len(self) -> u64 {
        self.last - self.first + 1
    }
}

/// What of the file is to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// All of it: the header makes no sense, or asks for more parts than it is worth.
    Whole,
    /// This part.
    One(Part),
    /// These parts, in the order that was asked for.
    Several(Vec<Part>),
    /// Nothing that the file has.
    Unsatisfiable,
}

/// Reads the header for a file of `length` bytes.
pub(super) fn read(header: &str, length: u64) -> Wanted {
    let Some((unit, list)) = header.split_once('=') else { return Wanted::Whole };
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return Wanted::Whole;
    }
    let mut parts = Vec::new();
    for spec in list.split(',').map(str::trim).filter(|spec| !spec.is_empty()).take(PARTS_MAX + 1) {
        match one(spec, length) {
            Ok(part) => parts.push(part),
            Err(Malformed) => return Wanted::Whole,
        }
    }
    if parts.is_empty() || parts.len() > PARTS_MAX {
        return Wanted::Whole;
    }
    let parts: Vec<Part> = parts.into_iter().flatten().collect();
    match parts.as_slice() {
        [] => Wanted::Unsatisfiable,
        [part] => Wanted::One(*part),
        several if several.iter().map(|p| p.len()).fold(0, u64::saturating_add) >= length || overlap(several) => {
            Wanted::Whole
        }
        _ => Wanted::Several(parts),
    }
}

struct Malformed;

/// One of the list; nothing if it lies beyond the end.
fn one(spec: &str, length: u64) -> Result<Option<Part>, Malformed> {
    let (first, last) = spec.split_once('-').ok_or(Malformed)?;
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // Greater than any file: as far as it goes.
        digits.then(|| text.parse().unwrap_or(u64::MAX)).ok_or(Malformed)
    };
    let Some(end) = length.checked_sub(1) else {
        return number(if first.is_empty() { last } else { first }).map(|_| None);
    };
    match (first.trim(), last.trim()) {
        ("", suffix) => match number(suffix)? {
            0 => Ok(None),
            suffix => Ok(Some(Part { first: length.saturating_sub(suffix), last: end })),
        },
        (first, "") => number(first).map(|first| (first <= end).then_some(Part { first, last: end })),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                return Err(Malformed);
            }
            Ok((first <= end).then_some(Part { first, last: last.min(end) }))
        }
    }
}

fn overlap(parts: &[Part]) -> bool {
    let mut sorted = parts.to_vec();
    sorted.sort_by_key(|p| p.first);
    sorted.iter().zip(sorted.iter().skip(1)).any(|(a, b)| b.first <= a.last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(header: &str, expected: &Wanted) {
        assert_eq!(read(header, 10), *expected, "{header}");
    }

    fn part(first: u64, last: u64) -> Part {
        Part { first, last }
    }

    #[test]
    fn one_part() {
        check("bytes=2-4", &Wanted::One(part(2, 4)));
        check("bytes=7-", &Wanted::One(part(7, 9)));
        check("bytes=-3", &Wanted::One(part(7, 9)));
        check("bytes=-30", &Wanted::One(part(0, 9)));
        check("bytes=8-99", &Wanted::One(part(8, 9)));
        check("Bytes = 0-0", &Wanted::One(part(0, 0)));
        check("bytes=0-99999999999999999999999", &Wanted::One(part(0, 9)));
        check("bytes=20-30, 1-2", &Wanted::One(part(1, 2)));
    }

    #[test]
    fn several_parts_in_their_order() {
        check("bytes=0-1,4-5", &Wanted::Several(vec![part(0, 1), part(4, 5)]));
        check("bytes=8-9, 0-0", &Wanted::Several(vec![part(8, 9), part(0, 0)]));
    }

    #[test]
    fn what_makes_no_sense_or_too_much_work_is_the_whole() {
        for header in [
            "bytes=5-2",
            "bytes=",
            "bytes",
            "items=0-1",
            "bytes=a-b",
            "bytes=--1",
            "bytes=+1-2",
            "bytes=1",
            "bytes=0-5,3-7",
            "bytes=0-9,0-9",
            "bytes=0-4,5-9",
        ] {
            check(header, &Wanted::Whole);
        }
        let many = format!("bytes={}", (0..17).map(|n| format!("{n}-{n}")).collect::<Vec<_>>().join(","));
        assert_eq!(read(&many, 1_000), Wanted::Whole);
    }

    #[test]
    fn what_the_file_does_not_have() {
        check("bytes=10-", &Wanted::Unsatisfiable);
        check("bytes=50-60", &Wanted::Unsatisfiable);
        check("bytes=-0", &Wanted::Unsatisfiable);
        assert_eq!(read("bytes=0-", 0), Wanted::Unsatisfiable);
        assert_eq!(read("bytes=-5", 0), Wanted::Unsatisfiable);
    }

    proptest! {
        #[test]
        fn whatever_is_asked_lies_in_the_file(header in "(bytes=)?[-0-9, a-z]{0,40}", length in 0_u64..50) {
            let parts = match read(&header, length) {
                Wanted::Whole | Wanted::Unsatisfiable => Vec::new(),
                Wanted::One(part) => vec![part],
                Wanted::Several(parts) => parts,
            };
            prop_assert!(parts.len() <= PARTS_MAX);
            for part in &parts {
                prop_assert!(part.first <= part.last && part.last < length, "{part:?}");
            }
            prop_assert!(parts.len() < 2 || parts.iter().map(|p| p.len()).sum::<u64>() < length);
        }

        #[test]
        fn a_part_that_is_there_is_found(first in 0_u64..500, more in 0_u64..500, rest in 1_u64..500) {
            let (last, length) = (first + more, first + more + rest);
            prop_assert_eq!(read(&format!("bytes={first}-{last}"), length), Wanted::One(Part { first, last }));
        }
    }
}
