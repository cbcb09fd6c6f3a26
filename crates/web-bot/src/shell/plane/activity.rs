//! What a connection with many requests at once has to do, whose turn it is with each, and since when nothing moves.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use bots_core::{machine::Time, shell::Clock};
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

/// A body is handed over in parts of this size. The connection takes a part as soon as there is room for its first byte, and sends the
/// rest of it after the end of the body: the slowest client needs no longer for the last part than it may be idle.
const PART_BYTES: usize = 64 * 1024;

/// Requests that are not answered to the end, and when something last moved. Clones share.
#[derive(Clone)]
pub(super) struct Activity {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    requests: usize,
    /// Those of them that cannot go on before the client has taken what was handed over.
    with_client: usize,
    /// When a request last began or ended, or a part of an answer came or was taken.
    moved: Time,
}

/// How a connection has stood still.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Quiet {
    /// It has asked for nothing.
    Idle,
    /// It has asked, and takes no answer.
    Stalled,
}

/// A request, until this is dropped.
pub(super) struct Busy {
    turn: Arc<Turn>,
}

/// Whose turn it is with one request.
struct Turn {
    activity: Activity,
    whose: Mutex<Whose>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// The app's, or the disk's: the next part of the answer is not there.
    Ours,
    /// There is a part for it to take.
    Client,
    /// The request has ended.
    Nobodys,
}

impl Activity {
    pub(super) fn new() -> Self {
        Self { inner: Arc::new(Mutex::new(Inner { requests: 0, with_client: 0, moved: Clock::now() })) }
    }

    pub(super) fn begin(&self) -> Busy {
        let mut inner = self.lock();
        inner.requests += 1;
        inner.moved = Clock::now();
        Busy { turn: Arc::new(Turn { activity: self.clone(), whose: Mutex::new(Whose::Ours) }) }
    }

    /// Waits until nothing has moved for so long, and that is up to the client in all that it has asked for. It may be noticed as
    /// much later.
    pub(super) async fn quiet_for(&self, patience: Duration) -> Quiet {
        loop {
            let pause = {
                let inner = self.lock();
                let left = patience.saturating_sub(Clock::now().since(inner.moved).to_std());
                match (inner.requests, left.is_zero()) {
                    (0, true) => return Quiet::Idle,
                    (requests, true) if requests == inner.with_client => return Quiet::Stalled,
                    (requests, false) if requests == inner.with_client => left,
                    (_, _) => patience,
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    /// It is somebody's turn, or still is after a step.
    fn pass(&self, to: Whose) {
        self.set(self.lock(), to);
    }

    /// The next part has come, if it was waited for.
    fn came(&self) {
        let whose = self.lock();
        if *whose == Whose::Ours {
            self.set(whose, Whose::Client);
        }
    }

    fn set(&self, mut whose: MutexGuard<'_, Whose>, to: Whose) {
        let mut inner = self.activity.lock();
        inner.with_client += usize::from(to == Whose::Client);
        inner.with_client -= usize::from(*whose == Whose::Client);
        inner.requests -= usize::from(to == Whose::Nobodys);
        inner.moved = Clock::now();
        *whose = to;
    }

    fn lock(&self) -> MutexGuard<'_, Whose> {
        self.whose.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wakes who waits for the next part, and notes that there is one: who takes nothing may not ask for it.
struct Came {
    waiting: Waker,
    turn: Arc<Turn>,
}

impl Wake for Came {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.turn.came();
        self.waiting.wake_by_ref();
    }
}

/// The body of an answer, and that the connection is busy until its end.
pub(super) struct Answering<B> {
    body: B,
    /// What was taken from the body and is not handed over yet.
    rest: Bytes,
    busy: Busy,
}

impl Busy {
    /// Nothing goes on from here before the client takes the head.
    pub(super) fn until_end_of<B>(self, body: B) -> Answering<B> {
        self.turn.pass(Whose::Client);
        Answering { body, rest: Bytes::new(), busy: self }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Answering<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = &mut *self;
        let turn = &this.busy.turn;
        if this.rest.is_empty() {
            turn.pass(Whose::Ours);
            let came = Waker::from(Arc::new(Came { waiting: cx.waker().clone(), turn: Arc::clone(turn) }));
            let polled = Pin::new(&mut this.body).poll_frame(&mut Context::from_waker(&came));
            if polled.is_ready() {
                turn.pass(Whose::Client);
            }
            let frame = match polled {
                Poll::Ready(Some(Ok(frame))) => frame,
                other => return other,
            };
            match frame.into_data() {
                Ok(data) => this.rest = data,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        } else {
            turn.pass(Whose::Client);
        }
        let part = PART_BYTES.min(this.rest.len());
        Poll::Ready(Some(Ok(Frame::data(this.rest.split_to(part)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (inner, rest) = (self.body.size_hint(), u64::try_from(self.rest.len()).unwrap_or(u64::MAX));
        let mut hint = SizeHint::new();
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper.saturating_add(rest));
        }
        hint.set_lower(inner.lower().saturating_add(rest));
        hint
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.turn.pass(Whose::Nobodys);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        pin::Pin,
        task::{Context, Poll},
        time::Duration,
    };

    use bytes::Bytes;
    use http_body_util::{BodyExt, Full};
    use hyper::body::{Body, Frame};
    use tokio::sync::mpsc;

    use super::{Activity, PART_BYTES, Quiet};

    /// A body that comes from elsewhere.
    struct Stream(mpsc::Receiver<Bytes>);

    impl Body for Stream {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.0.poll_recv(cx).map(|part| part.map(|part| Ok(Frame::data(part))))
        }
    }

    const PATIENCE: Duration = Duration::from_millis(50);

    async fn quiet(activity: &Activity) -> Option<Quiet> {
        tokio::time::timeout(PATIENCE * 10, activity.quiet_for(PATIENCE)).await.ok()
    }

    #[tokio::test]
    async fn a_client_is_to_take_what_is_there_and_not_what_is_to_come() {
        let activity = Activity::new();
        let busy = activity.begin();
        assert_eq!(quiet(&activity).await, None, "the app has not answered");
        let (app, parts) = mpsc::channel(1);
        let mut body = busy.until_end_of(Stream(parts));
        assert_eq!(quiet(&activity).await, Some(Quiet::Stalled), "the head is not taken");
        app.send(Bytes::from_static(b"a")).await.expect("room");
        assert!(body.frame().await.is_some());
        assert_eq!(quiet(&activity).await, Some(Quiet::Stalled), "the part is not taken");
        let next = tokio::time::timeout(Duration::ZERO, body.frame()).await;
        assert!(next.is_err(), "the app says nothing");
        assert_eq!(quiet(&activity).await, None, "it is the app that is waited for");
        app.send(Bytes::from_static(b"b")).await.expect("room");
        assert_eq!(quiet(&activity).await, Some(Quiet::Stalled), "there is something to take");
        let other = activity.begin();
        assert_eq!(quiet(&activity).await, None, "another request waits for the app");
        drop((body, other));
        assert_eq!(quiet(&activity).await, Some(Quiet::Idle));
    }

    #[tokio::test]
    async fn a_body_keeps_its_connection_busy_until_its_last_part_is_taken() {
        let whole = Bytes::from((0..=255).cycle().take(3 * PART_BYTES + 5).collect::<Vec<u8>>());
        let activity = Activity::new();
        let mut body = activity.begin().until_end_of(Full::new(whole.clone()));
        let busy = || activity.lock().requests;
        let mut taken = Vec::new();
        for part in 0..4 {
            assert!(!body.is_end_stream() && busy() == 1, "part {part}");
            assert_eq!(body.size_hint().exact(), u64::try_from(whole.len() - taken.len()).ok());
            let frame = body.frame().await.expect("a part").expect("it is whole");
            let data = frame.into_data().expect("data");
            assert!(data.len() <= PART_BYTES);
            taken.extend_from_slice(&data);
        }
        assert!(body.is_end_stream() && taken == whole);
        drop(body);
        assert_eq!(busy(), 0);
    }
}
