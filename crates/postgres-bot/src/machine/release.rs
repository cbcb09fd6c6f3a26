//! A standby that commits wait for asks to be let go before it is stopped in good order, so that none of them hangs. It says in its
//! member key that it must not be waited for, by the tag that members have for that, and goes on until the `sync` key names
//! it no more: the primary takes a standby off the key only when nothing waits for it any longer.

use bots_core::machine::{Span, Time};
use serde::Serialize;

use super::{
    event::{Job, StopMode},
    state::{State, Timer},
    turn::Turn,
};

/// A primary that lives and has another standby lets one go within a second, and on a saturated machine two: a change of its setting
/// that must be seen to be in force, and two writes of the key. One that has not by then cannot, or in strict mode has nobody
/// else; a stop that was asked for comes all the same.
const RELEASE_PATIENCE: Span = Span::from_secs(5);

/// The stop that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Release {
    mode: StopMode,
    /// It waits no longer than this.
    until: Time,
    /// It is under way. Until the server is down, it must not be waited for anew.
    stops: bool,
}

impl State {
    /// The primary is being asked not to wait for this standby.
    pub(super) fn asks_for_release(&self) -> bool {
        self.release.is_some_and(|release| !release.stops)
    }

    /// The server must not be waited for by commits: it is about to be stopped.
    pub(super) const fn must_not_be_waited_for(&self) -> bool {
        self.release.is_some()
    }

    /// Commits of a primary that lives wait for this standby.
    fn is_waited_for(&self) -> bool {
        let me = self.settings.name.as_str();
        let named = self.sync_record().is_some_and(|record| record.voters().contains(me));
        let led = self.leader().is_some_and(|leader| leader != me);
        let heard = self.view.is_watched() && self.membership.is_registered();
        let streams = self.server().is_some_and(|server| server.in_recovery && server.streaming);
        named && led && heard && streams
    }
}

impl Turn {
    /// Stops the server, once no commit waits for it.
    pub(super) fn stop_once_released(&mut self, mode: StopMode) {
        if !self.s.is_waited_for() {
            return self.run(Job::Stop { mode });
        }
        let until = self.now + RELEASE_PATIENCE;
        self.s.release = Some(Release { mode, until, stops: false });
        self.s.timers.arm(Timer::Release, until);
    }

    /// Goes on with a stop that waits, as soon as it need not, and forgets it when it is done.
    pub(super) fn mind_release(&mut self) {
        let Some(Release { mode, until, stops }) = self.s.release else { return };
        if stops {
            if !self.s.postgres.is_alive() {
                self.s.release = None;
            }
        } else if self.now >= until || !self.s.is_waited_for() {
            self.s.timers.disarm(Timer::Release);
            self.s.release = Some(Release { mode, until, stops: true });
            // What has overtaken it is a stop, too, and a harder one.
            if !matches!(&self.s.job, Some(running) if matches!(running.job, Job::Stop { .. })) {
                self.run(Job::Stop { mode });
            }
        }
    }
}
