//! What every job works with: the node, the server, the programs that run, the way back to the machine.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context;
use rustix::process::Signal;

use super::{
    files::{self, Mode},
    node::Node,
    postmaster::{Life, Postmaster},
    processes,
    report::Reporter,
    timelines,
    tool::Tools,
};

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
    /// Held by whoever writes to the data directory.
    disk: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Clone, Default)]
struct Wanted {
    parameters: BTreeMap<String, String>,
    mode: Option<Mode>,
}

impl Hands {
    /// Nothing is started or written yet.
    pub fn new(node: Node, reporter: Arc<Reporter>) -> Self {
        let postmaster = Arc::new(Postmaster::new(&node));
        Self { node, postmaster, tools: Tools::default(), reporter, wanted: Mutex::default(), disk: Arc::default() }
    }

    /// Takes over the parameters, for the next start and for [`Hands::apply`].
    pub fn set_parameters(&self, parameters: BTreeMap<String, String>) {
        self.wanted().parameters = parameters;
    }

    /// Takes over whom to follow, for [`Hands::apply`].
    pub(super) fn set_mode(&self, mode: Mode) {
        self.wanted().mode = Some(mode);
    }

    /// Makes a running server hear of what has been taken over.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub async fn apply(self: &Arc<Self>) -> anyhow::Result<()> {
        let write = |hands: &Self| {
            let Wanted { parameters, mode } = hands.wanted().clone();
            let (Life::Alive { .. }, Some(mode)) = (hands.postmaster.life(), mode) else { return Ok(()) };
            files::write_configuration(&hands.node, &mode, &parameters)?;
            hands.postmaster.signal(Signal::HUP);
            Ok(())
        };
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
        self.wanted().mode = Some(mode.clone());
        let parameters = self.wanted().parameters.clone();
        files::private_dir(&self.node.run_dir)?;
        timelines::give_back(&self.node.data_dir)?;
        files::write_signal(&self.node, &mode)?;
        files::write_configuration(&self.node, &mode, &parameters)
    }

    /// Turns a server that an earlier life of the bot has left running to `mode`, in which it runs already.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub(super) fn take_over(&self, mode: Mode) -> anyhow::Result<()> {
        self.wanted().mode = Some(mode.clone());
        let parameters = self.wanted().parameters.clone();
        files::write_configuration(&self.node, &mode, &parameters)?;
        self.postmaster.signal(Signal::HUP);
        Ok(())
    }

    /// Writes what a server needs that recovers in single-user mode ahead of a rewind: no standby, and every piece of WAL
    /// stays, for the rewind looks for where the timelines parted behind the checkpoint that ends the recovery.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub(super) fn prepare_recovery(&self) -> anyhow::Result<()> {
        let mut parameters = self.wanted().parameters.clone();
        parameters.insert(String::from("wal_keep_size"), String::from("1000TB"));
        files::write_signal(&self.node, &Mode::Primary)?;
        files::write_configuration(&self.node, &Mode::Primary, &parameters)
    }

    /// Makes sure that nothing works on the data directory: neither a program or a thread of a job that was given up nor
    /// a process that it left behind.
    pub async fn quiet(&self) {
        self.tools.quiet().await;
        drop(self.disk.lock().await);
        let staging = self.node.staging();
        match self.postmaster.life() {
            Life::Alive { .. } => processes::kill_all(&[&staging]).await,
            Life::Down => processes::kill_all(&[&staging, &self.node.data_dir]).await,
        }
    }

    fn wanted(&self) -> std::sync::MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
