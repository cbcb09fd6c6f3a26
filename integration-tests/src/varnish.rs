//! A real Varnish in front of one web bot, with the VCL that operators get as a sample.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::{
    free_port,
    process::{Process, Program, system_binary},
    scratch::Scratch,
};

/// A cache on loopback. Dropping it ends it.
#[derive(Debug)]
pub struct Varnish {
    /// Where clients and purgers reach it.
    pub port: u16,
    program: Program,
    logs: PathBuf,
    process: Option<Process>,
}

impl Varnish {
    /// A cache in front of the web server at `backend`, not started yet.
    ///
    /// # Errors
    /// If Varnish is not installed or the sample VCL cannot be used.
    pub fn new(scratch: &Scratch, logs: &Path, backend: u16) -> Result<Self> {
        let binary = system_binary("varnishd", &[PathBuf::from("/usr/sbin")])?;
        let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/varnish.vcl");
        let sample = fs::read_to_string(&sample).with_context(|| format!("read {}", sample.display()))?;
        let vcl = sample.replace(".port = \"8080\"", &format!(".port = \"{backend}\""));
        ensure!(vcl != sample, "the sample VCL has its backend at port 8080");
        let vcl = scratch.file("varnish.vcl", &vcl, None)?;
        let (folder, port) = (scratch.path().join("varnish"), free_port()?);
        let program = Program::new("varnish", binary).args([
            // In the foreground, as one user, with nothing outside of its folder, no remote console, and little memory.
            "-F",
            "-j",
            "none",
            "-n",
            &folder.to_string_lossy(),
            "-a",
            &format!("127.0.0.1:{port}"),
            "-T",
            "none",
            "-f",
            &vcl.to_string_lossy(),
            "-s",
            "malloc,16m",
            "-p",
            "thread_pools=1",
            "-p",
            "thread_pool_min=10",
        ]);
        Ok(Self { port, program, logs: logs.to_owned(), process: None })
    }

    /// Starts it, with nothing in it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(&mut self) -> Result<()> {
        self.process = Some(self.program.start(&self.logs)?);
        Ok(())
    }

    /// Asks it to stop, and waits for its end; says whether it went by itself.
    pub fn stop(&mut self) -> bool {
        self.process.take().is_none_or(|mut process| process.stop())
    }

    /// Freezes it: connections are taken by the kernel, and nothing answers. What it keeps, it keeps.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// The one that serves is a child of the one that was started.
    fn signal(&self, signal: Signal) {
        if let Some(process) = &self.process {
            crate::process::children_of(process.pid())
                .into_iter()
                .for_each(|pid| crate::process::signal_pid(pid, signal));
        }
    }
}
