//! The end that no task may keep to itself: whoever runs the bot hears of it, and ends it.

use std::future::Future;

use tokio::sync::watch;

/// Why the bot cannot go on, once it cannot. Clones share.
#[derive(Clone, Default)]
pub(super) struct Fatal {
    why: watch::Sender<Option<String>>,
}

impl Fatal {
    /// Says it; only the first word counts.
    pub(super) fn tell(&self, why: String) {
        self.why.send_if_modified(|known| {
            let is_first = known.is_none();
            known.get_or_insert(why);
            is_first
        });
    }

    /// Waits until it is said.
    pub(super) async fn told(&self) -> String {
        let mut why = self.why.subscribe();
        let told = why.wait_for(Option::is_some).await;
        told.ok().and_then(|why| why.clone()).unwrap_or_default()
    }

    /// Runs a task without which the bot would only look alive. Must be called inside a runtime.
    pub(super) fn supervise(&self, what: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let (fatal, task) = (self.clone(), tokio::spawn(task));
        tokio::spawn(async move { fatal.note(what, task.await) });
    }

    /// Takes in how a task has ended: by itself, with its runtime, or by a defect.
    pub(super) fn note(&self, what: &str, ended: Result<(), tokio::task::JoinError>) {
        if ended.is_err_and(|error| error.is_panic()) {
            self.tell(format!(
                "{what} has panicked: a defect, with its place on standard error above; start the bot anew"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Fatal;

    #[tokio::test]
    async fn a_task_that_panics_is_the_end_and_one_that_ends_is_not() {
        let fatal = Fatal::default();
        fatal.supervise("the quiet one", async {});
        assert!(tokio::time::timeout(Duration::from_millis(50), fatal.told()).await.is_err());
        fatal.supervise("the other one", async { panic!("as planned") });
        let why = tokio::time::timeout(Duration::from_secs(20), fatal.told()).await.expect("it is told");
        assert!(why.starts_with("the other one has panicked"), "{why}");
        fatal.tell(String::from("late"));
        assert_eq!(fatal.told().await, why, "the first word counts");
    }
}
