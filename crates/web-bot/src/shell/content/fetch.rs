//! Getting a commit: a pack from a content bot, several tried, or the origin itself. Verified before it counts.

use std::{cell::Cell, fs, io::Write, path::Path, time::Duration};

use bots_core::{
    machine::Span,
    shell::{Clock, http},
};
use git2::{FetchOptions, Indexer, Oid, RemoteCallbacks, Repository};

use super::{ContentError, blocking, store};

/// How long one source may take. A content bot is near; an origin that is slower than this is tried again later.
const SOURCE_DEADLINE: Duration = Duration::from_secs(30);

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
    let limit = usize::try_from(size_max).unwrap_or(usize::MAX);
    let (method, headers) = (hyper::Method::GET, hyper::HeaderMap::new());
    let answer = http::request(method, url, headers, bytes::Bytes::new(), SOURCE_DEADLINE, limit).await;
    let answer = answer.map_err(|e| ContentError::Fetch(anyhow::Error::new(e).root_cause().to_string()))?;
    if answer.status != 200 {
        return Err(ContentError::Fetch(format!("it answers {}", answer.status)));
    }
    let (draft, sha, site) = (draft.to_owned(), wanted.sha.clone(), site.to_vec());
    blocking(move || {
        let repository = fresh(&draft)?;
        let packs = repository.path().join("objects/pack");
        fs::create_dir_all(&packs).map_err(ContentError::disk("make the folder", &packs))?;
        // No check of connectivity: the commit's parents are not in the pack. The tree is walked instead.
        let mut indexer = Indexer::new(None, &packs, 0, false)?;
        indexer.write_all(&answer.body).map_err(|e| ContentError::Unsound(format!("the pack is damaged: {e}")))?;
        indexer.commit()?;
        store::verify(repository.path(), &sha, &site, size_max)
    })
    .await
}

async fn from_origin(wanted: Wanted, draft: &Path, size_max: u64, site: &[String]) -> Result<(), ContentError> {
    if wanted.origin.is_empty() {
        return Err(ContentError::Fetch(String::from("no origin is published")));
    }
    let (draft, site) = (draft.to_owned(), site.to_vec());
    blocking(move || {
        let repository = fresh(&draft)?;
        let reference = &wanted.reference;
        // The commit itself, if the server gives it by its name; else all that the branch or tag leads to.
        let refspecs = [
            (format!("+{}:refs/bots/wanted", wanted.sha), 1),
            (format!("+refs/heads/{reference}:refs/bots/wanted"), 0),
            (format!("+refs/tags/{reference}:refs/bots/wanted"), 0),
        ];
        let id = Oid::from_str(&wanted.sha)?;
        let mut last = None;
        for (refspec, depth) in refspecs {
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
