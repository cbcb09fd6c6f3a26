//! The configuration of the export.

use std::{
    path::{Component, Path, PathBuf},
    time::Duration,
};

use bots_core::{machine::Span, shell::Exit};
use serde::Deserialize;

use super::{PurgeRequest, check_program, within};
use crate::{
    machine::ExportSettings,
    shell::{
        export::{Exporter, Hook, Plan},
        gates::Check,
    },
};

/// A day. Whoever reads a tree for longer than that has copied it.
const GRACE_S_MAX: u64 = 86_400;

/// How long a hook may take.
const HOOK_TIMEOUT_S_MAX: u64 = 3_600;

/// Whether and how the live commit is put on disk as files.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// Where the trees are; the bot's alone.
    pub root: PathBuf,
    /// The symbolic link to the live tree; below `root` if it is not absolute.
    #[serde(default = "link")]
    pub link: PathBuf,
    /// How long a tree stays after the link has left it.
    #[serde(default = "grace_s")]
    pub grace_s: u64,
    /// A program that is run whenever the link has moved.
    pub exec_hook: Option<ExecHook>,
    /// A request that is made whenever the link has moved.
    pub webhook: Option<PurgeRequest>,
    /// A file whose time of change is set whenever the link has moved.
    pub touch_file: Option<PathBuf>,
    /// Whether the bot ends once the live commit is in place.
    #[serde(default)]
    pub one_time: bool,
    /// How long that may take.
    #[serde(default = "one_time_timeout_s")]
    pub one_time_timeout_s: u64,
}

/// A program that is run whenever the link has moved.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecHook {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// How long it may take.
    #[serde(default = "hook_timeout_s")]
    pub timeout_s: u64,
}

impl Export {
    /// The machine's settings.
    #[must_use]
    pub fn settings(&self) -> ExportSettings {
        ExportSettings {
            grace: Span::from_secs(self.grace_s),
            tells: self.exec_hook.is_some() || self.webhook.is_some(),
            one_time: self.one_time.then(|| Span::from_secs(self.one_time_timeout_s)),
        }
    }

    /// The hand that exports. What calls leave for a moment goes below `data_dir`.
    ///
    /// # Errors
    /// How the bot must end: code 2 if the folders cannot be used, 3 if another process uses them.
    pub fn exporter(&self, data_dir: &Path) -> Result<Exporter, Exit> {
        let program = self
            .exec_hook
            .as_ref()
            .map(|hook| Check { command: hook.command.clone(), deadline: Duration::from_secs(hook.timeout_s) });
        let call = self.webhook.as_ref().map(|w| w.call("export.webhook")).transpose().map_err(Exit::usage)?;
        Exporter::open(Plan {
            root: self.root.clone(),
            link: self.root.join(&self.link),
            touch_file: self.touch_file.clone(),
            hook: Hook { program, call },
            scratch: data_dir.join("hook"),
        })
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn check(&self) -> Result<(), String> {
        let absolute = |field: &str, path: &Path| match path.is_absolute() {
            true => Ok(()),
            false => Err(format!("{field}: {} is not absolute: give the whole path", path.display())),
        };
        absolute("export.root", &self.root)?;
        if let Some(path) = &self.touch_file {
            absolute("export.touch_file", path)?;
        }
        let climbs = self.link.components().any(|part| part == Component::ParentDir);
        if climbs || self.link.file_name().is_none() || self.root.join(&self.link) == self.root {
            let link = self.link.display();
            return Err(format!(
                "export.link: {link} cannot be a link: give a name below export.root, or a whole path"
            ));
        }
        within("export.grace_s", self.grace_s, 0, GRACE_S_MAX)?;
        within("export.one_time_timeout_s", self.one_time_timeout_s, 1, GRACE_S_MAX)?;
        if let Some(hook) = &self.exec_hook {
            within("export.exec_hook.timeout_s", hook.timeout_s, 1, HOOK_TIMEOUT_S_MAX)?;
            match hook.command.first() {
                Some(program) => check_program("export.exec_hook.command", program)?,
                None => return Err(String::from("export.exec_hook.command is empty: name a program")),
            }
        }
        self.webhook.as_ref().map_or(Ok(()), |webhook| webhook.call("export.webhook").map(|_call| ()))
    }
}

fn link() -> PathBuf {
    PathBuf::from("current")
}

/// A minute: a request that was begun on the old tree has ended by then.
const fn grace_s() -> u64 {
    60
}

const fn hook_timeout_s() -> u64 {
    30
}

const fn one_time_timeout_s() -> u64 {
    120
}
