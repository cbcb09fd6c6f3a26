//! The runtime: one loop, one armed timer, one bounded queue. Next event, step, perform; nothing is decided here.

use std::{
    io,
    ops::ControlFlow,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::{
    io::unix::AsyncFd,
    sync::{Notify, mpsc},
};

use super::{
    clock::Clock,
    metrics::Metrics,
    process::watch_readable,
    status::{StateCell, StatusHub},
    step_log::StepLog,
};
use crate::machine::{Machine, Span, Step, Time};

/// Events that may wait for the machine. A burst of watch events fits; whoever outruns the machine for longer waits.
pub const QUEUE_LEN_MAX: usize = 1_024;

/// A timer that fires is not armed again before this: a machine that forgets to move its deadline must not spin.
pub const TIMER_PAUSE_MIN: Span = Span::from_millis(5);

/// How and why a bot ends.
///
/// Codes: 0 clean; 1 anything not below; 2 bad configuration or usage; 3 the world contradicts us (foreign data
/// directory, duplicate name); 4 a needed program is missing or too old, or a port is in use.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Exit {
    /// The exit code of the process.
    pub code: u8,
    /// One line: what happened and how to mend it.
    pub message: String,
}

impl Exit {
    /// An exit with this code and this line.
    pub fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// Code 0.
    pub fn clean(message: impl Into<String>) -> Self {
        Self::new(0, message)
    }

    /// Code 1: anything that has no code of its own.
    pub fn failure(message: impl Into<String>) -> Self {
        Self::new(1, message)
    }

    /// Code 2: bad configuration or usage.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(2, message)
    }

    /// Code 3: the world contradicts us.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(3, message)
    }

    /// Code 4: a needed program is missing or too old, or a port is in use.
    pub fn missing(message: impl Into<String>) -> Self {
        Self::new(4, message)
    }
}

/// The hands of a bot: performs what the machine asks for.
pub trait Shell {
    /// The brain that it serves.
    type Machine: Machine;

    /// Performs one action: quickly, in order. Long work is spawned and ends as an event.
    fn perform(&mut self, action: <Self::Machine as Machine>::Action) -> ControlFlow<Exit>;

    /// Called after every step, before its actions: to share state with API handlers or a data plane.
    fn stepped(&mut self, _state: &<Self::Machine as Machine>::State) {}
}

/// The way into the machine's queue. Clones share it.
#[derive(Debug)]
pub struct Events<E>(mpsc::Sender<E>);

impl<E> Clone for Events<E> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<E> Events<E> {
    /// A way into another queue than a machine's.
    pub(super) const fn over(sender: mpsc::Sender<E>) -> Self {
        Self(sender)
    }

    /// Queues an event; waits while the queue is full. A machine that has ended takes no more events, silently.
    pub async fn send(&self, event: E) {
        let _ended = self.0.send(event).await;
    }

    /// The same for a thread without a runtime; panics inside one.
    pub fn send_blocking(&self, event: E) {
        let _ended = self.0.blocking_send(event);
    }

    /// Queues an event if there is room; says whether there was.
    #[must_use]
    pub fn try_send(&self, event: E) -> bool {
        self.0.try_send(event).is_ok()
    }
}

/// The machine's end of the queue.
#[derive(Debug)]
pub struct Queue<E>(mpsc::Receiver<E>);

impl<E> Queue<E> {
    /// The next event, for tests that stand in for a machine.
    pub async fn next(&mut self) -> Option<E> {
        self.0.recv().await
    }
}

/// A bounded queue of events.
#[must_use]
pub fn queue<E>() -> (Events<E>, Queue<E>) {
    let (sender, receiver) = mpsc::channel(QUEUE_LEN_MAX);
    (Events(sender), Queue(receiver))
}

/// The proof that the loop turns, for the renewal thread: a zombie must not keep a lock. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Pulse {
    inner: Arc<PulseInner>,
}

#[derive(Debug, Default)]
struct PulseInner {
    last_ms: AtomicU64,
    wanted: Notify,
}

impl Pulse {
    /// A pulse that has just beaten.
    #[must_use]
    pub fn new() -> Self {
        let pulse = Self::default();
        pulse.beat();
        pulse
    }

    /// The loop turns.
    pub fn beat(&self) {
        self.inner.last_ms.store(Clock::now().as_millis(), Ordering::Release);
    }

    /// Asks an idle loop to turn once.
    pub fn ask(&self) {
        self.inner.wanted.notify_one();
    }

    /// When the loop turned last.
    #[must_use]
    pub fn last(&self) -> Time {
        Time::from_millis(self.inner.last_ms.load(Ordering::Acquire))
    }

    async fn asked(&self) {
        self.inner.wanted.notified().await;
    }
}

/// What the loop is built from.
pub(super) struct Driver<S: Shell> {
    pub(super) cell: StateCell<<S::Machine as Machine>::State>,
    pub(super) shell: S,
    pub(super) queue: Queue<<S::Machine as Machine>::Event>,
    pub(super) pulse: Pulse,
    pub(super) hub: StatusHub,
    pub(super) metrics: Metrics,
    pub(super) log: Option<StepLog>,
}

impl<S: Shell> Driver<S> {
    /// Turns until the shell says that it is over.
    ///
    /// # Errors
    /// If the kernel gives no timer.
    pub(super) async fn run(mut self) -> io::Result<Exit> {
        let timer = Timer::new()?;
        let mut fired_at = None;
        loop {
            self.pulse.beat();
            let deadline = self.cell.read(S::Machine::deadline).map(|d| d.at);
            let earliest = fired_at.map_or(Time::ZERO, |at| at + TIMER_PAUSE_MIN);
            let due = deadline.map(|at| at.max(earliest));
            let pulse = self.pulse.clone();
            let event = tokio::select! {
                biased;
                fired = timer.wait_until(due) => {
                    fired?;
                    fired_at = Some(Clock::now());
                    S::Machine::timer_fired()
                }
                event = self.queue.0.recv() => match event {
                    Some(event) => event,
                    None => return Ok(Exit::failure("nobody is left to send events to the machine")),
                },
                () = pulse.asked() => continue,
            };
            if let ControlFlow::Break(exit) = self.step(event) {
                return Ok(exit);
            }
            // A loop that never waits would starve the tasks that share its thread.
            tokio::task::consume_budget().await;
        }
    }

    fn step(&mut self, event: <S::Machine as Machine>::Event) -> ControlFlow<Exit> {
        let now = Clock::now();
        self.metrics.steps.inc();
        self.metrics.queue_length.set(i64::try_from(self.queue.0.len()).unwrap_or(i64::MAX));
        let (logged, shell) = (self.log.is_some().then(|| event.clone()), &mut self.shell);
        let (from, to, actions, line) = self.cell.update(|state| {
            let from = S::Machine::role(&state);
            let Step { state, actions } = S::Machine::step(state, now, event);
            let to = S::Machine::role(&state);
            if cfg!(debug_assertions)
                && let Err(broken) = S::Machine::invariants(&state)
            {
                panic!("an invariant is broken in {to}: {broken}");
            }
            shell.stepped(&state);
            let line = logged.map(|event| StepLog::line::<S::Machine>(now, &event, &state, &actions));
            (state, (from, to, actions, line))
        });
        if let (Some(log), Some(line)) = (&mut self.log, line) {
            log.write(&line);
        }
        if from != to {
            self.metrics.role_changes.inc();
            tracing::info!(from = %from, to = %to, "role changed");
        }
        self.hub.stepped(from != to);
        actions.into_iter().try_for_each(|action| self.shell.perform(action))
    }
}

/// One timer on the clock that counts suspend: it fires at once after a sleep that outlasted it.
struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let fd = rustix::time::timerfd_create(TimerfdClockId::Boottime, flags)?;
        watch_readable(fd).map(Self)
    }

    /// Waits until `due`; for ever if there is nothing to wait for.
    async fn wait_until(&self, due: Option<Time>) -> io::Result<()> {
        let Some(due) = due else { return std::future::pending().await };
        if due <= Clock::now() {
            return Ok(());
        }
        // An armed time of zero would disarm the timer.
        let ms = due.as_millis().max(1);
        let value = Timespec {
            tv_sec: i64::try_from(ms / 1_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(ms % 1_000 * 1_000_000).unwrap_or(0),
        };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        rustix::time::timerfd_settime(&self.0, TimerfdTimerFlags::ABSTIME, &once)?;
        loop {
            let mut ready = self.0.readable().await?;
            let mut expirations = [0_u8; 8];
            match ready.try_io(|fd| Ok(rustix::io::read(fd, &mut expirations)?)) {
                Ok(read) => return read.map(|_bytes| ()),
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use super::{
        Clock, ControlFlow, Driver, Events, Exit, Metrics, Pulse, Shell, Span, Step, TIMER_PAUSE_MIN, Time, queue,
    };
    use crate::{
        machine::{Deadline, Edge, Machine, Report, TransitionTable},
        shell::status::{Health, Identity, StateCell, StatusHub},
    };

    /// Counts what it is told. Its deadline stays where it is told to be, even in the past.
    #[derive(Debug)]
    struct Counter;

    #[derive(Debug, Clone, PartialEq, Serialize)]
    struct State {
        fired: u64,
        told: u64,
        wake_at: Option<Time>,
    }

    #[derive(Debug, Clone, PartialEq, Serialize)]
    enum Event {
        TimerFired,
        Told,
        WakeAt(Option<Time>),
        End,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
    struct Counting;

    impl std::fmt::Display for Counting {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("counting")
        }
    }

    impl Machine for Counter {
        const KIND: &'static str = "counter";
        const TRANSITIONS: TransitionTable<Counting> =
            TransitionTable { initial: Counting, edges: &[Edge::new(Counting, Counting, "always")] };
        type State = State;
        type Event = Event;
        type Action = Exit;
        type Role = Counting;

        fn step(mut state: State, _now: Time, event: Event) -> Step<State, Exit> {
            let mut actions = Vec::new();
            match event {
                Event::TimerFired => state.fired += 1,
                Event::Told => state.told += 1,
                Event::WakeAt(at) => state.wake_at = at,
                Event::End => actions.push(Exit::clean(format!("{} {}", state.fired, state.told))),
            }
            Step { state, actions }
        }

        fn timer_fired() -> Event {
            Event::TimerFired
        }

        fn deadline(state: &State) -> Option<Deadline> {
            state.wake_at.map(|at| Deadline { at, reason: String::from("told to") })
        }

        fn role(_state: &State) -> Counting {
            Counting
        }

        fn report(_state: &State, now: Time) -> Report {
            Report::new(Counting, now, now)
        }

        fn invariants(state: &State) -> Result<(), String> {
            if state.told < 1_000_000 { Ok(()) } else { Err(String::from("too much")) }
        }
    }

    struct Hands;

    impl Shell for Hands {
        type Machine = Counter;

        fn perform(&mut self, exit: Exit) -> ControlFlow<Exit> {
            ControlFlow::Break(exit)
        }
    }

    /// Runs the loop while `live` tells it things; how often it fired and how often it was told.
    async fn counts<F: Future<Output = ()>>(live: impl FnOnce(Events<Event>, StatusHub, Pulse) -> F) -> (u64, u64) {
        let (events, queue) = queue();
        let text = String::new;
        let identity = Identity {
            name: text(),
            scope: text(),
            namespace: text(),
            kind: text(),
            instance: text(),
            version: text(),
        };
        let (hub, pulse) = (StatusHub::new(identity), Pulse::new());
        let cell = StateCell::new(State { fired: 0, told: 0, wake_at: None });
        hub.attach::<Counter>(cell.clone(), |_, _| Health { healthy: true, alive: true, ready: true });
        let driver = Driver {
            cell,
            shell: Hands,
            queue,
            pulse: pulse.clone(),
            hub: hub.clone(),
            metrics: Metrics::new(),
            log: None,
        };
        let live = async {
            live(events.clone(), hub, pulse).await;
            events.send(Event::End).await;
        };
        let (exit, ()) = tokio::join!(driver.run(), live);
        let message = exit.expect("a timer").message;
        let (fired, told) = message.split_once(' ').expect("two figures");
        (fired.parse().expect("a figure"), told.parse().expect("a figure"))
    }

    async fn sleep(ms: u64) {
        tokio::time::sleep(Span::from_millis(ms).to_std()).await;
    }

    #[tokio::test]
    async fn the_timer_fires_once_it_is_due() {
        let (fired, _) = counts(async |events, _, _| {
            events.send(Event::WakeAt(Some(Clock::now() + Span::from_millis(100)))).await;
            sleep(60).await;
            // Moved on in time: it must not fire at the old moment.
            events.send(Event::WakeAt(Some(Clock::now() + Span::from_secs(60)))).await;
            sleep(100).await;
        })
        .await;
        assert_eq!(fired, 0);
        let (fired, _) = counts(async |events, hub, _| {
            events.send(Event::WakeAt(Some(Clock::now() + Span::from_millis(30)))).await;
            hub.subscribe().wait_for(|steps| *steps >= 2).await.expect("the hub lives");
            events.send(Event::WakeAt(None)).await;
        })
        .await;
        assert!(fired >= 1);
    }

    #[tokio::test]
    async fn a_deadline_that_stays_in_the_past_neither_spins_nor_starves_events() {
        let began = Clock::now();
        let (fired, told) = counts(async |events, _, _| {
            events.send(Event::WakeAt(Some(Time::ZERO))).await;
            for _ in 0..500 {
                events.send(Event::Told).await;
            }
            sleep(100).await;
        })
        .await;
        assert_eq!(told, 500);
        let most = Clock::now().since(began).as_millis() / TIMER_PAUSE_MIN.as_millis() + 1;
        assert!((1..=most).contains(&fired), "{fired} firings where {most} fit");
    }

    #[tokio::test]
    async fn an_idle_loop_shows_that_it_lives_when_asked() {
        counts(async |_, _, pulse| {
            sleep(50).await;
            let before = pulse.last();
            sleep(20).await;
            assert_eq!(pulse.last(), before, "nothing happens, so nothing turns");
            pulse.ask();
            sleep(50).await;
            assert!(pulse.last() > before);
        })
        .await;
    }
}
