//! The other files of the content: style sheets, pictures. Nothing outside the content, nothing hidden.

use std::path::{Component, Path, PathBuf};

/// The largest file that is read into memory for a visitor.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Reads a file of the content; nothing if there is none to be shown.
pub(crate) async fn read(content: &Path, path: &str) -> Option<(&'static str, Vec<u8>)> {
    let relative = plain(path)?;
    let content_type = content_type(&relative)?;
    let file = tokio::fs::canonicalize(content.join(relative)).await.ok()?;
    // A link must not lead out.
    if !file.starts_with(tokio::fs::canonicalize(content).await.ok()?) {
        return None;
    }
    let size = tokio::fs::metadata(&file).await.ok().filter(|m| m.is_file())?.len();
    if size > FILE_BYTES_MAX {
        return None;
    }
    Some((content_type, tokio::fs::read(file).await.ok()?))
}

fn plain(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(path);
    let visible = |part: Component<'_>| match part {
        Component::Normal(name) => !name.to_string_lossy().starts_with('.'),
        _ => false,
    };
    path.components().all(visible).then_some(path)
}

/// What is shown at all: templates and notes are not.
fn content_type(path: &Path) -> Option<&'static str> {
    Some(match path.extension()?.to_str()? {
        "css" => "text/css; charset=utf-8",
        "js" => "text/javascript; charset=utf-8",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "jpg" => "image/jpeg",
        "webp" => "image/webp",
        "ico" => "image/x-icon",
        "woff2" => "font/woff2",
        "txt" => "text/plain; charset=utf-8",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{plain, read};

    #[test]
    fn paths_stay_inside() {
        assert!(plain("css/site.css").is_some());
        for bad in ["../x.css", "css/../../x.css", "/etc/x.css", ".git/x.css", "./x.css", "css/.hidden.css"] {
            assert!(plain(bad).is_none(), "{bad}");
        }
    }

    #[tokio::test]
    async fn files_are_read_and_absent_ones_are_not() {
        let site = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../site"));
        assert_eq!(read(site, "css/site.css").await.map(|f| f.0), Some("text/css; charset=utf-8"));
        assert!(read(site, "css/none.css").await.is_none());
        assert!(read(site, "index.html").await.is_none());
    }
}
