//! Who has signed a commit, or the tag by which the reference leads to it: ssh-keygen and gpg judge, with the operator's keys.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use bots_core::shell::process::{Ended, Program};
use git2::{ObjectType, Oid, Repository};

use super::{
    fault::Fault,
    gates::Candidate,
    guard::Guard,
    origin::Way,
    tool::{self, Outcome},
};

/// How long a tool may take to check one signature. It reads two small files.
const SIGNATURE_DEADLINE: Duration = Duration::from_secs(20);

/// The longest signature. Those of many-keyed GPG are below ten thousand bytes.
const SIGNATURE_LEN_MAX: usize = 64 * 1024;

/// What an ssh signature begins with.
const SSH_SIGNATURE: &[u8] = b"-----BEGIN SSH SIGNATURE-----";

/// What the signature of a tag begins with. It stands behind the message.
const TAG_SIGNATURES: [&[u8]; 2] = [SSH_SIGNATURE, b"-----BEGIN PGP SIGNATURE-----"];

/// Which signatures count.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Signers {
    /// OpenSSH's file of allowed signers.
    pub ssh: Option<PathBuf>,
    /// GPG's public keys, exported.
    pub gpg: Option<PathBuf>,
}

impl Signers {
    /// Lets a commit pass that is signed with one of the keys, or named by a tag that is: releases are often signed as tags alone.
    ///
    /// # Errors
    /// [`Fault::Unfit`] or [`Fault::Doubtful`] with the reason, or what kept us from judging.
    pub(super) fn accept(&self, candidate: &Candidate<'_>, scratch: &Path, guard: &Guard) -> Result<(), Fault> {
        let of_commit = match self.accept_commit(candidate, &scratch.join("commit"), guard) {
            Err(Fault::Unfit(why)) => why,
            judged => return judged,
        };
        match candidate.origin.way(candidate.repository, candidate.commit, guard)? {
            Way::Straight => Err(Fault::Unfit(of_commit)),
            // Perhaps it is about to be superseded, or a tag was taken away that will be back.
            Way::Elsewhere => Err(Fault::Doubtful(format!("{of_commit}; and git.ref names another commit now"))),
            Way::Tag { name, tag } => {
                let judged = self.accept_tag(candidate, &name, tag, &scratch.join("tag"), guard);
                judged.map_err(|fault| match fault {
                    Fault::Unfit(why) => Fault::Unfit(format!("{of_commit}; and of {name}: {why}")),
                    other => other,
                })
            }
        }
    }

    fn accept_commit(&self, candidate: &Candidate<'_>, scratch: &Path, guard: &Guard) -> Result<(), Fault> {
        let unsigned = || {
            Fault::Unfit(String::from(
                "it is not signed, and `verify` asks for a signature: commit with `git commit -S`",
            ))
        };
        let signed = candidate.repository.extract_signature(&candidate.commit, None);
        let (signature, content) = signed.map_err(|_none| unsigned())?;
        self.judge(&signature, &content, scratch, guard)
    }

    fn accept_tag(
        &self,
        candidate: &Candidate<'_>,
        name: &str,
        tag: Oid,
        scratch: &Path,
        guard: &Guard,
    ) -> Result<(), Fault> {
        let content = tag_content(candidate.repository, name, tag, candidate.commit)?;
        let Some(at) = signature_of_tag(&content) else {
            return Err(Fault::Unfit(String::from("it is not signed: tag with `git tag -s`")));
        };
        let (content, signature) = content.split_at(at);
        self.judge(signature, content, scratch, guard)
    }

    /// Judges a signature of `content`. `scratch` is made.
    fn judge(&self, signature: &[u8], content: &[u8], scratch: &Path, guard: &Guard) -> Result<(), Fault> {
        if signature.len() > SIGNATURE_LEN_MAX {
            return Err(Fault::Unfit(format!("its signature is longer than {SIGNATURE_LEN_MAX} bytes")));
        }
        let disk = |e: io::Error| Fault::Failed(format!("cannot write to {}: {e}", scratch.display()));
        fs::DirBuilder::new().mode(0o700).create(scratch).map_err(disk)?;
        let files = Files { signature: scratch.join("signature"), content: scratch.join("content"), scratch, guard };
        fs::write(&files.signature, signature).map_err(disk)?;
        fs::write(&files.content, content).map_err(disk)?;
        match (signature.starts_with(SSH_SIGNATURE), &self.ssh, &self.gpg) {
            (true, Some(allowed), _) => by_ssh(allowed, &files),
            (false, _, Some(keys)) => by_gpg(keys, &files),
            (true, None, _) => Err(Fault::Unfit(String::from(
                "it is signed with an ssh key, and none is allowed: sign it with GPG, or set verify.ssh_allowed_signers_file",
            ))),
            (false, _, None) => Err(Fault::Unfit(String::from(
                "it is signed with GPG, and no key of GPG is allowed: sign it with ssh, or set verify.gpg_keys_file",
            ))),
        }
    }
}

/// The tag as it was signed, if it says of itself what the origin says of it: whoever may push, and has no key, could give an old
/// release a new name.
fn tag_content(repository: &Repository, name: &str, tag: Oid, commit: Oid) -> Result<Vec<u8>, Fault> {
    let read = || {
        let object = repository.find_tag(tag)?;
        let own_name = String::from_utf8_lossy(object.name_bytes()).into_owned();
        let content = repository.odb()?.read(tag)?.data().to_vec();
        let named = object.as_object().peel(ObjectType::Commit).map(|object| object.id());
        Ok::<_, git2::Error>((own_name, named.is_ok_and(|named| named == commit), content))
    };
    let (own_name, names_it, content) = read().map_err(|e| Fault::local(&e))?;
    if !names_it {
        return Err(Fault::Unfit(String::from("the tag does not name this commit")));
    }
    if name.strip_prefix("refs/tags/") != Some(own_name.as_str()) {
        let own_name: String = own_name.chars().filter(|c| !c.is_control()).collect();
        return Err(Fault::Unfit(format!("the tag was made as `{own_name}`: push it under that name")));
    }
    Ok(content)
}

/// Where the signature of a tag begins: at the last line that could be its first, as git has it.
fn signature_of_tag(content: &[u8]) -> Option<usize> {
    let mut starts = content.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    let begins = |at: &usize| content.get(*at..).is_some_and(|rest| TAG_SIGNATURES.iter().any(|s| rest.starts_with(s)));
    starts.rfind(begins)
}

/// What a tool is given.
struct Files<'f> {
    signature: PathBuf,
    content: PathBuf,
    scratch: &'f Path,
    guard: &'f Guard,
}

impl Files<'_> {
    fn run(&self, program: Program) -> Result<Outcome, Fault> {
        let outcome = tool::run(program, SIGNATURE_DEADLINE, self.scratch, self.guard)?;
        match outcome.ended {
            Some(Ended::Code(_)) => Ok(outcome),
            Some(ended @ Ended::Signal(_)) => {
                Err(Fault::Failed(format!("checking a signature was cut short ({ended})")))
            }
            None => Err(Fault::Failed(format!("a signature was not checked within {SIGNATURE_DEADLINE:?}"))),
        }
    }
}

fn by_ssh(allowed: &Path, files: &Files<'_>) -> Result<(), Fault> {
    readable(allowed, "verify.ssh_allowed_signers_file")?;
    let keygen = |what: &str| {
        let program = Program::new("ssh-keygen", "ssh-keygen").args(["-Y", what, "-f"]).arg(allowed);
        program.arg("-s").arg(&files.signature)
    };
    let found = files.run(keygen("find-principals"))?;
    let strange = || {
        Fault::Unfit(String::from(
            "its signature is by no key of verify.ssh_allowed_signers_file: add the key, or sign with another",
        ))
    };
    let principals: Vec<&str> = match found.is_success() {
        true => found.words.lines().map(str::trim).filter(|line| !line.is_empty()).collect(),
        false => return Err(strange()),
    };
    for principal in principals {
        // One line may name several, with commas between.
        let name = principal.split(',').next().unwrap_or(principal);
        let verify = keygen("verify").args(["-n", "git", "-I", name]).input(&files.content);
        if files.run(verify)?.is_success() {
            return Ok(());
        }
    }
    Err(Fault::Unfit(String::from(
        "its signature does not fit what it signs, or its key is not allowed for git any more",
    )))
}

fn by_gpg(keys: &Path, files: &Files<'_>) -> Result<(), Fault> {
    readable(keys, "verify.gpg_keys_file")?;
    let home = files.scratch.join("gnupg");
    let disk = |e: io::Error| Fault::Failed(format!("cannot make {}: {e}", home.display()));
    fs::DirBuilder::new().mode(0o700).create(&home).map_err(disk)?;
    let gpg = || {
        let quiet = ["--batch", "--no-tty", "--quiet", "--no-autostart", "--trust-model", "always", "--status-fd", "1"];
        Program::new("gpg", "gpg").arg("--homedir").arg(&home).args(quiet)
    };
    let imported = files.run(gpg().arg("--import").arg(keys))?;
    if !imported.is_success() {
        let why = imported.last_words();
        return Err(Fault::Failed(format!("verify.gpg_keys_file: gpg cannot read {}: {why}", keys.display())));
    }
    let verified = files.run(gpg().arg("--verify").arg(&files.signature).arg(&files.content))?;
    let status =
        |word: &str| verified.words.lines().any(|l| l.strip_prefix("[GNUPG:] ").is_some_and(|l| l.starts_with(word)));
    let spoilt = ["BADSIG", "ERRSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG"].into_iter().find(|word| status(word));
    if verified.is_success() && status("VALIDSIG") && spoilt.is_none() {
        return Ok(());
    }
    let what = match spoilt {
        Some("BADSIG") => "does not fit what it signs",
        Some("EXPSIG" | "EXPKEYSIG") => "or its key has expired",
        Some("REVKEYSIG") => "is by a key that was revoked",
        Some(_) | None => "is by no key of verify.gpg_keys_file: add the key, or sign with another",
    };
    Err(Fault::Unfit(format!("its signature {what}")))
}

fn readable(path: &Path, field: &str) -> Result<(), Fault> {
    match fs::File::open(path) {
        Ok(_) => Ok(()),
        Err(e) => Err(Fault::Failed(format!("{field}: cannot read {}: {e}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::signature_of_tag;

    #[test]
    fn the_signature_of_a_tag_is_what_stands_last() {
        let tag = "object 1\ntype commit\ntag v1\n\nAs in\n-----BEGIN PGP SIGNATURE-----\nold\n";
        let first = tag.find("-----BEGIN").expect("there");
        assert_eq!(signature_of_tag(tag.as_bytes()), Some(first));
        let signed = format!("{tag}-----BEGIN SSH SIGNATURE-----\nnew\n-----END SSH SIGNATURE-----\n");
        assert_eq!(signature_of_tag(signed.as_bytes()), Some(tag.len()));
        for other in ["", "object 1\n\nno signature\n", "in a -----BEGIN PGP SIGNATURE----- line\n"] {
            assert_eq!(signature_of_tag(other.as_bytes()), None, "{other}");
        }
    }
}
