//! Getting a commit: a pack from a content bot, several tried, or the origin itself. Verified before it counts.

use std::{cell::Cell, fs, io::Write, path::Path, time::Duration};

use bots_core::{machine::Span, shell::Clock};
use bytes::Bytes;
use git2::{FetchOptions, Indexer, Oid, RemoteCallbacks, Repository};
use http_body_util::{BodyExt, Empty};
use hyper::{StatusCode, Uri};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::sync::mpsc;

use super::{ContentError, blocking, store};

/// How long one source may take. A content bot is near; an origin that is slower than this is tried again later.
const SOURCE_DEADLINE: Duration = Duration::from_secs(30);

/// Parts of a pack between the network and the disk: a few, for who is slower has the other one wait.
const PARTS_MAX: usize = 16;

/// A commit to get, and where.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) sha: String,
    /// Packs, the best first.
    pub(crate) pack_urls: Vec<String>,
    /// The repository to ask if no pack can be had; empty if it is to be spared.
    pub(crate) origin: String,
    /// The branch or tag that leads to the commit there.
    pub(crate) reference: String,
}

/// Makes a bare repository with the commit at `draft`.
pub(crate) async fn fetch(wanted: &Wanted, draft: &Path, size_max: u64, site: &[String]) -> Result<(), ContentError> {
    let mut failures = Vec::new();
    for url in &wanted.pack_urls {
        match from_pack(url, wanted, draft, size_max, site).await {
            Ok(()) => return Ok(()),
            Err(refused @ ContentError::Refused(_)) => return Err(refused),
            Err(error) => failures.push(format!("{url}: {error}")),
        }
    }
    if !wanted.origin.is_empty() || wanted.pack_urls.is_empty() {
        match from_origin(wanted.clone(), draft, size_max, site).await {
            Ok(()) => return Ok(()),
            Err(refused @ ContentError::Refused(_)) => return Err(refused),
            Err(error) => failures.push(format!("{}: {error}", wanted.origin)),
        }
    }
    Err(ContentError::Fetch(failures.join("; ")))
}

async fn from_pack(
    url: &str,
    wanted: &Wanted,
    draft: &Path,
    size_max: u64,
    site: &[String],
) -> Result<(), ContentError> {
    let (sender, mut parts) = mpsc::channel::<Bytes>(PARTS_MAX);
    let downloading = tokio::time::timeout(SOURCE_DEADLINE, download(url, size_max, sender));
    let (draft, sha, site) = (draft.to_owned(), wanted.sha.clone(), site.to_vec());
    let indexing = blocking(move || {
        let repository = fresh(&draft)?;
        let packs = repository.path().join("objects/pack");
        fs::create_dir_all(&packs).map_err(ContentError::disk("make the folder", &packs))?;
        // No check of connectivity: the commit's parents are not in the pack. The tree is walked instead.
        let mut indexer = Indexer::new(None, &packs, 0, false)?;
        while let Some(part) = parts.blocking_recv() {
            indexer.write_all(&part).map_err(|e| ContentError::Unsound(format!("the pack is damaged: {e}")))?;
        }
        indexer.commit()?;
        store::verify(repository.path(), &sha, &site, size_max)
    });
    let (downloaded, indexed) = tokio::join!(downloading, indexing);
    // What breaks off on its way does not come whole either: the cause is told.
    downloaded.map_err(|_elapsed| ContentError::Fetch(format!("no pack within {SOURCE_DEADLINE:?}")))??;
    indexed
}

/// Hands a pack over as it comes, so that it is never in memory as a whole.
async fn download(url: &str, size_max: u64, parts: mpsc::Sender<Bytes>) -> Result<(), ContentError> {
    let url = url.parse::<Uri>().map_err(failed)?;
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let answer = client.get(url).await.map_err(failed)?;
    if answer.status() != StatusCode::OK {
        return Err(ContentError::Fetch(format!("it answers {}", answer.status().as_u16())));
    }
    let (mut body, mut left) = (answer.into_body(), size_max);
    while let Some(frame) = body.frame().await {
        let Ok(part) = frame.map_err(failed)?.into_data() else { continue };
        left = left.checked_sub(u64::try_from(part.len()).unwrap_or(u64::MAX)).ok_or_else(|| {
            ContentError::Fetch(String::from(
                "the pack is larger than content.size_max_bytes: raise it or shrink the site",
            ))
        })?;
        if parts.send(part).await.is_err() {
            // Whoever takes it has had enough, and says why.
            break;
        }
    }
    Ok(())
}

fn failed(error: impl Into<anyhow::Error>) -> ContentError {
    ContentError::Fetch(error.into().root_cause().to_string())
}

async fn from_origin(wanted: Wanted, draft: &Path, size_max: u64, site: &[String]) -> Result<(), ContentError> {
    if wanted.origin.is_empty() {
        return Err(ContentError::Fetch(String::from("no origin is published")));
    }
    let (draft, site) = (draft.to_owned(), site.to_vec());
    blocking(move || {
        let repository = fresh(&draft)?;
        let reference = &wanted.reference;
        let id = Oid::from_str(&wanted.sha)?;
        let mut last = None;
        for (refspec, depth) in refspecs(&wanted.sha, reference) {
            match pull(&repository, &wanted.origin, &refspec, depth, size_max) {
                Ok(()) if repository.find_commit(id).is_ok() => {
                    return store::verify_alone(repository.path(), &wanted.sha, &site, size_max);
                }
                Ok(()) => {}
                Err(error) => last = Some(error),
            }
        }
        Err(last.map_or_else(
            || ContentError::Fetch(format!("{reference} does not lead to the commit any more: publish it again")),
            ContentError::Git,
        ))
    })
    .await
}

/// What the origin is asked for, and how deep: the commit itself, if the server gives it by its name; else all that its reference
/// leads to, which is whatever the content bot's `git.ref` may be.
fn refspecs(sha: &str, reference: &str) -> Vec<(String, i32)> {
    let by_reference = match reference {
        full if full == "HEAD" || full.starts_with("refs/") => vec![format!("+{full}:refs/bots/wanted")],
        // Which tag fits is the content bot's to know.
        range if range.starts_with("semver:") => vec![String::from("+refs/tags/*:refs/bots/tags/*")],
        pinned if Oid::from_str(pinned).is_ok() && pinned.len() == sha.len() => {
            vec![String::from("+refs/heads/*:refs/bots/heads/*"), String::from("+refs/tags/*:refs/bots/tags/*")]
        }
        name => vec![format!("+refs/heads/{name}:refs/bots/wanted"), format!("+refs/tags/{name}:refs/bots/wanted")],
    };
    let whole = by_reference.into_iter().map(|refspec| (refspec, 0));
    [(format!("+{sha}:refs/bots/wanted"), 1)].into_iter().chain(whole).collect()
}

fn pull(repository: &Repository, origin: &str, refspec: &str, depth: i32, size_max: u64) -> Result<(), git2::Error> {
    let until = Clock::now() + Span::from_millis(u64::try_from(SOURCE_DEADLINE.as_millis()).unwrap_or(u64::MAX));
    let too_large = Cell::new(false);
    let mut callbacks = RemoteCallbacks::new();
    callbacks.transfer_progress(|progress| {
        too_large.set(u64::try_from(progress.received_bytes()).unwrap_or(u64::MAX) > size_max);
        !too_large.get() && Clock::now() < until
    });
    let mut options = FetchOptions::new();
    options.remote_callbacks(callbacks).download_tags(git2::AutotagOption::None).update_fetchhead(false).depth(depth);
    let fetched = repository.remote_anonymous(origin)?.fetch(&[refspec], Some(&mut options), None);
    fetched.map_err(|error| match too_large.get() {
        true => git2::Error::from_str("larger than content.size_max_bytes: raise it or shrink the repository"),
        false => error,
    })
}

/// An empty bare repository at `draft`; what an earlier source left there is thrown away.
fn fresh(draft: &Path) -> Result<Repository, ContentError> {
    let _absent = fs::remove_dir_all(draft);
    Ok(Repository::init_bare(draft)?)
}
