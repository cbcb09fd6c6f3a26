//! Quoting: every place where a text enters another language (SQL, `postgresql.conf`, `pg_hba.conf`, conninfo, pgpass).

/// A value for `postgresql.conf`.
pub(super) fn conf(value: &str) -> String {
    let mut out = String::from("'");
    for c in value.chars() {
        match c {
            '\'' => out.push_str("''"),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            c => out.push(c),
        }
    }
    out.push('\'');
    out
}

/// An SQL identifier.
pub(super) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// An SQL literal, whatever `standard_conforming_strings` says.
pub(super) fn literal(value: &str) -> String {
    format!("E'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

/// A field of `pg_hba.conf` or `pg_ident.conf`; quoted, keywords such as `all` lose their meaning.
pub(super) fn hba(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A value of a connection string.
pub(super) fn conninfo(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// A field of a password file.
pub(super) fn pgpass(value: &str) -> String {
    value.replace('\\', "\\\\").replace(':', "\\:")
}

#[cfg(test)]
mod tests {
    use super::{conf, conninfo, identifier, literal, pgpass};

    #[test]
    fn nothing_breaks_out() {
        assert_eq!(conf("it's a \\ b\n"), "'it''s a \\\\ b\\n'");
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
        assert_eq!(literal("'; DROP -- \\"), "E'''; DROP -- \\\\'");
        assert_eq!(conninfo("a'b\\"), "'a\\'b\\\\'");
        assert_eq!(pgpass("a:b\\c"), "a\\:b\\\\c");
    }
}
