//! Readers: each asks one web bot for whole sets of files over a connection that it keeps, and judges every answer.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::task::JoinSet;

use super::tree::{MANIFEST, Tree};
use crate::http::{Answer, Http};

/// Between two requests of a reader: with two readers a bot there are always some under way when a bot is killed, and the
/// machine has time for the bots too.
const PAUSE: Duration = Duration::from_millis(8);

/// After a failed request: a bot that is away refuses at once.
const PAUSE_AWAY: Duration = Duration::from_millis(10);

/// Readers of one bot.
const READERS_PER_BOT: usize = 2;

/// A kill may be told to the readers this long after its effect: the killer waits for the end of the process first.
const TOLD_WITHIN: Duration = Duration::from_millis(500);

/// What the killer, the pusher and the readers share.
#[derive(Debug, Default)]
pub(super) struct Board {
    /// The number of every commit that may be seen.
    numbers: Mutex<BTreeMap<String, u64>>,
    /// How often each web bot was killed, counted before and after each kill.
    kills: Vec<AtomicU64>,
    stop: AtomicBool,
    checked: AtomicU64,
    bytes: AtomicU64,
    sets: AtomicU64,
    mixed_sets: AtomicU64,
    unanswered: AtomicU64,
    wrong: Mutex<Vec<String>>,
}

/// What the readers have seen.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// Answers that were whole, and compared with what they must be.
    pub(super) checked: u64,
    /// Their bytes.
    pub(super) bytes: u64,
    /// Sets of files that came from one commit.
    pub(super) sets: u64,
    /// Sets that a flip fell into: each answer of one commit, the later ones of the newer one.
    pub(super) sets_across_a_flip: u64,
    /// Requests that a killed bot did not answer, or not to the end.
    pub(super) unanswered: u64,
    /// What must not have been.
    pub(super) wrong: Vec<String>,
}

impl Board {
    pub(super) fn new(bots: usize) -> Arc<Self> {
        Arc::new(Self { kills: (0..bots).map(|_| AtomicU64::new(0)).collect(), ..Self::default() })
    }

    /// From now on answers may be of this commit.
    pub(super) fn publish(&self, sha: &str, number: u64) {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).insert(sha.to_owned(), number);
    }

    fn number(&self, sha: &str) -> Option<u64> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).get(sha).copied()
    }

    /// To be told before and after the kill of a web bot.
    pub(super) fn killed(&self, bot: usize) {
        if let Some(kills) = self.kills.get(bot) {
            kills.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn kills(&self, bot: usize) -> u64 {
        self.kills.get(bot).map_or(0, |kills| kills.load(Ordering::SeqCst))
    }

    pub(super) fn wrong(&self, what: String) {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    /// What was seen so far.
    pub(super) fn seen(&self) -> Seen {
        Seen {
            checked: self.checked.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            sets: self.sets.load(Ordering::Relaxed),
            sets_across_a_flip: self.mixed_sets.load(Ordering::Relaxed),
            unanswered: self.unanswered.load(Ordering::Relaxed),
            wrong: self.wrong.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}

/// Readers that run.
pub(super) struct Readers {
    board: Arc<Board>,
    tasks: JoinSet<()>,
}

impl Readers {
    /// Starts readers of the bots at these addresses.
    pub(super) fn start(board: &Arc<Board>, urls: &[String]) -> Self {
        let mut tasks = JoinSet::new();
        for (bot, url) in urls.iter().enumerate() {
            for _ in 0..READERS_PER_BOT {
                let reader = Reader {
                    board: Arc::clone(board),
                    bot,
                    url: url.clone(),
                    http: Http::new(),
                    tree: Tree::of(0),
                    newest: 0,
                    kills_known: 0,
                };
                tasks.spawn(reader.read());
            }
        }
        Self { board: Arc::clone(board), tasks }
    }

    /// Lets all end their last request.
    pub(super) async fn finish(mut self) -> Seen {
        self.board.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        self.board.seen()
    }
}

struct Reader {
    board: Arc<Board>,
    bot: usize,
    url: String,
    http: Http,
    /// The commit that was seen last, with what its files must be.
    tree: Tree,
    /// The newest commit that this bot has shown to this reader.
    newest: u64,
    /// The kills of the bot that were known before its last good answer.
    kills_known: u64,
}

impl Reader {
    async fn read(mut self) {
        while !self.board.stop.load(Ordering::Relaxed) {
            let _cut_short = self.read_set().await;
        }
    }

    /// One set: the manifest, and then every file that it names.
    async fn read_set(&mut self) -> Option<()> {
        let manifest = self.ask(MANIFEST).await?;
        let paths = manifest.text.lines().skip(1).filter_map(|line| line.split(' ').next());
        let mut commits = vec![manifest.revision().to_owned()];
        for path in paths.map(str::to_owned).collect::<Vec<_>>() {
            if self.board.stop.load(Ordering::Relaxed) {
                return None;
            }
            commits.push(self.ask(&path).await?.revision().to_owned());
        }
        commits.dedup();
        let sets = if commits.len() == 1 { &self.board.sets } else { &self.board.mixed_sets };
        sets.fetch_add(1, Ordering::Relaxed);
        Some(())
    }

    /// One answer, judged; nothing if there was none, or a wrong one.
    async fn ask(&mut self, path: &str) -> Option<Answer> {
        let kills = self.board.kills(self.bot);
        let asked = self.http.get(&format!("{}/{path}", self.url)).await;
        let judged = match asked {
            Ok(answer) => self.judge(path, &answer).map(|()| answer),
            Err(error) => Err(format!("{error:#}")),
        };
        match judged {
            Ok(answer) => {
                self.kills_known = kills;
                self.board.checked.fetch_add(1, Ordering::Relaxed);
                self.board.bytes.fetch_add(u64::try_from(answer.text.len()).unwrap_or(u64::MAX), Ordering::Relaxed);
                tokio::time::sleep(PAUSE).await;
                Some(answer)
            }
            Err(wrong) => {
                self.explain(path, wrong).await;
                None
            }
        }
    }

    /// What a bot answers that was killed since its last good answer is nothing; anything else is wrong.
    async fn explain(&mut self, path: &str, wrong: String) {
        let is_silence = !wrong.starts_with(WRONG);
        let since = tokio::time::Instant::now();
        while is_silence && since.elapsed() < TOLD_WITHIN {
            if self.board.kills(self.bot) > self.kills_known {
                self.board.unanswered.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(PAUSE_AWAY).await;
                return;
            }
            tokio::time::sleep(PAUSE_AWAY).await;
        }
        self.board.wrong(format!("web bot {} at /{path}: {wrong}", self.bot + 1));
    }

    /// Whether an answer is whole, and of one commit that was published, which is not older than the last one.
    fn judge(&mut self, path: &str, answer: &Answer) -> Result<(), String> {
        let revision = answer.revision();
        if answer.status == 503 && revision.is_empty() {
            return Err(String::from("503: it does not serve"));
        }
        let number = self.board.number(revision).ok_or_else(|| {
            format!("{WRONG} {} of `{revision}`, which was never published: {:.80}", answer.status, answer.text)
        })?;
        if number < self.newest {
            return Err(format!("{WRONG} commit {number} after commit {}", self.newest));
        }
        self.newest = number;
        if number != self.tree.number {
            self.tree = Tree::of(number);
        }
        match (answer.status, self.tree.files.get(path)) {
            (200, Some(body)) if *body == answer.text => Ok(()),
            // What another commit alone has is not there.
            (404, None) => Ok(()),
            (status, body) => Err(format!(
                "{WRONG} {status} with {} bytes where commit {number} has {:?}: {:.80}",
                answer.text.len(),
                body.map(String::len),
                answer.text
            )),
        }
    }
}

/// What marks an answer that no kill explains.
const WRONG: &str = "WRONG:";
