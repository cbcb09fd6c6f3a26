//! What every job works with: the node, the server, the programs that run, the way back to the machine.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use bots_core::shell::Clock;
use rustix::process::Signal;

use tokio::sync::Notify;

use super::{
    files::{self, Mode},
    floor,
    heeds::Heeds,
    node::Node,
    nudge,
    postmaster::{Life, Postmaster},
    report::Reporter,
    sound::Sound,
    timelines,
    tool::Tools,
};
use crate::machine::{Rules, STANDBY_NAMES};

/// What could not be written to the configuration is written again after this: a full disk may have room by then.
const APPLY_AGAIN: Duration = Duration::from_secs(1);

/// The shared tools of the jobs.
#[derive(Debug)]
pub struct Hands {
    /// Paths, programs, users.
    pub node: Node,
    /// The server.
    pub postmaster: Arc<Postmaster>,
    /// Programs that run now.
    pub tools: Tools,
    /// The way back to the machine.
    pub reporter: Arc<Reporter>,
    wanted: Mutex<Wanted>,
    /// A running server is to hear of what is wanted.
    to_apply: Notify,
    /// Once it has, commits that wait may have to be let go.
    to_nudge: AtomicBool,
    /// How often a running server was told to read its files again.
    reloads: AtomicU64,
    /// The server was started with other parameters than are wanted.
    raised: AtomicBool,
    /// Whether a commit would wait for those whom the server is told to wait for.
    heeds: Mutex<Heeds>,
    /// Which parameters the server would not take.
    sound: Mutex<Sound>,
    /// Held by whoever writes to the data directory.
    disk: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Clone, Default)]
struct Wanted {
    parameters: BTreeMap<String, String>,
    rules: Rules,
    mode: Option<Mode>,
}

impl Hands {
    /// Nothing is started or written yet.
    pub fn new(node: Node, reporter: Arc<Reporter>) -> Self {
        let postmaster = Arc::new(Postmaster::new(&node));
        Self {
            node,
            postmaster,
            tools: Tools::default(),
            reporter,
            wanted: Mutex::default(),
            to_apply: Notify::new(),
            to_nudge: AtomicBool::new(false),
            reloads: AtomicU64::new(0),
            raised: AtomicBool::new(false),
            heeds: Mutex::default(),
            sound: Mutex::default(),
            disk: Arc::default(),
        }
    }

    /// Takes over the parameters and rules, for the next start and for [`Hands::apply`].
    pub fn configure(&self, parameters: BTreeMap<String, String>, rules: Rules) {
        let mut wanted = self.wanted();
        let names = parameters.get(STANDBY_NAMES).filter(|names| !names.is_empty());
        let others = names.is_some() && wanted.parameters.get(STANDBY_NAMES) != names;
        if others {
            self.to_nudge.store(true, Ordering::Relaxed);
        }
        (wanted.parameters, wanted.rules) = (parameters, rules);
    }

    /// How often a running server was told to read its files again.
    pub fn reloads(&self) -> u64 {
        self.reloads.load(Ordering::Relaxed)
    }

    /// Whether the server was started with other parameters than are wanted; told once.
    pub(super) fn take_raised(&self) -> bool {
        self.raised.swap(false, Ordering::Relaxed)
    }

    /// Takes over whom to follow, for [`Hands::apply`].
    pub(super) fn set_mode(&self, mode: Mode) {
        self.wanted().mode = Some(mode);
    }

    /// A running server hears of what has been taken over, as soon as the files can be written.
    pub fn apply_soon(&self) {
        self.to_apply.notify_one();
    }

    /// Serves [`Hands::apply_soon`], for as long as the bot lives.
    pub async fn keep_applied(self: Arc<Self>) {
        loop {
            self.to_apply.notified().await;
            let mut failed = false;
            while let Err(error) = self.apply().await {
                let error = format!("{error:#}");
                if !failed {
                    tracing::warn!(error, "the configuration of Postgres cannot be written yet: tried again and again");
                }
                failed = true;
                tokio::time::sleep(APPLY_AGAIN).await;
            }
            if failed {
                tracing::info!("the configuration of Postgres is written");
            }
            if self.to_nudge.swap(false, Ordering::Relaxed) {
                let hands = Arc::clone(&self);
                tokio::spawn(async move { nudge::nudge(&hands).await });
            }
        }
    }

    /// Makes a running server hear of what has been taken over.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub async fn apply(self: &Arc<Self>) -> anyhow::Result<()> {
        let write = |hands: &Self| {
            let Wanted { mut parameters, rules, mode } = hands.wanted().clone();
            let (Life::Alive { .. }, Some(mode)) = (hands.postmaster.life(), mode) else { return Ok(()) };
            hands.sift(&mut parameters);
            files::write_configuration(&hands.node, &mode, &parameters, &rules)?;
            hands.postmaster.signal(Signal::HUP);
            hands.note_told(&parameters, false);
            hands.reloads.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        self.postmaster.hears().await;
        self.on_disk(write).await
    }

    /// Does what may wait for the disk on a thread of its own, one thing at a time: the loop must turn. Given up, it
    /// comes to its end all the same; [`Hands::quiet`] waits for that.
    ///
    /// # Errors
    /// What `work` says.
    pub(super) async fn on_disk<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let (hands, turn) = (Arc::clone(self), Arc::clone(&self.disk).lock_owned().await);
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work(&hands)
        });
        done.await.context("work on the disk")?
    }

    /// Writes what a server needs that is about to start in this mode.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub(super) fn prepare(&self, mode: Mode) -> anyhow::Result<()> {
        let Wanted { parameters, rules, .. } = self.want(&mode);
        files::private_dir(&self.node.run_dir)?;
        timelines::give_back(&self.node.data_dir)?;
        files::write_signal(&self.node, &mode)?;
        files::write_configuration(&self.node, &mode, &parameters, &rules)?;
        self.note_told(&parameters, true);
        Ok(())
    }

    /// Turns a server that an earlier life of the bot has left running to `mode`, in which it runs already.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub(super) fn take_over(&self, mode: Mode) -> anyhow::Result<()> {
        let Wanted { parameters, rules, .. } = self.want(&mode);
        files::write_configuration(&self.node, &mode, &parameters, &rules)?;
        self.postmaster.signal(Signal::HUP);
        // What it was told before is not known.
        *self.heeds() = Heeds::Nobody;
        self.note_told(&parameters, false);
        Ok(())
    }

    /// The standbys that the server shall wait for, if any.
    pub(super) fn standby_names(&self) -> Option<String> {
        self.wanted().parameters.get(STANDBY_NAMES).filter(|names| !names.is_empty()).cloned()
    }

    /// Whether the server makes its commits wait, as far as it is known.
    pub(super) fn heeds(&self) -> std::sync::MutexGuard<'_, Heeds> {
        self.heeds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of what the server was told: to begin with, or to read again.
    fn note_told(&self, parameters: &BTreeMap<String, String>, to_begin_with: bool) {
        let waits = parameters.get(STANDBY_NAMES).is_some_and(|names| !names.is_empty());
        let mut heeds = self.heeds();
        *heeds = if to_begin_with { Heeds::begun(waits) } else { heeds.told(waits, Clock::now()) };
    }

    /// Takes the mode over; what a server in it is to be told.
    fn want(&self, mode: &Mode) -> Wanted {
        self.wanted().mode = Some(mode.clone());
        let mut wanted = self.wanted().clone();
        self.sift(&mut wanted.parameters);
        if matches!(mode, Mode::Standby(_) | Mode::Settling(_)) {
            let raised = floor::raise(&self.node, &mut wanted.parameters);
            if !raised.is_empty() {
                tracing::warn!(?raised, "a standby runs with more than is asked for: its primary had more");
                self.raised.store(true, Ordering::Relaxed);
            }
        }
        wanted
    }

    /// Takes out what the server would refuse, and tells of it.
    fn sift(&self, parameters: &mut BTreeMap<String, String>) {
        let mut sound = self.sound.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(refused) = sound.sift(&self.node, parameters) {
            self.reporter.parameters_refused(refused);
        }
    }

    /// Writes what a server needs that recovers in single-user mode ahead of a rewind: no standby, and every piece of WAL
    /// stays, for the rewind looks for where the timelines parted behind the checkpoint that ends the recovery.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub(super) fn prepare_recovery(&self) -> anyhow::Result<()> {
        let Wanted { mut parameters, rules, .. } = self.wanted().clone();
        self.sift(&mut parameters);
        parameters.insert(String::from("wal_keep_size"), String::from("1000TB"));
        files::write_signal(&self.node, &Mode::Primary)?;
        files::write_configuration(&self.node, &Mode::Primary, &parameters, &rules)
    }

    /// Makes sure that nothing works on the data directory: neither a program or a thread of a job that was given up nor
    /// a process that it left behind.
    pub async fn quiet(&self) {
        self.tools.quiet().await;
        drop(self.disk.lock().await);
        let staging = self.node.staging();
        let marks = self.postmaster.marks();
        match self.postmaster.life() {
            // Not by its guard: the server lives on.
            Life::Alive { .. } => marks.guarded_by(None).kill_all(&[&staging]).await,
            Life::Down => marks.kill_all(&[&staging, &self.node.data_dir]).await,
        }
    }

    fn wanted(&self) -> std::sync::MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
