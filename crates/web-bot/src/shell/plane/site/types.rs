//! What kind of thing a file is, by the end of its name. Nothing is guessed from what is in it.

/// The content type of a path.
pub(super) fn content_type(path: &str) -> &'static str {
    let name = path.rsplit('/').next().unwrap_or(path);
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    match extension.to_ascii_lowercase().as_str() {
        "html" | "htm" => "text/html; charset=utf-8",
        "xhtml" => "application/xhtml+xml",
        "css" => "text/css; charset=utf-8",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "json" | "map" => "application/json",
        "jsonld" => "application/ld+json",
        "geojson" => "application/geo+json",
        "webmanifest" => "application/manifest+json",
        "xml" | "xsl" => "application/xml",
        "rss" => "application/rss+xml",
        "atom" => "application/atom+xml",
        "txt" => "text/plain; charset=utf-8",
        "md" => "text/markdown; charset=utf-8",
        "csv" => "text/csv; charset=utf-8",
        "ics" => "text/calendar; charset=utf-8",
        "vtt" => "text/vtt; charset=utf-8",
        "yaml" | "yml" => "application/yaml",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "apng" => "image/apng",
        "jpg" | "jpeg" => "image/jpeg",
        "gif" => "image/gif",
        "webp" => "image/webp",
        "avif" => "image/avif",
        "bmp" => "image/bmp",
        "ico" => "image/x-icon",
        "woff" => "font/woff",
        "woff2" => "font/woff2",
        "ttf" => "font/ttf",
        "otf" => "font/otf",
        "pdf" => "application/pdf",
        "wasm" => "application/wasm",
        "mp3" => "audio/mpeg",
        "m4a" => "audio/mp4",
        "ogg" | "oga" | "opus" => "audio/ogg",
        "flac" => "audio/flac",
        "wav" => "audio/wav",
        "mp4" => "video/mp4",
        "webm" => "video/webm",
        "mov" => "video/quicktime",
        "zip" => "application/zip",
        "gz" => "application/gzip",
        "br" | "zst" | "xz" | "bz2" | "7z" => "application/octet-stream",
        "tar" => "application/x-tar",
        _ => "application/octet-stream",
    }
}

/// Whether compression makes files of this type smaller: words do, pictures and archives are compressed already.
pub(super) fn is_compressible(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or(content_type);
    let words = kind.starts_with("text/") || kind.ends_with("+xml") || kind.ends_with("+json");
    let others = [
        "application/json",
        "application/xml",
        "application/yaml",
        "application/wasm",
        "font/ttf",
        "font/otf",
        "image/bmp",
        "image/x-icon",
    ];
    words || others.contains(&kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_types() {
        let check = |path: &str, expected: &str, compressible: bool| {
            let found = content_type(path);
            assert_eq!((found, is_compressible(found)), (expected, compressible), "{path}");
        };
        check("a/b.HTML", "text/html; charset=utf-8", true);
        check("logo.svg", "image/svg+xml", true);
        check("photo.jpeg", "image/jpeg", false);
        check("app.wasm", "application/wasm", true);
        check("archive.tar.gz", "application/gzip", false);
        check("v1.2/LICENSE", "application/octet-stream", false);
        check("feed.json", "application/json", true);
    }
}
