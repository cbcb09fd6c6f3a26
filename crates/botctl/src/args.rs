//! The command line: every command and option, and nothing that acts on them.

use clap::{Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

/// The operator's hand on a fleet of bots: look, ask why, switch over, configure.
#[derive(Debug, Parser)]
#[command(
    name = "botctl",
    version,
    after_help = "Exit codes: 0 done, 1 failed or refused, 2 wrong usage, 3 etcd unreachable, 4 no such bot or scope."
)]
pub(crate) struct Args {
    /// The members of etcd, as `host:port,host:port`
    #[arg(short, long, env = "BOTCTL_ETCD", default_value = "127.0.0.1:2379", value_name = "HOSTS", global = true)]
    pub(crate) etcd: String,
    /// The user of etcd, if it asks for one
    #[arg(long, env = "BOTCTL_ETCD_USERNAME", value_name = "NAME", global = true)]
    pub(crate) etcd_username: Option<String>,
    /// The file that holds the password of that user
    #[arg(long, env = "BOTCTL_ETCD_PASSWORD_FILE", value_name = "FILE", global = true)]
    pub(crate) etcd_password_file: Option<std::path::PathBuf>,
    /// The user of the bots' API, if it asks for one
    #[arg(long, env = "BOTCTL_API_USERNAME", value_name = "NAME", global = true)]
    pub(crate) api_username: Option<String>,
    /// The file that holds the password of that user
    #[arg(long, env = "BOTCTL_API_PASSWORD_FILE", value_name = "FILE", global = true)]
    pub(crate) api_password_file: Option<std::path::PathBuf>,
    /// The namespace of the fleet
    #[arg(long, env = "BOTCTL_NAMESPACE", default_value = bots_core::dcs::DEFAULT_NAMESPACE, global = true)]
    pub(crate) namespace: String,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Format::Table, global = true)]
    pub(crate) format: Format,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// For scripts
    Json,
    /// For both
    Yaml,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Every bot of every scope: role, state, for how long, timeline and lag, load, revision
    List {
        /// Only this scope
        scope: Option<String>,
        /// Keep watching: print again on every change and every second
        #[arg(short, long)]
        watch: bool,
    },
    /// What a bot is, what it waits for, since when, and why it does not do something else
    Why {
        /// The bot, as `name` or `scope/name`
        bot: String,
    },
    /// The timelines of a Postgres scope, or the revisions of a content scope
    History {
        /// The scope
        scope: String,
    },
    /// Hand the lead of a Postgres scope to another member, and wait until it is done
    Switchover {
        /// The scope
        scope: String,
        /// The member that shall lead; the healthiest replica if not given
        #[arg(long, value_name = "NAME")]
        to: Option<String>,
        /// Do not ask before acting
        #[arg(long)]
        force: bool,
        /// How long to wait for the end, in seconds
        #[arg(long, default_value_t = 60, value_name = "SECONDS")]
        timeout: u64,
    },
    /// Restart the server of a Postgres bot, and wait until it is up
    Restart {
        /// The bot, as `name` or `scope/name`
        bot: String,
        /// Only if a change of its configuration waits for it
        #[arg(long)]
        pending: bool,
        /// How long the start may take, in seconds; a primary that takes longer hands over
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
        /// Do not ask before acting
        #[arg(long)]
        force: bool,
    },
    /// Delete the data of a replica, copy it anew, and show how far the copy is
    Reinit {
        /// The bot, as `name` or `scope/name`
        bot: String,
        /// Copy the leader, also if another member offers itself
        #[arg(long)]
        from_leader: bool,
        /// Do not ask before acting; a copy that is under way is given up for a new one
        #[arg(long)]
        force: bool,
    },
    /// Have a Postgres or web bot read its own configuration again, as SIGHUP does
    Reload {
        /// The bot, as `name` or `scope/name`
        bot: String,
    },
    /// The dynamic configuration of a scope
    #[command(subcommand)]
    Config(Config),
    /// The commits of a content scope: which are live, were, and must not be; go back, pin, promote
    #[command(subcommand)]
    Content(Content),
    /// A web fleet: how many bots serve, and which
    #[command(subcommand)]
    Web(crate::web::Web),
    /// Completions for a shell, on standard output
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// What to do with a content scope. Commits may be shortened.
#[derive(Debug, Subcommand)]
pub(crate) enum Content {
    /// Every commit that is known, and what became of it
    List {
        /// The scope
        scope: String,
    },
    /// Why a commit is live or is not; or what the scope waits for
    Why {
        /// The scope
        scope: String,
        /// The commit
        commit: Option<String>,
    },
    /// Let the candidate go live without its canary, as soon as one web bot could serve it
    Promote {
        /// The scope
        scope: String,
        /// Do not ask before acting
        #[arg(long)]
        force: bool,
        /// How long to wait for it to be live, in seconds
        #[arg(long, default_value_t = 60, value_name = "SECONDS")]
        timeout: u64,
    },
    /// Publish what was live before, and pin it
    Rollback {
        /// The scope
        scope: String,
        /// This commit instead of the last one
        #[arg(long, value_name = "COMMIT")]
        to: Option<String>,
        /// Do not ask before acting
        #[arg(long)]
        force: bool,
        /// How long to wait for it to be live, in seconds
        #[arg(long, default_value_t = 60, value_name = "SECONDS")]
        timeout: u64,
    },
    /// Publish this commit, wherever the branch points, and nothing else
    Pin {
        /// The scope
        scope: String,
        /// The commit
        commit: String,
        /// Do not ask before acting
        #[arg(long)]
        force: bool,
        /// How long to wait for it to be live, in seconds
        #[arg(long, default_value_t = 60, value_name = "SECONDS")]
        timeout: u64,
    },
    /// Publish what the branch points at again
    Unpin {
        /// The scope
        scope: String,
    },
    /// Have a quarantined commit tried again
    Unquarantine {
        /// The scope
        scope: String,
        /// The commit
        commit: String,
    },
}

impl Content {
    /// The scope.
    pub(crate) fn scope(&self) -> &str {
        match self {
            Self::List { scope }
            | Self::Why { scope, .. }
            | Self::Promote { scope, .. }
            | Self::Rollback { scope, .. }
            | Self::Pin { scope, .. }
            | Self::Unpin { scope }
            | Self::Unquarantine { scope, .. } => scope,
        }
    }

    /// Whether nothing is asked before.
    pub(crate) const fn is_forced(&self) -> bool {
        match self {
            Self::Promote { force, .. } | Self::Rollback { force, .. } | Self::Pin { force, .. } => *force,
            Self::List { .. } | Self::Why { .. } | Self::Unpin { .. } | Self::Unquarantine { .. } => true,
        }
    }

    /// How long to wait for the end.
    pub(crate) const fn patience(&self) -> bots_core::machine::Span {
        let seconds = match self {
            Self::Promote { timeout, .. } | Self::Rollback { timeout, .. } | Self::Pin { timeout, .. } => *timeout,
            Self::List { .. } | Self::Why { .. } | Self::Unpin { .. } | Self::Unquarantine { .. } => 0,
        };
        bots_core::machine::Span::from_secs(seconds)
    }
}

/// What to do with the configuration.
#[derive(Debug, Subcommand)]
pub(crate) enum Config {
    /// Print it
    Show {
        /// The scope
        scope: String,
    },
    /// Change it: in $EDITOR, or by --set and --unset
    Edit {
        /// The scope
        scope: String,
        /// Set a field, as `postgresql.parameters.work_mem=8MB`; quote a part that has dots: `a."b.c"=1`
        #[arg(long, value_name = "PATH=VALUE")]
        set: Vec<String>,
        /// Remove a field
        #[arg(long, value_name = "PATH")]
        unset: Vec<String>,
        /// Do not ask before writing
        #[arg(long)]
        force: bool,
    },
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::{Args, Command};

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn options_may_stand_behind_the_command() {
        let args = Args::try_parse_from(["botctl", "list", "--watch", "-e", "a:1,b:2", "web"]).unwrap();
        assert_eq!(args.etcd, "a:1,b:2");
        assert!(matches!(args.command, Command::List { scope: Some(s), watch: true } if s == "web"));
        assert!(Args::try_parse_from(["botctl", "switchover"]).is_err());
        assert!(Args::try_parse_from(["botctl", "--format", "xml", "list"]).is_err());
    }
}
